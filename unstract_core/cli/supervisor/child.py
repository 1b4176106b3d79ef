"""The child's side of a supervised worker: its reports to its parent, and when it leaves for another to take its place.

Two pipes connect them. From the first the child reads one byte for each order. Only the parent has its write end, so
the end of this pipe means that the parent has ended. Into the second the child writes one byte for each report.
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
from collections.abc import Callable, Iterable

import attrs

from unstract_core.errors import ConfigurationError
from unstract_core.forking import reset_in_child
from unstract_core.observability.observer import End, Observer, Turn
from unstract_core.transport import Delivery
from unstract_core.worker.consumer import Consumer

VARIABLE = "UNSTRACT_WIRE_CHILD"
"""Holds the ends of a child's two pipes and its `Role`; the child takes it away before anything else."""

ABANDONED = 128 + signal.SIGKILL
MEGABYTE = 2**20
_OFTEN = 1.0
_HEAD_START = 2.0
"""How much longer than this child another one may take to prepare, and be ready in time."""
_MOST_OF = 0.8
_SPARE_WAITS = 300.0
"""For how many seconds a spare child is kept while this child comes no nearer to a limit."""
_MOST_FILES = 2**16
"""The highest file number that is looked at where the system does not list the files of a process."""


class Order(enum.Enum):
    """Orders of a parent to its child: to stop, and to subscribe in the place of another child."""

    STOP = b"q"
    TAKE_OVER = b"g"


@attrs.frozen
class Role:
    """The part of a child among the children of its parent.

    Args:
        first: Whether no child has started yet: what cannot work then never will.
        silent: Whether another child reports what cannot work, so that it is reported once.
        spare: Whether it waits for `Order.TAKE_OVER` before it subscribes.
        share: The part of its limit of tasks by which it is replaced earlier, so that children do not leave together.
    """

    first: bool
    silent: bool = False
    spare: bool = False
    share: float = 0.0

    def __str__(self) -> str:
        return f"{int(self.first)},{int(self.silent)},{int(self.spare)},{self.share}"

    @classmethod
    def of(cls, text: str) -> Role:
        first, silent, spare, share = text.split(",")
        return cls(first == "1", silent == "1", spare == "1", float(share))


class ChildReport(enum.Enum):
    """Reports of a child to its parent: that it has subscribed, that it lives, why it leaves for another."""

    READY = b"r"
    """A spare child has prepared."""
    LIMIT_NEAR = b"n"
    """A limit is near: a spare child has to prepare."""
    SPARE_UNNEEDED = b"u"
    """No spare child is needed any more."""

    STARTED = b"s"
    ALIVE = b"a"
    UNAVAILABLE = b"w"
    MAX_TASKS = b"t"
    MAX_MEMORY = b"m"
    OVERDUE = b"o"

    @property
    def ends_child(self) -> bool:
        return self in (ChildReport.MAX_TASKS, ChildReport.MAX_MEMORY, ChildReport.OVERDUE)


