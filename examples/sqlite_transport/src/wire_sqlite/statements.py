"""The SQL files: one script that creates the tables, and named statements."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files


@cache
def schema() -> str:
    return _text("schema.sql")


@cache
def statement(name: str) -> str:
    """Return a statement of queries.sql without its comment, because sqlite3 checks the first word."""
    _, found, rest = _text("queries.sql").partition(f"-- name: {name}\n")
    if not found:
        raise KeyError(name)
    return re.sub(r"^--.*\n", "", rest.partition("-- name:")[0], flags=re.MULTILINE).strip()


def _text(file: str) -> str:
    return files("wire_sqlite").joinpath(file).read_text("utf-8")
