"""The benchmark works. How fast anything is depends on the machine and is asserted nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tools.check_lock import ROOT

RATES = ("send, one by one", "send, 1000 at once", "drain no-op tasks", "drain chains (task + callback)")


def test_the_benchmark_prints_every_figure_with_its_ratio() -> None:
    """At a tiny scale it ends with 0 and without a warning; each rate has best, median and ratio to raw SQL."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "--scale", "0.01", "--rounds", "1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    version, headings, *lines = ended.stdout.splitlines()
    assert version.startswith("PostgreSQL ")
    assert headings.split() == ["ours", "median", "raw", "SQL", "median", "ratio", "raw", "is"]
    for name, line in zip(RATES, lines[:-1], strict=True):
        assert re.fullmatch(rf"{re.escape(name)} +([\d,]+ +){{4}}\d+\.\d\d   \S.*", line)
    assert re.fullmatch(
        r"idle chain, dispatch to callback +[\d.]+ ms p50 +[\d.]+ ms p99 .* raw single inserts\).*", lines[-1]
    )
