"""Short chaos runs: a sound one passes, and one with a planted bug fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import servers

from chaos.environments import unavailable_reason

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _a_server_can_be_started() -> None:
    if missing := unavailable_reason("postgresql"):
        servers.miss(missing)


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run chaos; check and remove the journals that it keeps if the ledger does not hold."""
    command = [sys.executable, "-m", "chaos", "--seed", "7", "--transport", "postgresql", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    if kept := re.search(r"^journals and logs are kept in (.*)$", ended.stdout, re.MULTILINE):
        assert list(Path(kept[1]).glob("producer-1.*.journal"))
        shutil.rmtree(kept[1])
    assert bool(kept) == ("THE LEDGER DOES NOT HOLD" in ended.stdout)
    return ended


def test_a_sound_run_holds_and_prints_its_seed() -> None:
    """The exit code is 0, each fault has a row, and the command that repeats the run is printed."""
    ended = chaos("--only", "kill-settling,kill-callback")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = ended.stdout.splitlines()
    assert said[0] == "seed 7"
    assert said[-1].startswith("seed 7: python -m chaos --seed 7 ")
    assert "the ledger holds" in said
    for fault in ("kill-settling", "kill-callback"):
        assert re.search(rf"^{fault} +1 +0 +0 ", ended.stdout, re.MULTILINE)


@pytest.mark.slow(reason="It runs for half a minute; `make test` has the test of the other planted bug.")
def test_a_settlement_in_two_commits_loses_callbacks() -> None:
    """The ledger finds the planted bug: a worker killed between its two commits loses the callback."""
    ended = chaos("--only", "kill-settled", "--plant", "two-commits")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"^kill-settled +1 +[1-9]", ended.stdout, re.MULTILINE)
    assert "WRONG: lost: " in ended.stdout
    assert "THE LEDGER DOES NOT HOLD" in ended.stdout


def test_a_second_follow_up_is_found() -> None:
    """The ledger finds the planted bug: a follow-up that is sent twice. No fault excuses it."""
    ended = chaos("--only", "sigterm", "--plant", "two-follow-ups")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "WRONG: doubled: " in ended.stdout
    assert "THE LEDGER DOES NOT HOLD" in ended.stdout


def test_an_unknown_fault_is_a_usage_error() -> None:
    """The error lists the known faults."""
    ended = chaos("--only", "earthquake")
    assert ended.returncode == 2
    assert "no such fault: earthquake; choose from " in ended.stderr
