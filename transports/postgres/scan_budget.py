"""`ScanBudget`: how often an expensive scan may run."""

from __future__ import annotations

import math

SHARE = 1 / 25
"""The part of the time that scans over dead rows may take."""
LONGEST_REST = 30.0
_MOST_DOUBLINGS = 4


class ScanBudget:
    """The pause after a scan is proportional to its duration, so that scans take a small part of the time.

    The pause is at most LONGEST_REST. It is longer only after repeated failures: a scan that exceeds the time limit of
    a statement must not block other work. A single slow scan, on a busy machine, does not make the pause longer.

    Attributes:
        due_at: when the scan may run again, on the monotonic clock.
        seconds: the duration that counts.

    Args:
        shortest: the shortest pause in seconds.
    """

    def __init__(self, shortest: float = 0.0) -> None:
        self.due_at = 0.0
        self.seconds = 0.0
        self._shortest = shortest
        self._last = math.inf
        self._failures = 0

    def record(self, began: float, ended: float) -> None:
        """Record a scan that ran from `began` to `ended`, on the monotonic clock."""
        self.seconds, self._last = min(ended - began, self._last), ended - began
        self._failures = 0
        self.due_at = ended + min(max(self.seconds / SHARE, self._shortest), LONGEST_REST)

    def record_failure(self, began: float, ended: float) -> None:
        """Record a scan that the server cancelled because it took too long."""
        self.seconds = max(self.seconds, ended - began)
        longest = LONGEST_REST * 2.0 ** min(self._failures, _MOST_DOUBLINGS)
        self._failures += 1
        self.due_at = ended + min(max((ended - began) / SHARE, self._shortest), longest)
