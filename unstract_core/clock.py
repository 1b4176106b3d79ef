"""The one clock of a worker and of the memory transport, so that tests run leases and delays on virtual time.

The loop, the settler, the task threads, the prefetch and the memory transport read the time and wait through a `Clock`.
A transport over a database or a broker follows the clock of its server instead.
"""

from __future__ import annotations

import datetime
import threading
import time
from typing import Protocol


class Clock(Protocol):
    """The time, and the ways to wait for it."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment; the value never decreases."""

    def now(self) -> datetime.datetime:
        """Return the date and time in UTC."""

    def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""

    def wait(self, condition: threading.Condition, timeout: float) -> None:
        """Return when another thread notifies `condition`, which the caller holds, or after `timeout` seconds."""


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, condition: threading.Condition, timeout: float) -> None:
        condition.wait(min(timeout, threading.TIMEOUT_MAX))


SYSTEM_CLOCK = SystemClock()
