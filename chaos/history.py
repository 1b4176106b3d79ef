"""The lines of the journals by dispatch. It is fed line by line, during a run and for the ledger."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable

import attrs

from chaos.breakpoints import SENT
from chaos.journal import Line

_SETTLED_OR_RELEASED = ("settled", "released")


class History:
    """Everything that the processes wrote.

    Attributes:
        lines: The lines of each dispatch, by time within each process.
        processes: The processes that were ready.
        stalls: Lines of processes that the machine suspended.
        stopped: Lines of processes that stopped at a breakpoint.
    """

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.lines: dict[str, list[Line]] = defaultdict(list)
        self.processes: set[str] = set()
        self.stalls: list[Line] = []
        self.stopped: list[Line] = []
        self._claimed: dict[str, set[str]] = defaultdict(set)
        self._sent: list[tuple[float, str]] = []
        self._open: set[str] = set()
        self._called: set[str] = set()
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        if line.event == "ready":
            self.processes.add(line.process)
        elif line.event == "stalled":
            self.stalls.append(line)
        if not line.dispatch:
            return
        self.lines[line.dispatch].append(line)
        if line.event == "before":
            self._sent.append((line.at, line.dispatch))
        elif line.event == "stopped":
            self.stopped.append(line)
            if line.detail == SENT:  # it was accepted, but its producer may be killed before it records that
                self.add(attrs.evolve(line, event="accepted", detail=""))
        elif line.event == "claimed":
            self._claimed[line.process].add(line.dispatch)
        elif line.event in _SETTLED_OR_RELEASED:
            self._claimed[line.process].discard(line.dispatch)
        elif line.event == "called":
            self._called.add(line.dispatch)
            self._open.discard(line.dispatch)
        if line.event in ("accepted", "started") and line.dispatch not in self._called:
            self._open.add(line.dispatch)

    def of(self, dispatch: str, *events: str) -> list[Line]:
        """Return the lines of a dispatch with one of these events, by time."""
        return sorted((line for line in self.lines.get(dispatch, ()) if line.event in events), key=lambda line: line.at)

    def claimed_by(self, process: str) -> set[str]:
        """Return the dispatches that a process recorded as claimed and not as settled."""
        return set(self._claimed[process])

    @property
    def open(self) -> set[str]:
        """The dispatches that were accepted or started, and not called back yet."""
        return set(self._open)

    def first_callback_after(self, moment: float, sender: str = "") -> float | None:
        """Return when the first callback ran of a dispatch that was sent after a moment; None if none did.

        Args:
            moment: The time of the monotonic clock.
            sender: The start of the producer's name; "" for any.
        """
        self._sent.sort()
        first: float | None = None
        for sent, dispatch in self._sent[bisect.bisect_left(self._sent, (moment, "")) :]:
            if first is not None and sent > first:
                break
            if dispatch.startswith(sender) and (calls := self.of(dispatch, "called")):
                first = calls[0].at if first is None else min(first, calls[0].at)
        return first
