"""How many messages a consumer holds: what its threads have lately run in some 50 ms, and at least one for each.

So no-op tasks come in hundreds a round trip, while an LLM call of a minute holds exactly one message per thread and
leaves the others to idle workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW = 0.05
LARGEST = 1000


class AdaptivePrefetch:
    """Doubles while everything held is run within the window; else falls to what was run in one."""

    adapts = True

    def __init__(self, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = concurrency
        self._least = concurrency
        self._clock = clock
        self._since = clock()
        self._run = 0

    def ran(self, count: int) -> None:
        """Note that `count` tasks have ended."""
        self._run += count

    def limit(self) -> int:
        """Return how many messages may be held now."""
        now = self._clock()
        elapsed = now - self._since
        if elapsed >= WINDOW:
            self._limit = int(self._run * WINDOW / elapsed)
        elif self._run >= self._limit:
            self._limit *= 2
        else:
            return self._limit
        self._begin(max(self._least, min(LARGEST, self._limit)), now)
        return self._limit

    def fall(self) -> None:
        """Begin anew at one for each thread: nothing was run for a whole window."""
        self._begin(self._least, self._clock())

    def _begin(self, limit: int, now: float) -> None:
        self._limit = limit
        self._since = now
        self._run = 0


class FixedPrefetch:
    """Always the same number."""

    adapts = False

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def ran(self, count: int) -> None:
        """Nothing to learn."""

    def limit(self) -> int:
        return self._limit

    def fall(self) -> None:
        """Whoever fixed the number wants it held."""
