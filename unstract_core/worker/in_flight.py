"""The deliveries in flight: each from its receipt until it is settled, with an explicit state.

    WAITING --> RUNNING --> DONE ------------------> (removed)
       |                    ^  |                         ^
       +--------------------+  +--> RETRYING ------------+
          rejected, expired,   |       |                 |
          or released          +-------+--> UNCERTAIN ---+

A task thread starts a delivery, and finishes it when its task ends. The I/O thread adds deliveries, finishes those that
are rejected, released or overdue, and does everything after DONE. `end_run` decides which thread finishes a delivery if
its task ends at the moment at which the I/O thread gives it up.

A delivery is removed when it was settled, when the transport answers that its lease is lost, and when no settlement of
it is left to try.
"""

from __future__ import annotations

import enum
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import attrs

from unstract_core.clock import Clock
from unstract_core.transport import Delivery, Settlement, Verdict

Key: TypeAlias = int
"""Identifies one delivery. Its message id and attempt do not: both can repeat after a restore."""


class State(enum.Enum):
    """How far a delivery is."""

    WAITING = "waiting"
    """No thread has started its task."""
    RUNNING = "running"
    """A thread runs its task."""
    DONE = "done"
    """Its settlement is known, and due at once."""
    RETRYING = "retrying"
    """Settling it alone failed without effect; it is settled again after a pause."""
    UNCERTAIN = "uncertain"
    """A failed settlement may have taken effect, or its release failed and the transport may release it by itself.
    If the next settlement changes nothing, the lease was not necessarily lost."""


class Start(NamedTuple):
    """The start of a task: seconds on the consumer's clock, and the identifier of its thread."""

    moment: float
    thread: int


@attrs.define(eq=False)
class Entry:
    """One delivery in flight. Only `InFlight` changes it.

    Attributes:
        delivery: The delivery.
        startable_until: When its lease ends, on the consumer's clock and with a margin. Its task does not start later.
        state: How far it is.
        settlement: Its settlement; None until its outcome is known.
        finished_at: When its outcome was known, on the consumer's clock.
        lease_lost: Whether its lease is known to be lost.
    """

    delivery: Delivery
    startable_until: float = math.inf
    state: State = State.WAITING
    settlement: Settlement | None = None
    finished_at: float = 0.0
    lease_lost: bool = False

    @property
    def key(self) -> Key:
        return id(self.delivery)

    @property
    def settlement_due(self) -> Settlement:
        """The settlement of a finished delivery."""
        if self.settlement is None:
            raise RuntimeError("a delivery without a settlement was to be settled")
        return self.settlement


class InFlight:
    """The deliveries of one consumer that are not settled.

    Args:
        clock: The consumer's clock.
        wake: Called when a delivery has finished while the I/O thread said that it is asleep.
    """

    def __init__(self, clock: Clock, wake: Callable[[], None] = lambda: None) -> None:
        self.asleep = False
        """Whether the I/O thread waits, and has to be woken when a delivery finishes."""
        self._clock = clock
        self._wake = wake
        self._entries: dict[Key, Entry] = {}
        self._running: dict[Entry, Start] = {}
        self._finished: deque[Entry] = deque()
        self._to_settle: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def add(self, delivery: Delivery, startable_until: float = math.inf) -> Entry:
        """Add a delivery that was received. For the I/O thread."""
        entry = Entry(delivery, startable_until)
        self._entries[entry.key] = entry
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove a delivery that was settled, or whose lease brings it back. For the I/O thread."""
        self._to_settle.pop(entry.key, None)
        self._entries.pop(entry.key, None)

    # Tasks.

    @property
    def running(self) -> int:
        """How many deliveries are on a task thread."""
        return len(self._running)

    @property
    def starts(self) -> list[float]:
        """When each running task started, on the consumer's clock."""
        return [start.moment for start in list(self._running.values())]

    def runs(self) -> list[tuple[Entry, Start]]:
        """Return the deliveries whose tasks run now, each with its start."""
        return list(self._running.items())

    def is_running(self, entry: Entry) -> bool:
        """Whether the task of a delivery runs, and was not given up."""
        return entry in self._running

    def start_run(self, entry: Entry) -> None:
        """Record that the calling thread starts the task of a delivery."""
        entry.state = State.RUNNING
        self._running[entry] = Start(self._clock.monotonic(), threading.get_ident())

    def end_run(self, entry: Entry) -> bool:
        """Record that a task ended or was given up; return False if another thread recorded it first."""
        return self._running.pop(entry, None) is not None

    # Settlements.

    def finish(self, entry: Entry, settlement: Settlement) -> None:
        """Record the settlement of a delivery, and wake the I/O thread if it is asleep. For every thread."""
        entry.settlement = settlement
        entry.state = State.DONE
        entry.finished_at = self._clock.monotonic()
        self._finished.append(entry)  # before the look at `asleep`: the I/O thread never sleeps on a finished delivery
        if self.asleep:
            self.asleep = False
            self._wake()

    def release(self, entry: Entry, reason: str) -> None:
        """Finish a delivery whose task never started: another worker gets it, and the attempt does not count."""
        settlement = Settlement(entry.delivery, Verdict.RETRY, reason=f"released: {reason}", counted=False)
        self.finish(entry, settlement)

    @property
    def finished(self) -> int:
        """How many deliveries have finished since the last `collect`."""
        return len(self._finished)

    def collect(self) -> None:
        """Make the finished deliveries those that are to be settled. For the I/O thread."""
        for _ in range(len(self._finished)):
            entry = self._finished.popleft()
            self._to_settle[entry.key] = entry

    def to_settle(self) -> list[Entry]:
        """Return the deliveries that are to be settled, in the order in which they finished."""
        return list(self._to_settle.values())

    def is_to_settle(self, entry: Entry) -> bool:
        return entry.key in self._to_settle

    @property
    def unfinished(self) -> int:
        """How many deliveries wait for a thread or run."""
        return sum(entry.state in (State.WAITING, State.RUNNING) for entry in self)

    def fail(self, entry: Entry, *, uncertain: bool, alone: bool) -> None:
        """Record that settling a delivery failed. For the I/O thread.

        Args:
            entry: The delivery.
            uncertain: Whether the settlement may have taken effect.
            alone: Whether it was tried alone, so that the next attempt waits.
        """
        if uncertain:
            entry.state = State.UNCERTAIN
        elif alone and entry.state is State.DONE:
            entry.state = State.RETRYING

    def replace_settlement(self, entry: Entry, settlement: Settlement) -> None:
        """Settle a delivery in another way, because a transport refused the first one. For the I/O thread."""
        entry.settlement = settlement

    # Leases.

    def renew(self, entry: Entry, startable_until: float) -> None:
        """Record that the lease of a delivery was renewed. For the I/O thread."""
        entry.startable_until = startable_until

    def lose(self, entry: Entry) -> bool:
        """Record that a lease is lost, so that the task does not start; return False if that was known."""
        if entry.lease_lost:
            return False
        entry.lease_lost, entry.startable_until = True, -math.inf
        return True
