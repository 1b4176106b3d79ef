"""The heartbeat of a child: once a second it reports that the consumer is alive, and whether it reaches a limit."""

from __future__ import annotations

import time

from unstract_core.cli.supervisor.child import Parent
from unstract_core.cli.supervisor.protocol import ChildReport
from unstract_core.cli.supervisor.recycle_limits import RecycleLimits, peak_memory
from unstract_core.observability.observer import Observer, TaskFinished, WorkerHeartbeat
from unstract_core.worker.consumer import Consumer

_INTERVAL = 1.0
_HEAD_START = 2.0
"""A spare child gets this multiple of this child's own preparation time, so that it is ready early enough."""
_NEAR = 0.8
"""The part of the memory limit from which on the limit is near."""
_SPARE_TIMEOUT = 300.0
"""Seconds for which a spare child is kept while this child gets no closer to a limit."""


class Heartbeat(Observer):
    """Reports to the supervisor, and stops the consumer when it has reached a limit."""

    def __init__(self, parent: Parent, limits: RecycleLimits) -> None:
        self._consumer: Consumer | None = None
        self._parent = parent
        self._limits = limits.for_share(parent.role.share)
        self._reported_at = 0.0
        self._started_at = 0.0
        self._memory = 0
        self._near_since: float | None = None

    def attach(self, consumer: Consumer) -> None:
        """Set the consumer to monitor. Raises ConfigurationError if each task would replace this child."""
        self._limits.check()
        self._memory = peak_memory() if self._limits.max_memory is not None else 0
        self._consumer = consumer
        self._parent.on_stop(consumer.stop)

    def on_task_finished(self, event: TaskFinished) -> None:
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

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        self._started_at = self._started_at or time.monotonic()
        if self._count("overdue"):
            self._stop(ChildReport.OVERDUE)
        if (now := time.monotonic()) - self._reported_at >= _INTERVAL:
            self._reported_at = now
            self._parent.report(ChildReport.UNAVAILABLE if event.unavailable else ChildReport.ALIVE)
            self._withdraw_spare()

    def _is_limit_near(self) -> bool:
        """Whether a spare child must start now, to be ready when this child reaches a limit."""
        limits, now = self._limits, time.monotonic()
        if limits.max_tasks is not None and self._consumer is not None:
            ran = self._count("ran")
            rate = ran / max(now - self._started_at, _INTERVAL)
            ahead = rate * (self._parent.preparation * _HEAD_START + _INTERVAL) + self._consumer.concurrency
            if limits.max_tasks - ran <= ahead:
                return True
        if limits.max_memory is not None:
            return peak_memory() > self._memory + (limits.max_memory - self._memory) * _NEAR
        return False

    def _note_limit_near(self) -> None:
        """Record that a limit is near. The memory limit is near again when most of the remaining memory is used too."""
        self._near_since = time.monotonic()
        if self._limits.max_memory is not None:
            self._memory = peak_memory()

    def _withdraw_spare(self) -> None:
        """Report that no spare child is needed, if the peak of memory has not risen for some minutes.

        The peak of memory never falls. Without this, a child whose peak stays below the limit would keep its spare.
        """
        if self._near_since is None or self._parent.leaving is not None:
            return
        if time.monotonic() - self._near_since < _SPARE_TIMEOUT:
            return
        if self._is_limit_near():
            self._note_limit_near()
        else:
            self._near_since = None
            self._parent.report(ChildReport.SPARE_UNNEEDED)

    def _count(self, name: str) -> int:
        return 0 if self._consumer is None else self._consumer.counters[name]

    def _stop(self, reason: ChildReport) -> None:
        leaving = self._parent.leaving
        if self._consumer is None or leaving is ChildReport.OVERDUE:
            return
        if leaving is None or reason is ChildReport.OVERDUE:  # reported also by a child that ends already
            self._parent.report(reason)
            self._consumer.stop()
