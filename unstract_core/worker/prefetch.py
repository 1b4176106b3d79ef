"""How many messages a consumer holds: what its threads run in some 50 ms, and at least one for each.

So no-op tasks come in hundreds a round trip, while an LLM call of a minute holds exactly one message per thread and
leaves the others to idle workers. Only time in tasks counts: a slow network, on which the threads wait for messages,
makes batches no smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

WINDOW = 0.05
LARGEST = 1000
_GROWTH = 8


class AdaptivePrefetch:
    """Grows while everything in flight is run, up to what the threads run in one window by the tasks' average time.

    A window ends when the threads together have spent its length in tasks, each of them. So a window in which they had
    nothing to run does not end, however long it takes.

    Args:
        concurrency: Number of task threads; the limit is never below it.
        clock: Returns the monotonic time in seconds.
    """

    adapts = True

    def __init__(self, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._least = concurrency
        self._clock = clock
        self._begin(concurrency)

    def ran(self, count: int, seconds: float) -> None:
        """Record finished tasks.

        Args:
            count: How many tasks have ended.
            seconds: How long they took, added up.
        """
        self._run += count
        self._seconds += seconds

    def limit(self, started: Iterable[float] = ()) -> int:
        """Return how many messages may be in flight now.

        Args:
            started: When each task that runs now was started, on the same clock.
        """
        started = list(started)
        throughout = sum(moment <= self._since for moment in started)
        if self._run and self._run + throughout >= self._limit:
            self._begin(min(self._fair(), _GROWTH * self._limit))
        elif self._seconds + self._running(started) >= self._least * WINDOW:
            self._begin(min(self._fair(), self._limit) if self._run else self._least)
        return self._limit

    def fall(self) -> None:
        """Start again at one message for each thread: every thread is in a long task, or the queues are empty."""
        self._begin(self._least)

    def _running(self, started: Iterable[float]) -> float:
        """Return the seconds of this window in tasks that have not ended."""
        now = self._clock()
        return sum(now - max(moment, self._since) for moment in started)

    def _fair(self) -> int:
        """Return what the threads run in one window."""
        return int(min(LARGEST, self._least * WINDOW * self._run / max(self._seconds, 1e-9)))

    def _begin(self, limit: int) -> None:
        self._limit = max(self._least, limit)
        self._since = self._clock()
        self._run = 0
        self._seconds = 0.0


class FixedPrefetch:
    """Always the same number."""

    adapts = False

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def ran(self, count: int, seconds: float) -> None:
        """Ignored: the number is fixed."""

    def limit(self, started: Iterable[float] = ()) -> int:
        return self._limit

    def fall(self) -> None:
        """Ignored: the number is fixed."""
