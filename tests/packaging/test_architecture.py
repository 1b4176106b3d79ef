"""The map of the code names what is there: files, functions, classes, SQL statements and modules."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import unstract_core
from tools.check_lock import ROOT

QUERIES = "transports/postgres/sql/queries.sql"
DOCUMENTS = [
    "docs/architecture.md",
    "CONTRIBUTING.md",
    *(f"docs/adr/{path.name}" for path in (ROOT / "docs/adr").iterdir()),
]
_TOP = "unstract_core|transports|contract_tests|chaos|tests|benchmarks|examples|tools"
_FILE = re.compile(rf"\b(?:{_TOP})(?:/[\w.-]+)*\.(?:py|sql|json|yml)\b")
_PACKAGE = re.compile(rf"`((?:{_TOP})(?:/\w+)*)`")
_MODULE = re.compile(rf"`((?:{_TOP})(?:\.\w+)+)`")
_DEFINED = re.compile(r"`(\w+(?:\.\w+)*)`\s+in\s+`([\w/]+\.(?:py|sql))`")
_STATEMENT = re.compile(r"[Ss]tatement `(\w+)`")
_MEMBER = re.compile(r"`(\w+)\.(\w+)`")


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _definitions(path: Path) -> set[str]:
    """Return the functions, classes and methods of a module, or the statements of an SQL file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sql":
        return set(re.findall(r"^-- name: (\w+)$", text, re.MULTILINE))
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_existing_files_and_packages(document: str) -> None:
    """Each path of the repository leads somewhere, and each dotted name is a module."""
    text = _text(document)
    paths = {*_FILE.findall(text), *_PACKAGE.findall(text)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    modules = {name for name in _MODULE.findall(text) if not (ROOT / name).is_file()}
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_existing_definitions(document: str) -> None:
    """A function, class or statement is defined in the file that is named with it."""
    text = _text(document)
    named = {*_DEFINED.findall(text), *((name, QUERIES) for name in _STATEMENT.findall(text))}
    assert [(name, path) for name, path in sorted(named) if name not in _definitions(ROOT / path)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_existing_members(document: str) -> None:
    """A member of a public class is one of its attributes or fields."""
    members = [(owner, name) for owner, name in _MEMBER.findall(_text(document)) if owner in unstract_core.__all__]
    owners = {owner: getattr(unstract_core, owner) for owner, _ in members}
    assert [
        (owner, name)
        for owner, name in members
        if not hasattr(owners[owner], name) and name not in owners[owner].__annotations__
    ] == []


def test_architecture_shows_every_package() -> None:
    """The table of packages has each package of the core and each transport."""
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("unstract_core", "transports")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    shown = set(re.findall(r"^\| `([\w/]+)`", _text("docs/architecture.md"), re.MULTILINE))
    assert packages - shown == set()


def test_index_lists_every_decision() -> None:
    """Each record has its title in the index, under its number."""
    index = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", _text("docs/adr/index.md"), re.MULTILINE)
    titles = {
        path.name: _text(f"docs/adr/{path.name}").partition("\n")[0] for path in (ROOT / "docs/adr").glob("0*.md")
    }
    assert {name: f"# {number}. {title}" for number, title, name in index} == titles
