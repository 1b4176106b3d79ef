"""The number of messages in flight: as many as the task threads run in 50 ms, and at least one for each thread.

Tasks that take no time come in hundreds a round trip. A worker with an LLM call of a minute on each thread takes no
further message, which leaves the others to idle workers. Only time in tasks counts, so a slow network does not make
batches smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

from unstract_core.clock import SYSTEM_CLOCK, Clock

WINDOW = 0.05
LARGEST = 1000
_GROWTH = 8


class AdaptivePrefetch:
    """Grows while the threads run all that is in flight, up to the number of tasks that they run in one window.

    A window ends when the threads have spent its length in tasks, on average. It does not end while they have nothing
    to run.

    Args:
        concurrency: Number of task threads; the limit is never below it.
        clock: The consumer's clock.
    """

    adapts = True

    def __init__(self, concurrency: int, clock: Clock = SYSTEM_CLOCK) -> None:
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
        """Begin again with one message for each thread: every thread runs a long task, or the queues are empty."""
        self._begin(self._least)

    def _running(self, started: Iterable[float]) -> float:
        """Return the seconds of this window in tasks that have not ended."""
        now = self._clock.monotonic()
        return sum(now - max(moment, self._since) for moment in started)

    def _fair(self) -> int:
        """Return how many tasks the threads run in one window, by the average of the current one."""
        return int(min(LARGEST, self._least * WINDOW * self._run / max(self._seconds, 1e-9)))

    def _begin(self, limit: int) -> None:
        self._limit = max(self._least, limit)
        self._since = self._clock.monotonic()
        self._run = 0
        self._seconds = 0.0


class FixedPrefetch:
    """The same number at all times."""

    adapts = False

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def ran(self, count: int, seconds: float) -> None:
        """Ignored: the number is fixed."""

    def limit(self, started: Iterable[float] = ()) -> int:
        return self._limit

    def fall(self) -> None:
        """Ignored: the number is fixed."""
