"""The workers of a demo, which are processes (processes.py) or threads (threads.py)."""

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.frozen
class Worker:
    """A worker: runs the tasks of `app` ("module:name") from `queue` on `threads` threads."""

    name: str
    app: str
    queue: str
    threads: int


class Workers(Protocol):
    """The started workers; exit codes are by the worker's name."""

    def start(self, worker: Worker) -> str:
        """Start a worker and return its place; `stop` ends it."""

    def ended(self) -> dict[str, int]:
        """Return the exit code of each worker that no longer runs."""

    def stop(self) -> dict[str, int]:
        """Let every worker finish its tasks, and return their exit codes; may be called again."""
