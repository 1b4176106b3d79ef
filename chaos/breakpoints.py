"""Breakpoints: phases at which a process stops on request, so that a fault hits it exactly there.

The controller writes the name of a phase to a file. When the process reaches that phase, it writes `stopped` to its
journal, and waits until the file is removed or the process is killed.
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
"""The phases of a worker, and the phase of a producer after its message was accepted and before it is recorded."""


class Breakpoints:
    """The breakpoints of one process, used by that process."""

    def __init__(self, directory: Path, process: str, journal: Journal) -> None:
        self._path = request_file(directory, process)
        self._journal = journal

    def reach(self, phase: str, dispatches: Sequence[str]) -> None:
        """Stop at this phase for as long as the controller requests it."""
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
    """Return the file with the phase at which a process should stop."""
    return directory / f"{process}.breakpoint"


def request(directory: Path, process: str, phase: str) -> None:
    """Request that a process stops when it next reaches this phase. For the controller."""
    path = request_file(directory, process)
    fresh = path.with_suffix(".fresh")
    fresh.write_text(phase)
    os.replace(fresh, path)


def release(directory: Path, process: str) -> None:
    """Let a stopped process continue. For the controller."""
    with contextlib.suppress(FileNotFoundError):
        request_file(directory, process).unlink()
