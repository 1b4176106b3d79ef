"""Worker processes, started by the real command, and signals that clean up.

After `leave_on_signals` the first Ctrl-C, SIGTERM or SIGHUP raises SystemExit in the main thread. Later ones are
ignored, so that the clean-up is not interrupted; it has to be short.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from examples.workers import Worker

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 20.0
URL_VARIABLE = "UNSTRACT_WIRE_URL"


def leave_on_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, _leave)


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, frame: object) -> NoReturn:
    ignore_signals()
    raise SystemExit(128 + number)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay a signal until the end of the block, which starts something that has to be recorded."""
    held: list[int] = []
    previous = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


class WorkerProcesses:
    """The worker processes of one demo on the transport at `url`; each logs to `<directory>/<name>.log`."""

    def __init__(self, url: str, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        own = {URL_VARIABLE: url, "PYTHONPATH": _importable(os.environ.get("PYTHONPATH"))}
        self._environment = {**os.environ, **environment, **own}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, worker: Worker) -> str:
        """Start a worker process and return its pid; `stop` ends it."""
        options = ["--app", worker.app, "--queue", worker.queue, "--concurrency", str(worker.threads)]
        with (self._directory / f"{worker.name}.log").open("wb") as log, uninterrupted():
            process = subprocess.Popen(
                [sys.executable, "-m", "unstract_core", "worker", *options],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            self._processes[worker.name] = process
        return f"pid {process.pid}"

    def ended(self) -> dict[str, int]:
        """Return the exit code of each worker that no longer runs."""
        return {name: code for name, process in self._processes.items() if (code := process.poll()) is not None}

    def stop(self) -> dict[str, int]:
        """Let every worker finish its tasks, kill one that takes too long, and return the exit codes."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return self.ended()


def _importable(path: str | None) -> str:
    return os.pathsep.join([str(ROOT), path] if path else [str(ROOT)])
