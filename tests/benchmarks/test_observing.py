"""The benchmark of observers runs. The costs depend on the machine and are not asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tools.check_lock import ROOT


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_observer_benchmark_prints_the_cost_of_each() -> None:
    """The rate and processor time with each observer are printed as ratios to those without, for each operation."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/observing.py", "--scale", "0.01", "--rounds", "1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    headings, *lines = ended.stdout.splitlines()
    assert headings.split() == ["a", "second", "ratio", "of", "medians", "processor", "ratio"]
    assert [line for line in lines if not line.startswith(" ")] == [
        "send, one by one",
        "drain no-op tasks",
        "drain chains (task + callback)",
    ]
    figures = r"  with (.+?) +[\d,]+ +\d+\.\d\d +\d+\.\d\d +\d+ us +\d+\.\d\d"
    observers = [found[1] for line in lines if (found := re.fullmatch(figures, line))]
    assert observers == ["no observer", "an Observer", "Metrics", "Tracing, no SDK", "Tracing"] * 3
