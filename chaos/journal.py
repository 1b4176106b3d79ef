"""Journals: each process records its events, one line each, in its own file.

Each line is one write to a file opened for appending, so a killed process loses no written line. Times are of the
machine's monotonic clock, which all processes share.
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
    """An event of a process. `dispatch` is "" for an event without dispatch."""

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
        """Write a line for each dispatch, in one write."""
        with self._lock:
            now = time.monotonic()
            lines = "".join(f"{now:.6f}\t{event}\t{dispatch}\t{detail}\n" for dispatch in dispatches)
            os.write(self._file, lines.encode())


class Journals:
    """Reads the journals of a directory as they grow. An unfinished line is left for the next read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}

    def read_new(self) -> Iterator[Line]:
        """Yield the lines written since the last call, journal by journal."""
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
