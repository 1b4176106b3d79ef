"""A change between two schemas: its path, the readers that it breaks, and the remedy."""

from __future__ import annotations

import attrs

OLD_READERS = "old readers of new rows"
NEW_READERS = "new readers of old rows"

ONLY_WHAT_WAS = "write only the earlier values, or put the new ones under a new optional key"
STILL_READ = "keep reading every value that was written before; put new ones under a new optional key"
STILL_WRITE = "keep writing it in every message"
KEEP_READING = "keep the key, and keep reading it"
OPTIONAL = "make it optional"
UNDECIDED = "this command cannot judge it: revert it, or prove by hand that both sides can read it"


@attrs.frozen
class Change:
    """One difference at one path of a message."""

    #: The JSON path in the message.
    path: str
    #: The difference.
    what: str
    #: The readers that the change breaks: OLD_READERS, NEW_READERS, both, or neither.
    breaks: tuple[str, ...] = ()
    #: The action that avoids the break; "" if nothing breaks.
    remedy: str = ""

    def __str__(self) -> str:
        if not self.breaks:
            return f"{self.path}: fine: {self.what}"
        return f"{self.path}: breaks {' and '.join(self.breaks)}: {self.what}; {self.remedy}"


@attrs.define
class Changes:
    """The changes between two schemas, each once.

    Attributes:
        found: The changes, in order.
        inside_not: True inside a `not`, where a narrower schema allows more.
    """

    found: dict[Change, None] = attrs.field(factory=dict)
    inside_not: bool = False

    def fine(self, path: str, what: str) -> None:
        """Record a change that breaks no reader."""
        self.found[Change(path, what)] = None

    def narrowed(self, path: str, what: str, remedy: str = STILL_READ) -> None:
        """Record that a value is no longer allowed: stored messages may contain it."""
        if self.inside_not:
            self._breaks(OLD_READERS, path, f"in a forbidden schema, {what}", ONLY_WHAT_WAS)
        else:
            self._breaks(NEW_READERS, path, what, remedy)

    def widened(self, path: str, what: str, remedy: str = ONLY_WHAT_WAS) -> None:
        """Record that a value is allowed now: an older reader may receive it."""
        if self.inside_not:
            self._breaks(NEW_READERS, path, f"in a forbidden schema, {what}", STILL_READ)
        else:
            self._breaks(OLD_READERS, path, what, remedy)

    def other(self, path: str, what: str, remedy: str = UNDECIDED) -> None:
        """Record a change that breaks both sides, or that cannot be judged."""
        self.found[Change(path, what, (OLD_READERS, NEW_READERS), remedy)] = None

    def _breaks(self, side: str, path: str, what: str, remedy: str) -> None:
        self.found[Change(path, what, (side,), remedy)] = None
