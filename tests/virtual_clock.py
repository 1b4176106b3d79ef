"""A clock whose time passes without waiting: leases, delays and back-off of hours take milliseconds."""

from __future__ import annotations

import datetime
import threading

_GRACE = 0.002
"""Real seconds that a wait gives to other threads before it moves the time on."""


class VirtualClock:
    """Time that moves when somebody sleeps or waits, or by `advance`.

    A wait first lets other threads notify it, and then moves the time on to its end. So the time of a consumer passes
    as fast as its I/O thread waits. A task that is to last some virtual time calls `pass_by`.
    """

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._seconds = 1000.0
        self._epoch = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=self._seconds)

    def monotonic(self) -> float:
        return self._seconds

    def now(self) -> datetime.datetime:
        return self._epoch + datetime.timedelta(seconds=self._seconds)

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def wait(self, condition: threading.Condition, timeout: float) -> None:
        if not condition.wait(_GRACE):
            self.advance(timeout)

    def advance(self, seconds: float) -> None:
        """Move the time on."""
        with self._moved:
            self._seconds += max(0.0, seconds)
            self._moved.notify_all()

    def pass_by(self, seconds: float) -> None:
        """Return when other threads have moved the time on by `seconds`; for the task of a test."""
        with self._moved:
            until = self._seconds + seconds
            self._moved.wait_for(lambda: self._seconds >= until, 30)