class Parent:
    """The supervisor, as its child sees it.

    Attributes:
        first: Whether no child of this supervisor has ever started.
        leaving: Why this child has asked for another one in its place; None while it stays.
        born: When this process began, on the monotonic clock.
        preparation: Seconds from then until this process could subscribe.
    """

    def __init__(self, life: int, reports: int, *, first: bool, role: Role | None = None, guard: int = -1) -> None:
        self.first = first
        self.role = role or Role(first)
        self.leaving: ChildReport | None = None
        self.born = time.monotonic()
        self.preparation = 0.0
        self._take_over = threading.Event()
        self._gone = False
        self._life = life
        self._reports = reports
        self._guard = guard
        self._leave: Callable[[], None] = _terminate
        reset_in_child(self)
        for end in (life, reports):
            os.set_inheritable(end, False)  # what a task starts is none of ours
        os.set_blocking(reports, False)

    @classmethod
    def of_this_process(cls) -> Parent | None:
        """Return the parent that has started this process as its child; None for any other process."""
        told = os.environ.pop(VARIABLE, "")  # what a task starts is no child of the supervisor
        if not told:
            return None
        *ends, rest = told.split(",", 4)
        life, reports, watched, guard = map(int, ends)
        role = Role.of(rest)
        _guard_group(watched, guard)
        os.set_inheritable(guard, False)
        return cls(life, reports, first=role.first, role=role, guard=guard)

    def wait_for_turn(self, seconds: float) -> bool:
        """Report that this child is ready; return whether it is to take over, after so many seconds at the latest."""
        self.preparation = self.preparation or time.monotonic() - self.born
        if not self.role.spare or self._take_over.is_set():
            return True
        self.report(ChildReport.READY)
        return self._take_over.wait(seconds)

    def report(self, report: ChildReport) -> None:
        """Report, without ever waiting: a parent that is stopped or gone reads nothing."""
        if report.ends_child:
            self.leaving = report
        with contextlib.suppress(OSError):
            os.write(self._reports, report.value)

    def is_replaced(self) -> bool:
        """Whether another child takes the place of this one."""
        return self.leaving is not None

    def report_started(self) -> None:
        """Report that the consumer has subscribed."""
        self.report(ChildReport.STARTED)

    def report_unavailable(self) -> None:
        """Report that the child waits for a transport that is unavailable."""
        self.report(ChildReport.UNAVAILABLE)

    def reset_in_child(self) -> None:
        """Close the pipes in a process that was forked from this one: it is no child of the supervisor."""
        for end in (self._life, self._reports, self._guard):
            with contextlib.suppress(OSError):
                os.close(end)
        self._life = self._reports = self._guard = -1

    def watch(self, grace: float) -> None:
        """Leave when the parent is gone: by SIGTERM, or by `leaves`; at once when that takes more than `grace` s."""
        threading.Thread(target=self._watch, args=[grace], name="unstract-wire-parent", daemon=True).start()

    def on_stop(self, leave: Callable[[], None]) -> None:
        """Say how this process leaves from now on."""
        self._leave = leave

    def _watch(self, grace: float) -> None:
        while order := os.read(self._life, 1):
            if order == Order.TAKE_OVER.value:
                self._take_over.set()
            elif order == Order.STOP.value and self._leave is not _terminate:
                self._leave()  # a task may have its own handler of the signal that comes as well, or never look
        self._gone = True
        self._leave()
        time.sleep(grace)
        self.end_group_if_gone()
        os._exit(ABANDONED)

    def end_group_if_gone(self) -> None:
        """Kill this process and the programs that its tasks have started, where no parent is left to do so."""
        if self._gone and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)


def _guard_group(watched: int, guard: int) -> None:
    """Start a process that ends this one's group when this process and its parent are gone, however they went.

    It waits at `watched` for the end of a pipe whose other end, `guard`, the two hold open. A byte in the pipe means
    that nothing is to be ended. It is in the group itself, so that the group is there to be signalled, and it is no
    child of this process, so that a task that waits for all its children does not wait for it.
    """
    if os.getpgrp() == os.getpid():
        middle = os.fork()
        if middle == 0:
            try:
                if os.fork() == 0:
                    _guard(watched, guard)
            finally:
                os._exit(0)
        os.waitpid(middle, 0)
    os.close(watched)


