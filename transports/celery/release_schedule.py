"""The times at which buffered messages without a free thread are released to other consumers."""

from __future__ import annotations

import math
import time
from collections.abc import Collection

import attrs

WINDOW = 0.05
"""The time in seconds for which a queue may be without demand before its messages are released."""
MAX_PAUSE = 1.0
"""The longest time in seconds between two attempts to release the messages of a queue."""


@attrs.define
class _Schedule:
    #: The time of the next attempt, on the monotonic clock.
    due: float
    #: The time in seconds between the next two attempts.
    pause: float = WINDOW


class ReleaseSchedule:
    """The next attempt for each queue without demand; the pauses between attempts double."""

    def __init__(self) -> None:
        self._schedules: dict[str, _Schedule] = {}

    def __bool__(self) -> bool:
        return bool(self._schedules)

    def clear(self, queue: str) -> None:
        """Record that a queue has demand."""
        self._schedules.pop(queue, None)

    def seconds_until_next(self, queues: Collection[str]) -> float:
        """Return the time in seconds until the next attempt for one of these queues; infinity if there is none."""
        due = min((schedule.due for name, schedule in self._schedules.items() if name in queues), default=math.inf)
        return max(0.0, due - time.monotonic())

    def is_due(self, queue: str, now: float) -> bool:
        """Whether the messages of a queue without demand must be released at `now`."""
        return self._schedules.setdefault(queue, _Schedule(now + WINDOW)).due <= now

    def postpone(self, queue: str) -> None:
        """Record an attempt for a queue."""
        schedule = self._schedules[queue]
        schedule.pause = min(MAX_PAUSE, 2 * schedule.pause)
        schedule.due = time.monotonic() + schedule.pause
