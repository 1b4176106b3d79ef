"""The measurement of a worker's memory runs, and finds a leak."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tools.check_lock import ROOT

TRANSPORTS = ("memory", "postgresql")


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_worker_memory_is_flat_over_many_tasks() -> None:
    """Over both transports, memory grows by at most 5 MiB in 20,000 tasks after a warm-up."""
    ended = measure()
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    for name in TRANSPORTS:
        samples = [line for line in lines if re.fullmatch(rf"{name} +[\d,]+ tasks +[\d.]+ MiB(  warm-up)?", line)]
        assert len(samples) >= 9
        grows = rf"{name} +grows by -?[\d.]+ MiB, from [\d.]+ to [\d.]+: flat, for 5.0 MiB are allowed"
        assert sum(bool(re.fullmatch(grows, line)) for line in lines) == 1


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_a_leak_per_task_is_found() -> None:
    """Over both transports, a leak of 1 KiB per task is found, and the exit code is 1."""
    ended = measure("--leak", "1024")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert re.findall(r"^(\w+) +grows by .* NOT FLAT", ended.stdout, re.MULTILINE) == list(TRANSPORTS)


def measure(*options: str) -> subprocess.CompletedProcess[str]:
    short = ["--tasks", "20000", "--every", "2000", "--warm-up", "4000", "--bound", "5"]
    return subprocess.run(
        [sys.executable, "benchmarks/worker_memory.py", *short, *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
