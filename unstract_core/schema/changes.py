"""What a change of the schema means: where it is, which side it breaks, and what to do instead."""

from __future__ import annotations

import attrs

OLD_READERS = "old readers of new rows"
NEW_READERS = "new readers of old rows"

ONLY_WHAT_WAS = "write only what was written before, or put what is new under a new optional key"
STILL_READ = "go on reading whatever was written before; put what is new under a new optional key"
STILL_WRITE = "go on writing it always"
KEEP_READING = "keep the key, and go on reading it"
OPTIONAL = "make it optional"
UNDECIDED = "this cannot be judged here: take it back, or prove by hand that both sides can live with it"


@attrs.frozen
class Change:
    """One difference at one place of a message; fine where it `breaks` nobody."""

    path: str
    what: str
    breaks: tuple[str, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        if not self.breaks:
            return f"{self.path}: fine: {self.what}"
        return f"{self.path}: breaks {' and '.join(self.breaks)}: {self.what}; {self.remedy}"


@attrs.define
class Changes:
    """The changes that were found, each once. `inside_not`, what is allowed less is forbidden less."""

    found: dict[Change, None] = attrs.field(factory=dict)
    inside_not: bool = False

    def fine(self, path: str, what: str) -> None:
        """It breaks nobody."""
        self.found[Change(path, what)] = None

    def narrowed(self, path: str, what: str, remedy: str = STILL_READ) -> None:
        """What was allowed no longer is: there may be rows that say it."""
        if self.inside_not:
            self._breaks(OLD_READERS, path, f"in what is forbidden, {what}", ONLY_WHAT_WAS)
        else:
            self._breaks(NEW_READERS, path, what, remedy)

    def widened(self, path: str, what: str, remedy: str = ONLY_WHAT_WAS) -> None:
        """What was not allowed now is: a reader that has not heard of it may meet it."""
        if self.inside_not:
            self._breaks(NEW_READERS, path, f"in what is forbidden, {what}", STILL_READ)
        else:
            self._breaks(OLD_READERS, path, what, remedy)

    def other(self, path: str, what: str, remedy: str = UNDECIDED) -> None:
        """It became another thing, or what it became cannot be told."""
        self.found[Change(path, what, (OLD_READERS, NEW_READERS), remedy)] = None

    def _breaks(self, side: str, path: str, what: str, remedy: str) -> None:
        self.found[Change(path, what, (side,), remedy)] = None
