"""Runs of the kit in a subprocess, over harnesses of these tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

TESTS_DIRECTORY = Path(__file__).resolve().parent.parent


@attrs.frozen
class FinishedRun:
    """The exit code, the output and the seconds of a run."""

    code: int
    text: str
    seconds: float

    @property
    def reported(self) -> int:
        """The number of reported tests."""
        return sum(map(int, re.findall(r"(\d+) (?:passed|failed|skipped|errors?)\b", self.text.splitlines()[-1])))


def run(
    arguments: Sequence[str], directory: Path, *, profile: str = "dev", limit: float = 380, **more: str
) -> FinishedRun:
    """Run the kit in a directory.

    Args:
        arguments: The arguments of pytest.
        directory: The working directory. Its modules can be imported.
        profile: The profile of the kit.
        limit: The time limit of the run, in seconds.
        more: Additional environment variables.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(directory), str(TESTS_DIRECTORY)]),
        "CONTRACT_TESTS_PROFILE": profile,
        **more,
    }
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "contract_tests", "-q", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    return FinishedRun(ended.returncode, ended.stdout + ended.stderr, time.monotonic() - started)
