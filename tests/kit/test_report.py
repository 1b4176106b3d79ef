"""The verdict on a run: only a complete run of the whole kit has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kit.bad_runs import Case, run_case

from contract_tests.report import Tally, verdict

WHOLE = {"test_a", "test_b"}


def tally(**other: object) -> Tally:
    return Tally(**{"tests": set(WHOLE), "passed": 2, **other})  # type: ignore[arg-type]


def test_a_complete_run_has_a_verdict() -> None:
    """A complete run without failures is conformant."""
    assert verdict(tally(), WHOLE) == "conformant with wire v1, kit 1.0: 2 passed, 0 not claimed"


@pytest.mark.parametrize(
    "part",
    [
        tally(tests={"test_a"}),
        tally(nodeids={"test_b[memory]"}),
        tally(deselected=1),
        tally(passed=0),
    ],
    ids=["a test is missing", "a test has not ended", "a case was deselected", "nothing passed"],
)
def test_an_incomplete_run_has_no_verdict(part: Tally) -> None:
    """A missing test, a missing case or an interrupted run gets no verdict."""
    assert verdict(part, WHOLE).startswith("no verdict on conformance")


def test_a_failure_takes_precedence_in_the_verdict() -> None:
    """A failed test decides the verdict, also if other tests were left out."""
    said = verdict(tally(failed={"x"}, nodeids={"y"}), WHOLE)
    assert said.startswith("NOT conformant with wire v1, kit 1.0: 1 failed")


def test_a_run_of_skipped_tests_fails(tmp_path: Path) -> None:
    """If the harness skips every test, for example without its server, the exit code is 1."""
    code = """
        import pytest
        class Away(Bad):
            def __enter__(self):
                pytest.skip("no server")
    """
    ended = run_case(Case(code=code, arguments=("--transport", "bad_harness:Away")), tmp_path / "run")
    assert ended.code == 1, sys.stderr.write(ended.text)
    assert "no server" in ended.text
    assert "no verdict on conformance" in ended.text
