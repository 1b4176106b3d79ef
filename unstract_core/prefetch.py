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

    def __init__(self, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = concurrency
        self._least = concurrency
        self._clock = clock
        self._since = clock()
        self._run = 0

    def ran(self, count: int) -> None:
        """Note that `count` tasks have ended."""
        self._run += count
        now = self._clock()
        elapsed = now - self._since
        if elapsed >= WINDOW:
            self.limit = max(self._least, min(LARGEST, int(self._run * WINDOW / elapsed)))
        elif self._run >= self.limit:
            self.limit = max(self._least, min(LARGEST, self.limit * 2))
        else:
            return
        self._since = now
        self._run = 0


class FixedPrefetch:
    """Always the same number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def ran(self, count: int) -> None:
        """Nothing to learn."""
