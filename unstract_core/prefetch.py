"""How many messages a consumer holds: what its threads run in some 50 ms, and at least one for each.

So no-op tasks come in hundreds a round trip, while an LLM call of a minute holds exactly one message per thread and
leaves the others to idle workers. It is the time in the tasks that counts: a slow network makes batches no smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW = 0.05
LARGEST = 1000


class AdaptivePrefetch:
    """Doubles while everything held is run, up to what the threads run in one window by the tasks' average time."""

    adapts = True

    def __init__(self, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._least = concurrency
        self._clock = clock
        self._begin(concurrency)

    def ran(self, count: int, seconds: float) -> None:
        """Note that `count` tasks have ended that took `seconds` in all."""
        self._run += count
        self._seconds += seconds

    def limit(self) -> int:
        """Return how many messages may be held now."""
        if self._run >= self._limit:
            self._begin(min(self._fair(), 2 * self._limit))
        elif self._clock() - self._since >= WINDOW:
            self._begin(min(self._fair(), self._limit) if self._run else self._least)
        return self._limit

    def fall(self) -> None:
        """Begin anew at one for each thread: nothing was run for a whole window."""
        self._begin(self._least)

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
        """Nothing to learn."""

    def limit(self) -> int:
        return self._limit

    def fall(self) -> None:
        """Whoever fixed the number wants it held."""
