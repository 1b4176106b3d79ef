"""The child's side of a supervised worker: what it tells its parent, and when it leaves for another to take its place.

Two pipes lead from one to the other. Of the first the child has the read end, and nobody but the parent the write end:
at its end the parent is gone, however it went. Into the second the child writes one byte for each report.
"""

from __future__ import annotations

import contextlib
import enum
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

import attrs

from unstract_core.consumer import Consumer
from unstract_core.errors import ConfigurationError
from unstract_core.forking import reset_in_child
from unstract_core.observer import End, Observer, Turn
from unstract_core.transport import Delivery

VARIABLE = "UNSTRACT_WIRE_CHILD"
"""Holds the ends of a child's two pipes, and whether it is the first; the child takes it away before anything else."""

ABANDONED = 128 + signal.SIGKILL
MEGABYTE = 2**20
_OFTEN = 1.0


class Report(enum.Enum):
    """What a child tells its parent: that it has subscribed, that it lives, why it leaves for another."""

    STARTED = b"s"
    ALIVE = b"a"
    AWAY = b"w"
    MAX_TASKS = b"t"
    MAX_MEMORY = b"m"
    OVERDUE = b"o"

    @property
    def leaves(self) -> bool:
        return self in (Report.MAX_TASKS, Report.MAX_MEMORY, Report.OVERDUE)


class Parent:
    """The supervisor, as its child sees it. `first` tells that no child of it has ever started.

    `leaving` is why it was told to put another in the place of this one.
    """

    def __init__(self, life: int, reports: int, *, first: bool) -> None:
        self.first = first
        self.leaving: Report | None = None
        self._gone = False
        self._life = life
        self._reports = reports
        self._leave: Callable[[], None] = _terminate
        reset_in_child(self)
        for end in (life, reports):
            os.set_inheritable(end, False)  # what a task starts is none of ours
        os.set_blocking(reports, False)

    @classmethod
    def of_this_process(cls) -> Parent | None:
        """Return the parent that has started this process as its child; None where nobody has."""
        told = os.environ.pop(VARIABLE, "")  # what a task starts is no child of the supervisor
        if not told:
            return None
        life, reports, first = map(int, told.split(","))
        return cls(life, reports, first=bool(first))

    def tell(self, report: Report) -> None:
        """Report, without ever waiting: a parent that is stopped or gone reads nothing."""
        if report.leaves:
            self.leaving = report
        with contextlib.suppress(OSError):
            os.write(self._reports, report.value)

    def reset_in_child(self) -> None:
        """Close the pipes in a process that was forked from this one: it is no child of the supervisor."""
        for end in (self._life, self._reports):
            with contextlib.suppress(OSError):
                os.close(end)
        self._life = self._reports = -1

    def watch(self, grace: float) -> None:
        """Leave when the parent is gone: by SIGTERM, or by `leaves`; at once when that takes more than `grace` s."""
        threading.Thread(target=self._watch, args=[grace], name="unstract-wire-parent", daemon=True).start()

    def leaves(self, leave: Callable[[], None]) -> None:
        """Say how this process leaves from now on."""
        self._leave = leave

    def _watch(self, grace: float) -> None:
        while os.read(self._life, 1):
            pass
        self._gone = True
        self._leave()
        time.sleep(grace)
        self.end_group_if_gone()
        os._exit(ABANDONED)

    def end_group_if_gone(self) -> None:
        """Kill this process with whatever its tasks have started, where no parent is left to do so."""
        if self._gone and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@attrs.frozen
class Limits:
    """After how many tasks, or beyond how many bytes of memory, a child is replaced; None for never."""

    max_tasks: int | None = None
    max_memory: int | None = None

    def check(self) -> None:
        """Raise ConfigurationError where a child would be replaced after each task."""
        if self.max_memory is not None and (peak := peak_memory()) > self.max_memory:
            held, limit = peak / MEGABYTE, self.max_memory / MEGABYTE
            raise ConfigurationError(
                f"--max-memory {limit:g}: the worker has taken {held:.0f} MB before its first task; give it more"
            )


class Pulse(Observer):
    """Tells the parent that the consumer lives, and stops the consumer when it has reached a limit."""

    def __init__(self, parent: Parent, limits: Limits) -> None:
        self._consumer: Consumer | None = None
        self._parent = parent
        self._limits = limits
        self._told = 0.0

    def attend(self, consumer: Consumer) -> None:
        """Say which consumer it is. Raises ConfigurationError where it would be replaced after each task."""
        self._limits.check()
        self._consumer = consumer
        self._parent.leaves(consumer.stop)

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        limits = self._limits
        if self._counted("overdue"):
            self._stop(Report.OVERDUE)
        elif limits.max_tasks is not None and self._counted("ran") >= limits.max_tasks:
            self._stop(Report.MAX_TASKS)
        elif limits.max_memory is not None and peak_memory() > limits.max_memory:
            self._stop(Report.MAX_MEMORY)

    def turned(self, turn: Turn) -> None:
        if self._counted("overdue"):
            self._stop(Report.OVERDUE)
        if (now := time.monotonic()) - self._told >= _OFTEN:
            self._told = now
            self._parent.tell(Report.AWAY if turn.away else Report.ALIVE)

    def _counted(self, name: str) -> int:
        return 0 if self._consumer is None else self._consumer.counters[name]

    def _stop(self, why: Report) -> None:
        leaving = self._parent.leaving
        if self._consumer is None or leaving is Report.OVERDUE:
            return
        if leaving is None or why is Report.OVERDUE:  # a task that hangs is told also of a child that leaves
            self._parent.tell(why)
            self._consumer.stop()


def peak_memory() -> int:
    """Return the most memory that this program has had at once, in bytes."""
    if sys.platform == "linux":  # where what is asked for below goes on from the program that has started this one
        with contextlib.suppress(OSError), open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
