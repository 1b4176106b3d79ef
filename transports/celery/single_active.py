"""Detects the queues that deliver to one consumer at a time (`x-single-active-consumer`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

_INTERVAL = 1.0
"""The time in seconds between two checks of a queue."""
_CHECKS = 2
"""The number of checks in a row that show that a queue has one active consumer."""


class SingleActiveQueues:
    """The queues that are known to have one active consumer.

    Args:
        declared: The queues that are declared so here.
    """

    def __init__(self, declared: Iterable[str]) -> None:
        self._names = set(declared)
        self._checks: dict[str, tuple[float, int]] = {}

    def __contains__(self, queue: str) -> bool:
        return queue in self._names

    def __bool__(self) -> bool:
        return bool(self._names)

    def check(self, queue: str, idle: bool, ready: Callable[[], int]) -> bool:
        """Return whether a queue has just been detected: messages are ready, and its idle extra consumers get none.

        Args:
            queue: The queue.
            idle: Whether the standing consumer has no credit left and the extra consumers have no messages.
            ready: Returns how many messages of the queue are ready.
        """
        if not idle:
            self._checks.pop(queue, None)
            return False
        now = time.monotonic()
        due, checks = self._checks.setdefault(queue, (now + _INTERVAL, 0))
        if now < due:
            return False
        checks = checks + 1 if ready() else 0
        self._checks[queue] = (now + _INTERVAL, checks)
        if checks >= _CHECKS:
            self._names.add(queue)
        return checks >= _CHECKS
