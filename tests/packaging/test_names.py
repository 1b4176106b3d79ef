"""The names of tests are short enough to be read in a list."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.check_lock import ROOT


def names() -> Iterator[str]:
    for part in ("tests", "contract_tests", "examples"):
        for path in (ROOT / part).rglob("test_*.py"):
            yield from re.findall(r"^\s*def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_test_names_are_short() -> None:
    """A test name has at most eight words after `test_`, and at most 80 characters."""
    found = list(names())
    assert len(found) > 1000
    assert [name for name in found if len(name) > 80 or name.removeprefix("test_").count("_") > 7] == []
