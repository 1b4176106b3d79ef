"""The content of the memory transport: rows, replies and dead letters, under one lock.

The caller of every method but the constructor and `using` holds `changed`. A heap entry may be outdated: the state of
its row decides.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import itertools
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import attrs

from unstract_core.clock import SYSTEM_CLOCK, Clock
from unstract_core.errors import TransportClosed
from unstract_core.transport import DeadLetter, Delivery, Message, QueueState, Reply, Settlement
from unstract_core.values.limits import JSONValue


@attrs.define(eq=False)
class Row:
    """A stored message.

    Attributes:
        enqueued: When it was sent, on the store's clock.
        due: When its lease or delay ends, on the store's clock.
        holders: The subscription of each attempt.
        fence: The fencing token of its latest claim.
    """

    id: int
    queue: str
    text: str
    org_id: str
    priority: int
    enqueued: float
    due: float
    state: Literal["ready", "claimed", "delayed"]
    attempt: int = 0
    fence: str = ""
    holders: dict[int, object] = attrs.field(factory=dict)


class Store:
    """The rows, replies and dead letters of one transport.

    Args:
        clock: Drives leases, delays and times to live.
        waits: The clock of waiting calls. Default: the clock of the machine.
    """

    def __init__(self, clock: Callable[[], float], waits: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.waits = waits
        self.changed = threading.Condition()
        self.rows: dict[int, Row] = {}
        self.dead: dict[str, DeadLetter] = {}
        self.closed = False
        self._ready: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self._replies: dict[str, tuple[Reply, str, float]] = {}
        self._ids = itertools.count(1)
        self._claims = itertools.count(1)
        self._started = waits.now()
        self._start = clock()

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Hold the lock. Raises TransportClosed if the transport was closed."""
        with self.changed:
            self.check_open()
            yield

    def check_open(self) -> None:
        if self.closed:
            raise TransportClosed("this memory transport was closed")

    def add(self, message: Message, text: str) -> str:
        now = self.clock()
        row = Row(next(self._ids), message.queue, text, message.org_id, message.priority, now, now, "ready")
        self.rows[row.id] = row
        self.postpone(row, message.delay)
        return str(row.id)

    def postpone(self, row: Row, delay: float) -> None:
        """Make a row ready, now or after `delay` seconds."""
        if delay > 0:
            row.state, row.due = "delayed", self.clock() + delay
            return
        row.state, row.due = "ready", min(row.due, self.clock())
        heapq.heappush(self._ready[row.queue], (-row.priority, row.id))

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        """Claim the first ready row of `queues`: highest priority, then lowest id."""
        heaps = [heap for queue in queues if (heap := self._settled_heap(queue))]
        if not heaps:
            return None
        _, row_id = heapq.heappop(min(heaps, key=lambda heap: heap[0]))
        row = self.rows[row_id]
        row.state, row.due = "claimed", self.clock() + lease
        row.attempt += 1
        row.fence = str(next(self._claims))
        row.holders[row.attempt] = holder
        return row

    def requeue_due(self) -> float | None:
        """Make every row whose lease or delay is over ready; return the seconds until the next one is due."""
        now = self.clock()
        waiting = [row for row in self.rows.values() if row.state != "ready"]
        for row in waiting:
            if row.due <= now:
                self.postpone(row, 0)
        return min((row.due - now for row in waiting if row.due > now), default=None)

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        """Return the row if this delivery to this holder is its latest: the fence."""
        row = self.rows.get(int(delivery.id))
        if row is None or (row.attempt, row.fence) != (delivery.attempt, delivery.fence):
            return None
        return row if row.holders.get(row.attempt) is holder else None

    def bury(self, row: Row, settlement: Settlement, result: str) -> None:
        self.dead[str(row.id)] = DeadLetter(
            id=str(row.id),
            queue=row.queue,
            message=_message(row.text),
            reason=settlement.reason,
            attempts=row.attempt,
            result=json.loads(result),
            org_id=row.org_id,
            priority=row.priority,
            enqueued_at=self._date(row.enqueued),
            buried_at=self._date(self.clock()),
        )

    def replay(self, letter: DeadLetter) -> None:
        now = self.clock()
        text = json.dumps(letter.message)
        row = Row(next(self._ids), letter.queue, text, letter.org_id, letter.priority, now, now, "ready")
        self.rows[row.id] = row
        self.postpone(row, 0)

    def age(self, letter: DeadLetter) -> float:
        return (self._date(self.clock()) - letter.buried_at).total_seconds()

    def write_reply(self, reply: Reply, result: str) -> None:
        known = self._replies.get(reply.key)
        if known is None or known[2] <= self.clock():
            self._replies[reply.key] = (reply, result, self.clock() + reply.ttl)

    def read_reply(self, key: str, *, consume: bool) -> Reply | None:
        if (found := self._replies.get(key)) is None:
            return None
        reply, result, expires = found
        if expires <= self.clock():
            del self._replies[key]
            return None
        if consume:
            self._replies[key] = (attrs.evolve(reply, result=None, error=""), "null", expires)
        return attrs.evolve(reply, result=json.loads(result))

    def states(self, names: Sequence[str] | None) -> list[QueueState]:
        self.requeue_due()
        letters = list(self.dead.values())
        if names is None:
            names = {row.queue for row in self.rows.values()} | {letter.queue for letter in letters}  # type: ignore[assignment]
        return [self._state(name, letters) for name in sorted(set(names or ()))]

    def waiting_tasks(self, queue: str, limit: int) -> Counter[str]:
        self.requeue_due()
        ready = [row for row in self.rows.values() if row.queue == queue and row.state == "ready"]
        ready.sort(key=lambda row: (-row.priority, row.id))
        messages = [_message(row.text) for row in ready[:limit]]
        names = [message.get("task_name") for message in messages if isinstance(message, dict)]
        return Counter(name for name in names if isinstance(name, str) and name)

    def _state(self, name: str, letters: Sequence[DeadLetter]) -> QueueState:
        rows = [row for row in self.rows.values() if row.queue == name]
        ready = [row for row in rows if row.state == "ready"]
        return QueueState(
            queue=name,
            ready=len(ready),
            in_flight=sum(row.state == "claimed" for row in rows),
            delayed=sum(row.state == "delayed" for row in rows),
            oldest=max((self.clock() - max(row.enqueued, row.due) for row in ready), default=None),
            dead=sum(letter.queue == name for letter in letters),
        )

    def _settled_heap(self, queue: str) -> list[tuple[int, int]]:
        heap = self._ready[queue]
        while heap and (row := self.rows.get(heap[0][1]), row is None or row.state != "ready")[1]:
            heapq.heappop(heap)
        return heap

    def _date(self, moment: float) -> datetime.datetime:
        return self._started + datetime.timedelta(seconds=moment - self._start)


def _message(text: str) -> JSONValue:
    try:
        message: JSONValue = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return message
