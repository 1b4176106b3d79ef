"""MkDocs hook: README, CHANGELOG and their like become pages, and links to source files lead to the repository.

The documents are written for readers of the repository, so a document links to a test or a source file by its relative
path. The site has no such files, so the hook replaces the link:

- A link to a page of the site leads to that page. MkDocs checks the page and the anchor.
- A link to another file leads to that file at the repository URL of pyproject.toml.
- A link to no file is a warning, which fails the build because `make docs` is strict.
"""

from __future__ import annotations

import logging
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "reporting.md": "SECURITY.md",
}
"""Pages that are made of files outside docs/: page -> file, both relative to their roots."""

_LINK = re.compile(r"(?<=\]\()(?![a-z][a-z0-9+.-]*:|#|/)([^)\s#]+)")
_FENCE = re.compile(r"^( *)(```|~~~)")

logger = logging.getLogger("mkdocs.hooks.docs_hook")  # MkDocs counts the warnings of loggers below its own


def repository_url() -> str:
    """Return the repository URL that pyproject.toml states."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(pyproject["project"]["urls"]["Repository"])


def source_of(page: str) -> str:
    """Return the path in the repository of the file that a page is made of."""
    return PAGES.get(page, f"docs/{page}")


def page_of(path: str) -> str | None:
    """Return the page that a file of the repository becomes, or None when the site does not contain it."""
    for page, source in PAGES.items():
        if path == source:
            return page
    return path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else None


def resolved(target: str, page: str, repository: str) -> str | None:
    """Return the target that a relative link of `page` has in the site, or None when there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), target))
    if not (ROOT / path).exists():
        return None
    if (linked := page_of(path)) is not None:
        return posixpath.relpath(linked, posixpath.dirname(page) or ".")
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def with_links_resolved(markdown: str, page: str, repository: str) -> str:
    """Return the text of a page with each relative link resolved; logs a warning for each that leads nowhere."""

    def replacement(link: re.Match[str]) -> str:
        target = resolved(link[1], page, repository)
        if target is None:
            logger.warning("%s links to %s, which does not exist", source_of(page), link[1])
        return target or link[1]

    lines, fenced = [], False
    for line in markdown.splitlines(keepends=True):
        if _FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else _LINK.sub(replacement, line))
    return "".join(lines)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are made of files outside docs/."""
    from mkdocs.structure.files import File  # installed by `make docs` alone

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Resolve the links of a page."""
    return with_links_resolved(markdown, page.file.src_uri, config.extra["repository"])


def on_config(config: Any) -> Any:
    """Read the repository URL, which pyproject.toml alone states."""
    config.extra["repository"] = repository_url()
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": repository_url(), "name": "Repository"}]
    return config
