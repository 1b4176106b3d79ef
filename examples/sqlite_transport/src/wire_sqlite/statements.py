"""The SQL, which stands in files that a DBA can read: one script that makes the tables, and named statements."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files


@cache
def schema() -> str:
    return _text("schema.sql")


@cache
def statement(name: str) -> str:
    """Return a statement of queries.sql without its comment: sqlite3 looks at the first word to see what it is."""
    _, found, rest = _text("queries.sql").partition(f"-- name: {name}\n")
    if not found:
        raise KeyError(name)
    return re.sub(r"^--.*\n", "", rest.partition("-- name:")[0], flags=re.MULTILINE).strip()


def _text(file: str) -> str:
    return files("wire_sqlite").joinpath(file).read_text("utf-8")
