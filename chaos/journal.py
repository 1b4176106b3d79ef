"""What each process writes down: one line for each thing that happened, in a file of its own.

A line is one write to a file that is opened for appending, so a process that is killed loses nothing that it has
written. Times are the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

SUFFIX = ".journal"


@attrs.frozen
class Line:
    """What a process did to a dispatch, and when; `dispatch` is "" for what concerns none."""

    at: float
    process: str
    event: str
    dispatch: str = ""
    detail: str = ""


class Journal:
    """The journal of one process. Thread-safe."""

    def __init__(self, directory: Path, process: str) -> None:
        path = directory / f"{process}{SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()

    def write(self, event: str, dispatch: str = "", detail: object = "") -> None:
        self.write_all(event, [dispatch], detail)

    def write_all(self, event: str, dispatches: Iterable[str], detail: object = "") -> None:
        """Write a line for each dispatch, all of them at once."""
        with self._lock:
            now = time.monotonic()
            lines = "".join(f"{now:.6f}\t{event}\t{dispatch}\t{detail}\n" for dispatch in dispatches)
            os.write(self._file, lines.encode())


class Journals:
    """Follows the journals of a directory; a line counts once its end is written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}

    def read_new(self) -> Iterator[Line]:
        """Yield what was written since this was last asked, journal by journal."""
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            process = path.name.removesuffix(SUFFIX)
            for text in whole.decode().splitlines():
                at, event, dispatch, detail = text.split("\t")
                yield Line(float(at), process, event, dispatch, detail)
