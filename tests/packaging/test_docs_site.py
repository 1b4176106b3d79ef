"""The site that `make docs` builds: every page is reachable, every public name is documented, every link resolves."""

from __future__ import annotations

import logging
import re

import pytest

import unstract_core
from tools.check_lock import ROOT
from tools.docs_hook import PAGES, repository_url, resolved, source_of, with_links_resolved

NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
LISTED = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", NAV, re.MULTILINE)
WRITTEN = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
REFERENCE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
REPOSITORY = "https://example.org/repository"


def test_navigation_lists_every_page_once() -> None:
    """No page of docs/ is unreachable, and no entry of the navigation leads nowhere."""
    assert sorted(LISTED) == sorted([*WRITTEN, *PAGES])


@pytest.mark.parametrize("source", PAGES.values())
def test_page_outside_docs_has_a_source(source: str) -> None:
    """The file that becomes a page exists."""
    assert (ROOT / source).is_file()


def test_reference_documents_every_exported_name() -> None:
    """One page of the API reference has each name of `unstract_core.__all__`."""
    documented = re.findall(r"^::: unstract_core\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(documented) == sorted(unstract_core.__all__)


@pytest.mark.parametrize(
    ("target", "page", "expected"),
    [
        ("wire.md", "celery.md", "wire.md"),
        ("../wire.md", "reference/contract.md", "../wire.md"),
        ("docs/wire.md", "index.md", "wire.md"),
        ("../CHANGELOG.md", "migrating.md", "changelog.md"),
        ("../README.md", "wire.md", "index.md"),
        ("../Makefile", "wire.md", f"{REPOSITORY}/blob/main/Makefile"),
        ("../tests", "wire.md", f"{REPOSITORY}/tree/main/tests"),
        ("Makefile", "index.md", f"{REPOSITORY}/blob/main/Makefile"),
        ("../absent.py", "wire.md", None),
    ],
)
def test_link_of_a_document_resolves_in_the_site(target: str, page: str, expected: str | None) -> None:
    """A page links to a page, and another file of the repository to its place there."""
    assert resolved(target, page, REPOSITORY) == expected


def test_link_to_no_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """MkDocs counts it, and --strict makes it an error."""
    with caplog.at_level(logging.WARNING, "mkdocs"):
        text = with_links_resolved("[a](../absent.py) [b](wire.md#x) [c](https://example.org)", "celery.md", REPOSITORY)
    assert text == "[a](../absent.py) [b](wire.md#x) [c](https://example.org)"
    assert [record.getMessage() for record in caplog.records] == [
        "docs/celery.md links to ../absent.py, which does not exist"
    ]


def test_code_blocks_keep_their_links() -> None:
    """Only prose is changed."""
    assert with_links_resolved("```\n[a](Makefile)\n```\n", "index.md", REPOSITORY) == "```\n[a](Makefile)\n```\n"


def test_repository_url_is_the_one_of_pyproject() -> None:
    """The site takes it from there."""
    assert repository_url().startswith("https://github.com/")
    assert source_of("index.md") == "README.md"


@pytest.mark.parametrize("page", WRITTEN)
def test_nested_lists_are_indented_by_four(page: str) -> None:
    """Python-Markdown renders an item that is indented by less as one of the outer list."""
    text = re.sub(
        r"^```.*?^```", "", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*$", text, re.MULTILINE) == []
