"""Compare requirements.lock with pyproject.toml and with this environment; `--write` writes the lock again.

`--docs` compares requirements-docs.lock with the group `docs`, which `make docs` installs into an environment of its
own.

The check asks no registry, because the installed metadata names the requirements of each dependency. The lock is a
constraints file of exact pins for every supported Python, so it may have a pin that only another Python needs. It has
no hashes and no download addresses, because these differ between an index and its mirrors.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = "requirements.lock"
DOCS_LOCK = "requirements-docs.lock"
SUPPORTED = ("3.11", "3.12", "3.13")
HEADER = f"""\
# A constraints file for pip: the exact versions that are developed with, on Python {SUPPORTED[0]} to {SUPPORTED[-1]}.
# Written by `make lock`, checked by `make check`.
"""


class Installed(NamedTuple):
    """A distribution of an environment: its version, and the requirements of its metadata."""

    version: str
    requires: tuple[Requirement, ...]


class Need(NamedTuple):
    """A requirement, and who has it."""

    requirement: Requirement
    of: str

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)


def installed_here() -> dict[str, Installed]:
    """The distributions of the running environment, by canonical name; the first on the path wins, as in an import."""
    found: dict[str, Installed] = {}
    for dist in distributions():
        requires = tuple(Requirement(text) for text in dist.requires or ())
        found.setdefault(canonicalize_name(dist.metadata["Name"]), Installed(dist.version, requires))
    return found


def stated(pyproject: Mapping[str, Any]) -> list[Need]:
    """Every requirement that pyproject.toml states: to build, to run, in each extra, in each group that dev has."""
    project = pyproject["project"]
    groups = pyproject.get("dependency-groups", {})
    tables = {
        "build-system": pyproject["build-system"]["requires"],
        "dependencies": project.get("dependencies", []),
        **{f"extra {name}": texts for name, texts in project.get("optional-dependencies", {}).items()},
        **{f"group {name}": groups[name] for name in included(groups, "dev")},
    }
    own = canonicalize_name(project["name"])
    needs = [Need(Requirement(text), of) for of, texts in tables.items() for text in texts if isinstance(text, str)]
    return [need for need in needs if need.name != own]


def stated_by_group(pyproject: Mapping[str, Any], group: str) -> list[Need]:
    """Return the requirements of one dependency group, without those of the groups that it includes."""
    texts = pyproject["dependency-groups"][group]
    return [Need(Requirement(text), f"group {group}") for text in texts if isinstance(text, str)]


def included(groups: Mapping[str, Any], name: str) -> list[str]:
    """A group, and those that it includes in turn, in the order of the table; nothing else is installed by make."""
    found, waiting = set[str](), [name] if name in groups else []
    while waiting:
        found.add(one := waiting.pop())
        waiting += [text["include-group"] for text in groups[one] if isinstance(text, dict)]
    return [one for one in groups if one in found]


def closure(needs: Iterable[Need], installed: Mapping[str, Installed], pythons: Iterable[str]) -> list[Need]:
    """`needs` and all that they need in turn, on any of `pythons` ("3.12"); of what is not installed, only its name."""
    pythons = tuple(pythons)
    found: dict[tuple[str, str, str], Need] = {}
    waiting = [need for need in needs if _applies(need.requirement, "", pythons)]
    while waiting:
        need = waiting.pop()
        key = (need.name, str(need.requirement), need.of)
        if key in found:
            continue
        found[key] = need
        for extra in ("", *need.requirement.extras):
            waiting += _needs_of(need.name, extra, installed, pythons)
    return list(found.values())


def _needs_of(name: str, extra: str, installed: Mapping[str, Installed], pythons: tuple[str, ...]) -> Iterator[Need]:
    if name in installed:
        for requirement in installed[name].requires:
            if _applies(requirement, extra, pythons):
                yield Need(requirement, name)


def _applies(requirement: Requirement, extra: str, pythons: tuple[str, ...]) -> bool:
    """Whether it is needed on any of `pythons`, each in its latest patch release."""
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"python_version": python, "python_full_version": f"{python}.99", "extra": extra})
        for python in pythons
    )


def read_lock(text: str) -> tuple[dict[str, str], list[str]]:
    """The pins of a lock, by canonical name, and what is wrong with its lines."""
    pins: dict[str, str] = {}
    wrong: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, _, version = entry.partition("==")
        if not _is_pin(name, version):
            wrong.append(f"line {number} is not an exact pin `name==version`: {entry}")
        elif canonicalize_name(name) in pins:
            wrong.append(f"line {number} pins {name} a second time")
        else:
            pins[canonicalize_name(name)] = version
    return pins, wrong


def _is_pin(name: str, version: str) -> bool:
    try:
        return Requirement(name).name == name and str(Version(version)) == version
    except (InvalidRequirement, InvalidVersion):
        return False


def problems(lock: str, needs: Iterable[Need], installed: Mapping[str, Installed], python: str) -> list[str]:
    """Return the differences of `lock` from `needs` and from the `installed` versions; empty if there are none."""
    needs = list(needs)
    pins, found = read_lock(lock)
    for need in closure(needs, installed, [python]):
        if need.name not in pins:
            found.append(f"{need.name} is not pinned, and {need.of} needs {need.requirement}")
        elif not need.requirement.specifier.contains(pins[need.name], prereleases=True):
            found.append(f"{need.name}=={pins[need.name]} is pinned, but {need.of} needs {need.requirement}")
        if need.name not in installed:
            found.append(f"{need.name} is not installed, and {need.of} needs {need.requirement}")
    for name, version in pins.items():
        if name in installed and installed[name].version != version:
            found.append(f"{name}=={version} is pinned, but {installed[name].version} is installed")
    wanted = {need.name for need in closure(needs, installed, {python, *SUPPORTED})}
    found += [f"{name} is pinned, and nothing needs it" for name in pins if name not in wanted]
    return list(dict.fromkeys(found))


def written(needs: Iterable[Need], installed: Mapping[str, Installed], python: str) -> str:
    """The text of the lock that fits `installed`."""
    names = {need.name for need in closure(needs, installed, [python])}
    return HEADER + "".join(f"{name}=={installed[name].version}\n" for name in sorted(names))


def main(arguments: list[str]) -> int:
    if not {"--write", "--docs"}.issuperset(arguments):
        print("usage: check_lock.py [--docs] [--write]", file=sys.stderr)
        return 2
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lock, needs = LOCK, stated(pyproject)
    if "--docs" in arguments:
        lock, needs = DOCS_LOCK, stated_by_group(pyproject, "docs")
    installed = installed_here()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if "--write" in arguments:
        (ROOT / lock).write_text(written(needs, installed, python))
    found = problems((ROOT / lock).read_text(), needs, installed, python)
    for problem in found:
        print(f"{lock}: {problem}")
    print(f"{lock}: {f'{len(found)} problems; run `make lock`' if found else 'in step with pyproject.toml'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
