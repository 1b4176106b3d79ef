"""The kit run in a subprocess, over harnesses of these tests."""

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
class Ended:
    """A run that has ended: its exit code, all that it printed, and the seconds that it took."""

    code: int
    text: str
    seconds: float

    @property
    def reported(self) -> int:
        """How many tests were reported."""
        return sum(map(int, re.findall(r"(\d+) (?:passed|failed|skipped|errors?)\b", self.text.splitlines()[-1])))


def run(arguments: Sequence[str], directory: Path, *, profile: str = "dev", limit: float = 380, **more: str) -> Ended:
    """Run the kit in a directory, whose modules it can import beside those of these tests.

    It is given `limit` seconds, and `more` variables of the environment.
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
    return Ended(ended.returncode, ended.stdout + ended.stderr, time.monotonic() - started)
