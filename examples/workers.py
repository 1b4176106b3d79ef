"""The workers of a demo, whether they are processes (processes.py) or threads (threads.py)."""

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.frozen
class Worker:
    """What a worker is to do: run the tasks of `app` ("module:name") that come to `queue`, on `threads` threads."""

    name: str
    app: str
    queue: str
    threads: int


class Workers(Protocol):
    """Those that were started. Exit codes are by the worker's name."""

    def start(self, worker: Worker) -> str:
        """Start a worker and say where it runs; it is stopped by `stop`, whatever happens meanwhile."""

    def ended(self) -> dict[str, int]:
        """Return the exit code of each worker that is no longer running."""

    def stop(self) -> dict[str, int]:
        """Let every worker finish what it runs and leave, and return their exit codes. May be called again."""
