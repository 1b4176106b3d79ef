"""`SqliteSubscription`: claims, leases and settlements of a consumer."""

from __future__ import annotations

import math
import secrets
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from unstract_core import Delivery, Settlement, TransportClosed, Verdict
from unstract_core.codec import value_to_json
from unstract_core.transport import check_delay

from wire_sqlite.database import Database
from wire_sqlite.messages import Row, delivered, insert, written
from wire_sqlite.statements import statement


class SqliteSubscription:
    def __init__(self, database: Database, queues: Sequence[str], lease: float) -> None:
        self._database = database
        self._queues = queues
        self._lease = lease
        self._held: set[tuple[str, int, str]] = set()
        self._woken = False
        self._closed = False
        self._next()

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        deadline = time.monotonic() + wait
        while True:
            self._check_open()
            version = self._database.notifier.version
            due = self._next() if limit > 0 else math.inf
            if due <= time.time() and (deliveries := self._take(limit)):
                return deliveries
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return []
            if self._woken:
                self._woken = False
                return []
            self._database.wait(version, min(remaining, due - time.time()))

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        self._check_open()
        due = time.time() + self._lease
        with self._database.writing("renew leases") as connection:
            return [
                _key(delivery) in self._held
                and connection.execute(statement("renew"), _fence(delivery) | {"due": due}).rowcount == 1
                for delivery in deliveries
            ]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self._check_open()
        batch = [_Written(settlement) for settlement in settlements]
        held = set(self._held)
        # The next delivery of a released message has the same attempt, so this one must not settle it after a failure.
        self._held -= {_key(one.delivery) for one in settlements if not one.counted}
        with self._database.writing("settle") as connection:
            took_effect = [self._settle(connection, one, held) for one in batch]
            if any(one.reply for one in batch):
                connection.execute(statement("purge_replies"), {"now": time.time()})
        self._held = held
        self._database.notifier.notify()
        return took_effect

    def wake(self) -> None:
        self._woken = True
        self._database.notifier.notify()

    def close(self) -> None:
        self._closed = True
        self._database.notifier.notify()

    def _next(self) -> float:
        """Return the time of the next claimable message; the past if there is one now."""
        due = math.inf
        with self._database.reading("look for messages") as connection:
            for queue in self._queues:
                ready, next_due = connection.execute(statement("next"), {"queue": queue}).fetchone()
                due = min(due, -math.inf if ready else math.inf if next_due is None else next_due)
        return due

    def _take(self, limit: int) -> list[Delivery]:
        with self._database.writing("claim messages") as connection:
            now = time.time()
            first: list[tuple[int, int]] = []
            for queue in self._queues:
                connection.execute(statement("requeue_expired"), {"queue": queue, "now": now})
                first += connection.execute(statement("first"), {"queue": queue, "limit": limit})
            first = sorted(first)[:limit]
            claim = {"due": now + self._lease, "fence": secrets.token_hex(8)}
            claimed = [connection.execute(statement("claim"), {**claim, "id": id}).fetchone() for _, id in first]
        deliveries = [delivered(row) for row in claimed]
        self._held.update(map(_key, deliveries))
        return deliveries

    def _settle(self, connection: sqlite3.Connection, one: _Written, held: set[tuple[str, int, str]]) -> bool:
        """Apply a settlement if its delivery is in `held`, and remove it from there; return whether it took effect."""
        settlement, now = one.settlement, {"now": time.time()}
        fence = _fence(settlement.delivery)
        if _key(settlement.delivery) not in held:
            return False
        if settlement.verdict is Verdict.RETRY:
            again = {"delay": float(settlement.delay), "counted": settlement.counted}
            ended = connection.execute(statement("retry"), fence | now | again)
        else:
            if settlement.verdict is Verdict.BURY:
                why = {"reason": settlement.reason, "result": one.result}
                connection.execute(statement("bury"), fence | now | why)
            ended = connection.execute(statement("remove"), fence)
        if ended.rowcount == 0:
            return False
        held.discard(_key(settlement.delivery))
        insert(connection.cursor(), one.follow_ups)
        if one.reply is not None:
            connection.execute(statement("answer"), one.reply | now)
        return True

    def _check_open(self) -> None:
        self._database.check_open()
        if self._closed:
            raise TransportClosed("this subscription was closed")


class _Written:
    """A settlement with its encoded parts; a part that the wire cannot carry raises before the transaction."""

    def __init__(self, settlement: Settlement) -> None:
        check_delay(settlement.delay)
        self.settlement = settlement
        self.follow_ups = [written(settlement.follow_up)] if settlement.follow_up is not None else []
        self.result = value_to_json(settlement.result)
        self.reply = _answer(settlement)


def _answer(settlement: Settlement) -> Row | None:
    reply = settlement.reply
    if reply is None:
        return None
    result = value_to_json(reply.result)
    return {"key": reply.key, "status": reply.status, "result": result, "error": reply.error, "ttl": float(reply.ttl)}


def _key(delivery: Delivery) -> tuple[str, int, str]:
    return delivery.id, delivery.attempt, delivery.fence


def _fence(delivery: Delivery) -> dict[str, Any]:
    return {"id": int(delivery.id), "attempt": delivery.attempt, "fence": delivery.fence}
