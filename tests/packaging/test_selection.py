"""The tests that `make test` leaves out: CONTRIBUTING.md lists each, and no guarantee of README depends on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any, TypeAlias

import pytest

from tools.check_lock import ROOT

GUARANTEES = re.findall(
    r"\[`(test_\w+)`\]\(((?:contract_)?tests/[\w/]+\.py)\)", (ROOT / "README.md").read_text(encoding="utf-8")
)

Collected: TypeAlias = list[dict[str, Any]]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Every test of the project, with the keywords of its marker `slow`."""
    file = tmp_path_factory.mktemp("collected") / "tests.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--slow", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "-p", "collecting"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "COLLECTED": str(file)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    found: Collected = json.loads(file.read_text(encoding="utf-8"))
    return found


def entry(test: dict[str, Any]) -> tuple[str, str]:
    """Return the row of CONTRIBUTING.md for a slow test: its variant or its name, and the reason."""
    named = f"`{test['collected_in']}::{test['name']}`"
    return test["slow"].get("variant", named), test["slow"]["reason"]


@pytest.mark.parametrize(("name", "path"), GUARANTEES, ids=[name for name, _ in GUARANTEES])
def test_make_test_runs_each_guarantee_of_readme(collected: Collected, name: str, path: str) -> None:
    """At least one case is selected, and only cases over another server may be left out."""
    cases = [test["slow"] for test in collected if (test["name"], test["file"]) == (name, path)]
    assert None in cases
    assert all(slow is None or "variant" in slow for slow in cases)


def test_contributing_lists_each_slow_test(collected: Collected) -> None:
    """The table of CONTRIBUTING.md has one row for each test or variant that is marked, with the marker's reason."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("\n| tests | reason |\n| --- | --- |\n")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| (.+?) \| (.+) \|$", rows, re.MULTILINE)
    marked = list(dict.fromkeys(entry(test) for test in collected if test["slow"] is not None))
    assert sorted(listed) == sorted(marked), "\n".join(f"| {what} | {why} |" for what, why in sorted(marked))
