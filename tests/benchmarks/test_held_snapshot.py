"""The benchmarks of old snapshots and table sizes run. Their rates depend on the machine and are not asserted."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tools.check_lock import ROOT


def ended(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_held_snapshot_benchmark_prints_rates_and_decays() -> None:
    """Each case has a rate in every turn and a decay; the ratios are of the same run."""
    done = ended("benchmarks/held_snapshot.py", "--seconds", "2", "--turn", "0.5", "--batch", "20")
    assert done.returncode == 0, done.stderr
    headings, *turns = done.stdout.splitlines()
    assert headings.split() == ["held/s", "settled", "free/s", "settled", "whole/s", "settled"]
    for line in turns[:4]:
        assert re.fullmatch(r" +\d+ s( +[\d,]+){6}", line)
    for name, line in zip(("held", "free", "whole"), turns[4:7], strict=True):
        assert re.fullmatch(rf"{name} +[\d,]+ -> +[\d,]+ messages/s   decay +-?[\d.]+%", line)
    assert [line.partition(":")[0] for line in turns[7:]] == [
        "held beside free",
        "whole beside free",
        "held / whole, at the end",
    ]


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_growing_sizes_are_a_failure() -> None:
    """Without any slack, a short run names a table that grew, and the exit code is 1."""
    done = ended("benchmarks/table_sizes.py", "--tasks", "20000", "--warm-up", "1", "--slack", "0.01")
    assert done.returncode == 1, done.stderr
    assert "pg_queue_message was " in done.stdout


def test_constant_sizes_are_flat() -> None:
    """A short run with enough slack exits with 0."""
    done = ended("benchmarks/table_sizes.py", "--tasks", "2000", "--slack", "1000")
    assert done.returncode == 0, done.stderr
    headings, *parts, verdict = done.stdout.splitlines()
    assert "queue_message_ready" in headings
    assert len(parts) == 10
    assert verdict == "flat"
