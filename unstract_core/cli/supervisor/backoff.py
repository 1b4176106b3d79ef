"""The pause before a child that died is started again, and the count of deaths that makes a crash loop."""

from __future__ import annotations

import attrs

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
LOOPING = 5
"""The number of deaths in a row that is a crash loop."""
_ENDS_ROW, _ENDS_BACKOFF = 60.0, 300.0
"""Seconds of work after which the count of deaths is reset, and after which the next pause is the shortest again."""


@attrs.define
class Backoff:
    """The pause before the next start: it doubles with each death, until a child has worked for five minutes.

    Args:
        deaths: The number of deaths in a row. A minute of work resets it to zero.
        pause: The last pause in seconds; 0 for none.
    """

    deaths: int = 0
    _pause: float = 0.0

    @property
    def looping(self) -> bool:
        """Whether this is a crash loop."""
        return self.deaths >= LOOPING

    def note_alive(self, seconds: float) -> None:
        """Record that a child has worked for this number of seconds."""
        if seconds >= _ENDS_ROW:
            self.deaths = 0
        if seconds >= _ENDS_BACKOFF:
            self._pause = 0.0

    def note_death(self, seconds: float) -> float:
        """Record a death after this number of seconds of work; return the seconds until the next start."""
        self.note_alive(seconds)
        self.deaths += 1
        self._pause = min(LONGEST_PAUSE, max(SHORTEST_PAUSE, self._pause * 2))
        return self._pause

    def merge(self, other: Backoff) -> None:
        """Take the higher number of deaths and the longer pause of the two."""
        self.deaths, self._pause = max(self.deaths, other.deaths), max(self._pause, other._pause)
