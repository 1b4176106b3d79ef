"""A bell that whoever changes something rings, for whoever waits inside this process.

Who waits reads `rung` first, then looks, then waits: a change between the look and the wait is not slept over.
"""

from __future__ import annotations

import threading


class Bell:
    def __init__(self) -> None:
        self.rung = 0
        self.start_anew()

    def start_anew(self) -> None:
        """In a forked child: the lock may be held by a thread that was left behind."""
        self._changed = threading.Condition()

    def ring(self) -> None:
        with self._changed:
            self.rung += 1
            self._changed.notify_all()

    def wait(self, rung: int, seconds: float) -> None:
        """Wait until the bell has rung since it was `rung`, `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.rung != rung, max(0.0, seconds))
