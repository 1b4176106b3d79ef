"""The processes of a run: they are started, supervised, hit by faults, and restarted after their end.

Each slot ("executor-2") has one process at a time. A process has the name of its slot and a counter ("executor-2.1");
its journal and its connections have that name, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from chaos import ROOT, messages
from chaos.history import History
from chaos.journal import Journals
from chaos.schedule import CALLBACKS, EXECUTORS, PRODUCERS, SLOTS

MAX_WAIT = 60.0
"""Seconds to wait for an expected event, on a busy machine."""
_GRACE = 30.0
"""Seconds within which a process must exit after SIGTERM."""
_PAUSE = 0.5
"""Seconds between two starts in a slot: a process that starts while the server is stopped exits at once."""


@attrs.define(eq=False)
class Process:
    """A process of a run."""

    name: str
    popen: subprocess.Popen[bytes]
    started: float
    told_to_end: bool = False
    """Whether a signal was sent that ends it."""

    @property
    def pid(self) -> int:
        return self.popen.pid


class Processes:
    """The processes of a run, and their journals. `problems` lists unexpected exits."""

    def __init__(self, directory: Path, url_of: Callable[[str], str], *, plant: str | None = None) -> None:
        self.directory = directory
        self.history = History()
        self.problems: list[str] = []
        self._journals = Journals(directory)
        self._url_of = url_of
        self._plant = plant
        self._running: dict[str, Process] = {}
        self._generations: dict[str, int] = dict.fromkeys(SLOTS, 0)

    def start(self) -> None:
        for slot in SLOTS:
            self._start(slot)
        self.require(lambda: all(map(self.is_ready, SLOTS)), "the processes to be ready")

    def __getitem__(self, slot: str) -> Process:
        return self._running[slot]

    def is_ready(self, slot: str) -> bool:
        return slot in self._running and self._running[slot].name in self.history.processes

    def ready(self, slot: str) -> Process:
        """Wait until the process in a slot is ready, and return it."""
        self.require(lambda: self.is_ready(slot), f"a process in {slot} to be ready")
        return self._running[slot]

    def signal(self, process: Process, number: signal.Signals) -> None:
        process.told_to_end = process.told_to_end or number in (signal.SIGKILL, signal.SIGTERM)
        os.kill(process.pid, number)

    def kill(self, process: Process) -> float:
        """Kill a process, wait for its end, and return the time of the signal."""
        now = time.monotonic()
        self.signal(process, signal.SIGKILL)
        process.popen.wait(MAX_WAIT)
        self.read()
        return now

    def terminate(self, process: Process) -> None:
        """Send SIGTERM to a process and wait for its end. A late or failed exit is recorded as a problem."""
        self.signal(process, signal.SIGTERM)
        self._await_end(process)

    def stop(self, slots: Sequence[str]) -> None:
        """Send SIGTERM to the processes in these slots and wait; do not restart them."""
        leaving = [self._running.pop(slot) for slot in slots if slot in self._running]
        for process in leaving:
            if process.popen.poll() is None:
                self.signal(process, signal.SIGTERM)
        for process in leaving:
            self._await_end(process)

    def close(self) -> None:
        """Kill every process that still runs."""
        for process in self._running.values():
            process.popen.kill()
            process.popen.wait()
        self._running.clear()

    def supervise(self) -> None:
        """Read the journals, and restart processes that have ended."""
        self.read()
        for slot, process in list(self._running.items()):
            code = process.popen.poll()
            if code is None or time.monotonic() - process.started < _PAUSE:
                continue
            if not process.told_to_end and process.name in self.history.processes:
                self.problems.append(f"{process.name} exited unexpectedly with code {code}; {self._log_tail(process)}")
            self._start(slot)

    def read(self) -> None:
        for line in self._journals.read_new():
            self.history.add(line)

    def pause(self, seconds: float) -> None:
        """Supervise the processes for some seconds."""
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() >= until, seconds + MAX_WAIT)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Supervise the processes until a condition holds; return False if it does not within some seconds."""
        until = time.monotonic() + seconds
        while True:
            self.supervise()
            if condition():
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)

    def require(self, condition: Callable[[], bool], what: str) -> None:
        """Supervise the processes until a condition holds.

        Raises:
            TimeoutError: The condition did not hold within `MAX_WAIT` seconds.
        """
        if not self.wait_for(condition, MAX_WAIT):
            raise TimeoutError(f"waited {MAX_WAIT:g} s in vain for {what}; see the logs in {self.directory}")

    def _start(self, slot: str) -> None:
        self._generations[slot] += 1
        name = f"{slot}.{self._generations[slot]}"
        options = ["--name", name, "--url", self._url_of(name), "--directory", str(self.directory)]
        with (self.directory / f"{name}.log").open("wb") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", *self._program(slot), *options],
                cwd=ROOT,
                env=_environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running[slot] = Process(name, popen, time.monotonic())

    def _program(self, slot: str) -> list[str]:
        if slot in PRODUCERS:
            return ["chaos.producer"]
        planted = ["--plant", self._plant] if self._plant is not None and slot in EXECUTORS else []
        queue, threads = (messages.CALLBACK_QUEUE, "2") if slot in CALLBACKS else (messages.EXECUTOR_QUEUE, "4")
        return ["chaos.worker", "--queue", queue, "--concurrency", threads, *planted]

    def _await_end(self, process: Process) -> None:
        try:
            code = process.popen.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
            self.problems.append(
                f"{process.name} did not exit within {_GRACE:g} s after SIGTERM; {self._log_tail(process)}"
            )
        else:
            if code and process.name in self.history.processes:
                self.problems.append(f"{process.name} exited with code {code} after SIGTERM; {self._log_tail(process)}")
        self.read()

    def _log_tail(self, process: Process) -> str:
        lines = (self.directory / f"{process.name}.log").read_text(errors="replace").splitlines()
        return f"its log ends with: {' | '.join(lines[-3:])}"


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH", "")]))
    return {**given, "PYTHONPATH": path}
