"""Notifications between the threads of one process.

A waiting thread reads `version`, queries the file, and then waits, so that it does not miss a change between the query
and the wait.
"""

from __future__ import annotations

import threading


class Notifier:
    def __init__(self) -> None:
        self.version = 0
        self.reset()

    def reset(self) -> None:
        """Replace the lock in a forked child, where a thread of the parent may have held it."""
        self._changed = threading.Condition()

    def notify(self) -> None:
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, version: int, seconds: float) -> None:
        """Wait until `version` has changed, for at most `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, max(0.0, seconds))
