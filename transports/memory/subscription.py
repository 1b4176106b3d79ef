"""`MemorySubscription`: the consumer's side of the memory transport."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from transports.memory.store import Row, Store
from unstract_core.codec import from_wire, value_to_json
from unstract_core.errors import MalformedPayload, TransportClosed
from unstract_core.transport import Delivery, Settlement, Verdict, check_delay, write_message


class MemorySubscription:
    """The messages of some queues; see `unstract_core.Subscription`."""

    def __init__(self, store: Store, queues: Sequence[str], lease: float) -> None:
        self._store = store
        self._queues = tuple(queues)
        self._lease = lease
        self._woken = False
        self._closed = False

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Claim up to `limit` messages, waiting up to `wait` seconds for the first."""
        waits = self._store.waits
        deadline = waits.monotonic() + wait
        with self._store.changed:
            while True:
                self._check_open()
                due = self._store.requeue_due()
                rows = self._take(limit)
                remaining = deadline - waits.monotonic()
                if rows or self._woken or remaining <= 0:
                    self._woken = self._woken and (bool(rows) or wait <= 0)
                    return [_delivery(row) for row in rows]
                waits.wait(self._store.changed, min(remaining, math.inf if due is None else due))

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        with self._store.changed:
            self._check_open()
            rows = [self._store.claimed(delivery, self) for delivery in deliveries]
            for row in rows:
                if row is not None:
                    row.state, row.due = "claimed", self._store.clock() + self._lease
            return [row is not None for row in rows]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        written = [_Written(settlement) for settlement in settlements]
        with self._store.changed:
            self._check_open()
            took_effect = [self._settle(one) for one in written]
            self._store.changed.notify_all()
        return took_effect

    def wake(self) -> None:
        with self._store.changed:
            self._woken = True
            self._store.changed.notify_all()

    def close(self) -> None:
        with self._store.changed:
            self._closed = True
            self._store.changed.notify_all()

    def _take(self, limit: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < limit and (row := self._store.take(self._queues, self, self._lease)) is not None:
            rows.append(row)
        return rows

    def _settle(self, written: _Written) -> bool:
        settlement = written.settlement
        row = self._store.claimed(settlement.delivery, self)
        if row is None:
            return False
        if settlement.verdict is Verdict.RETRY:
            del row.holders[row.attempt]
            row.attempt -= not settlement.counted
            self._store.postpone(row, settlement.delay)
        else:
            del self._store.rows[row.id]
        if settlement.verdict is Verdict.BURY:
            self._store.bury(row, settlement, written.result)
        if settlement.follow_up is not None:
            self._store.add(settlement.follow_up, written.follow_up)
        if settlement.reply is not None:
            self._store.write_reply(settlement.reply, written.reply)
        return True

    def _check_open(self) -> None:
        self._store.check_open()
        if self._closed:
            raise TransportClosed("this subscription was closed")


class _Written:
    """A settlement in its stored form. Writing it first makes the wire refuse a value before anything has changed."""

    def __init__(self, settlement: Settlement) -> None:
        check_delay(settlement.delay)
        self.settlement = settlement
        self.follow_up = json.dumps(write_message(settlement.follow_up)) if settlement.follow_up is not None else ""
        self.reply = value_to_json(settlement.reply.result) if settlement.reply is not None else ""
        self.result = value_to_json(settlement.result)


def _delivery(row: Row) -> Delivery:
    payload, problem = None, None
    try:
        payload = from_wire(row.text, row.queue)
    except MalformedPayload as exc:
        problem = str(exc)
    return Delivery(
        str(row.id), row.queue, row.attempt, payload, row.text, problem, row.org_id, row.priority, fence=row.fence
    )
