"""Phases at which a process stops on demand, so that a fault hits it exactly there.

The controller writes the name of a phase to a file; the process that comes to that phase writes `halted` into its
journal and stays there until the file is gone, or it is killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from chaos.journal import Journal

CLAIMED, RUNNING, FINISHED, SETTLING, SETTLED = "claimed", "running", "finished", "settling", "settled"
SENT = "sent"
"""The phases of a worker; and that of a producer whose message is accepted, and which has not written that down."""


class Breakpoints:
    """The side of the process."""

    def __init__(self, directory: Path, process: str, journal: Journal) -> None:
        self._path = request_file(directory, process)
        self._journal = journal

    def reach(self, phase: str, dispatches: Sequence[str]) -> None:
        """Stop here, if that was demanded, until it is demanded no longer."""
        if not dispatches or not self._is_requested(phase):
            return
        self._journal.write_all("stopped", dispatches, phase)
        while self._is_requested(phase):
            time.sleep(0.005)

    def _is_requested(self, phase: str) -> bool:
        try:
            return self._path.read_text() == phase
        except FileNotFoundError:
            return False


def request_file(directory: Path, process: str) -> Path:
    """The file in which the phase stands at which a process is to stop."""
    return directory / f"{process}.breakpoint"


def request(directory: Path, process: str, phase: str) -> None:
    """The controller's side: let a process stop when it next comes to this phase."""
    path = request_file(directory, process)
    fresh = path.with_suffix(".fresh")
    fresh.write_text(phase)
    os.replace(fresh, path)


def release(directory: Path, process: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        request_file(directory, process).unlink()
