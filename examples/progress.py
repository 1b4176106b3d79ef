"""Progress events: each worker appends one line of JSON to a file that the demo reads.

The product pushes WebSocket events to a browser instead. Each line is one write, so that the lines of several processes
never mix.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

EVENTS_VARIABLE = "UNSTRACT_DEMO_EVENTS"

Stage: TypeAlias = Literal["running", "done", "failed"]


@attrs.frozen
class Event:
    """One step of the run `run_id` in the task `task` of the worker process `pid`."""

    stage: Stage
    run_id: str
    task: str
    pid: int
    details: dict[str, Any]


def report(stage: Stage, run_id: str, task: str, **details: Any) -> None:
    """Append an event to the file of the environment variable; without it, do nothing."""
    if (path := os.environ.get(EVENTS_VARIABLE)) is None:
        return
    event = Event(stage, run_id, task, os.getpid(), details)
    line = json.dumps(attrs.asdict(event), ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class Follower:
    """Reads an events file from its last position."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._read = 0

    def new(self) -> list[Event]:
        """Return the events that were completed since the last call."""
        with self._path.open("rb") as events:
            events.seek(self._read)
            lines = events.read().rpartition(b"\n")[0]
        if not lines:
            return []
        self._read += len(lines) + 1
        return [Event(**json.loads(line)) for line in lines.splitlines()]