def _guard(watched: int, guard: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.close(guard)  # it would wait for itself
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for end in _open_files():
        if end not in (0, 1, 2, watched):
            with contextlib.suppress(OSError):
                os.close(end)
    if not os.read(watched, 1):
        os.killpg(0, signal.SIGKILL)


def _open_files() -> Iterable[int]:
    """Return the numbers of the files that this process has open, and perhaps of some that it has not."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/dev/fd")]
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return range(min(limit, _MOST_FILES) if limit >= 0 else _MOST_FILES)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@attrs.frozen
class RecycleLimits:
    """After how many tasks, or beyond how many bytes of memory, a child is replaced; None for never."""

    max_tasks: int | None = None
    max_memory: int | None = None

    def for_share(self, share: float) -> RecycleLimits:
        """Return the limits with up to half of the tasks less, by `share` from 0 to 1."""
        if self.max_tasks is None:
            return self
        return attrs.evolve(self, max_tasks=self.max_tasks - int(self.max_tasks * share / 2))

    def check(self) -> None:
        """Raise ConfigurationError where a child would be replaced after each task."""
        if self.max_memory is not None and (peak := peak_memory()) > self.max_memory:
            held, limit = peak / MEGABYTE, self.max_memory / MEGABYTE
            raise ConfigurationError(
                f"--max-memory {limit:g}: the worker has taken {held:.0f} MB before its first task; give it more"
            )


class Heartbeat(Observer):
    """Reports to the parent that the consumer lives, and stops the consumer when it has reached a limit."""

    def __init__(self, parent: Parent, limits: RecycleLimits) -> None:
        self._consumer: Consumer | None = None
        self._parent = parent
        self._limits = limits.for_share(parent.role.share)
        self._reported_at = 0.0
        self._started_at = 0.0
        self._memory = 0
        self._near_since: float | None = None

    def attach(self, consumer: Consumer) -> None:
        """Say which consumer it is. Raises ConfigurationError where it would be replaced after each task."""
        self._limits.check()
        self._memory = peak_memory() if self._limits.max_memory is not None else 0
        self._consumer = consumer
        self._parent.on_stop(consumer.stop)

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        limits = self._limits
        self._started_at = self._started_at or time.monotonic()
        if self._count("overdue"):
            self._stop(ChildReport.OVERDUE)
        elif limits.max_tasks is not None and self._count("ran") >= limits.max_tasks:
            self._stop(ChildReport.MAX_TASKS)
        elif limits.max_memory is not None and peak_memory() > limits.max_memory:
            self._stop(ChildReport.MAX_MEMORY)
        elif self._near_since is None and self._is_limit_near():
            self._note_limit_near()
            self._parent.report(ChildReport.LIMIT_NEAR)

    def _note_limit_near(self) -> None:
        """Note that a limit is near. From now on memory counts as near when most of the rest has been taken too."""
        self._near_since = time.monotonic()
        if self._limits.max_memory is not None:
            self._memory = peak_memory()

    def _withdraw_spare(self) -> None:
        """Report that no spare child is needed, if the limit that was near has come no nearer for some minutes.

        The peak of memory never falls: a child whose peak stays below the limit would keep its spare for ever.
        """
        if self._near_since is None or self._parent.leaving is not None:
            return
        if time.monotonic() - self._near_since < _SPARE_WAITS:
            return
        if self._is_limit_near():
            self._note_limit_near()
        else:
            self._near_since = None
            self._parent.report(ChildReport.SPARE_UNNEEDED)

    def _is_limit_near(self) -> bool:
        """Whether another child has to prepare now, to be ready when this one reaches a limit."""
        limits, now = self._limits, time.monotonic()
        if limits.max_tasks is not None and self._consumer is not None:
            ran = self._count("ran")
            rate = ran / max(now - self._started_at, _OFTEN)
            ahead = rate * (self._parent.preparation * _HEAD_START + _OFTEN) + self._consumer.concurrency
            if limits.max_tasks - ran <= ahead:
                return True
        if limits.max_memory is not None:
            return peak_memory() > self._memory + (limits.max_memory - self._memory) * _MOST_OF
        return False

    def turned(self, turn: Turn) -> None:
        self._started_at = self._started_at or time.monotonic()
        if self._count("overdue"):
            self._stop(ChildReport.OVERDUE)
        if (now := time.monotonic()) - self._reported_at >= _OFTEN:
            self._reported_at = now
            self._parent.report(ChildReport.UNAVAILABLE if turn.away else ChildReport.ALIVE)
            self._withdraw_spare()

    def _count(self, name: str) -> int:
        return 0 if self._consumer is None else self._consumer.counters[name]

    def _stop(self, why: ChildReport) -> None:
        leaving = self._parent.leaving
        if self._consumer is None or leaving is ChildReport.OVERDUE:
            return
        if leaving is None or why is ChildReport.OVERDUE:  # reported also when the child leaves already
            self._parent.report(why)
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
