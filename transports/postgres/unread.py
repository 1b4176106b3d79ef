"""Messages that were claimed without their content, because PostgreSQL failed to return it with the claim.

The content of several is read in one statement. If that fails, they are read in halves, until the row is found whose
content cannot be returned. That row is delivered with its problem, so that the consumer dead-letters it and its sender
hears of it; it is moved inside the database and never fetched.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import psycopg

from transports.postgres.session import Session
from transports.postgres.statements import Statements
from unstract_core.codec import from_wire
from unstract_core.errors import MalformedPayload, TransportError
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery

_NOT_THE_CONTENT = ("08", "25", "28", "40", "42", "530", "531", "533", "534", "55", "57", "58")
"""SQLSTATEs that say nothing about the rows that a statement returns: connections, rights, locks, shutdowns."""
_MAY_PASS = ("53200", "57014")
_MOST_STRIKES = 3
"""Attempts after which a row counts as unreadable whose content takes too long or too much memory each time."""
TOO_LARGE = "its JSON text is larger than 256 MiB"


class Unread:
    """The messages of one subscription that are claimed and not yet delivered. They are renewed while they wait."""

    def __init__(self, session: Session, statements: Statements, lease: float) -> None:
        self._session = session
        self._statements = statements
        self._lease = lease
        self._groups: deque[list[Delivery]] = deque()
        self._renew_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, claimed: list[Delivery]) -> None:
        """Keep what was claimed just now, until `read` returns it. All of it together is known to fail."""
        middle = (len(claimed) + 1) // 2
        for half in filter(None, (claimed[:middle], claimed[middle:])):
            self._renew_at = min(self._renew_at if self._groups else math.inf, time.monotonic() + self._lease / 3)
            self._groups.append(half)

    def read(self, limit: int, hurried: Callable[[], bool]) -> list[Delivery]:
        """Return up to `limit` deliveries with their payload or problem; fewer as soon as `hurried` answers True.

        Raises errors of ours; call it again then.
        """
        if time.monotonic() >= self._renew_at:
            self._renew()
        found: list[Delivery] = []
        while self._groups and len(found) < limit and not hurried():
            group = self._groups.popleft()
            self._put_back(group[limit - len(found) :])
            try:
                found += self._read(group[: limit - len(found)])
            except TransportError:
                if found:
                    return found
                raise
        return found

    def _read(self, group: list[Delivery]) -> list[Delivery]:
        try:
            texts = self._texts(group)
        except TransportError as exc:
            if not may_be_the_content(exc):
                self._put_back(group)
                raise
            if len(group) > 1:
                self._put_back(group[: len(group) // 2], group[len(group) // 2 :])
                if state_of(exc) in _MAY_PASS:  # it took long: what else is due comes first
                    raise
                return []
            if state_of(exc) in _MAY_PASS and group[0].attempt < _MOST_STRIKES:
                raise  # its lease ends, and another attempt may succeed
            return [self._unreadable(group[0], f"PostgreSQL cannot return it: {cause_of(exc)}")]
        return [self._delivered(one, texts[_key(one)]) for one in group if _key(one) in texts]

    def _delivered(self, one: Delivery, text: str | None) -> Delivery:
        if text is None:
            return self._unreadable(one, TOO_LARGE)
        payload, problem = payload_of(text, one.queue)
        return attrs.evolve(one, payload=payload, raw=text, problem=problem)

    def _texts(self, group: Sequence[Delivery]) -> dict[tuple[str, int, str], str | None]:
        rows = self._session.execute("read messages", self._statements["contents"], fences(group))
        return {(str(msg_id), attempt, enqueued.hex()): text for msg_id, attempt, enqueued, text in rows}

    def _unreadable(self, one: Delivery, problem: str) -> Delivery:
        """Return a delivery that says why it has no payload, with its sender's addresses where these can be read."""
        try:
            rows = self._session.execute("read who sent a message", self._statements["digest"], fences([one]))
        except TransportError as exc:
            if not may_be_the_content(exc):
                self._put_back([one])
                raise
            rows = []
        raw = rows[0][0] if rows else None
        return attrs.evolve(one, raw=raw or "{}", problem=f"the stored message cannot be read: {problem}")

    def _renew(self) -> None:
        waiting = [one for group in self._groups for one in group]
        rows = self._session.execute(
            "renew leases", self._statements["renew"], {**fences(waiting), "lease": self._lease}
        )
        kept = {(str(msg_id), attempt, enqueued.hex()) for msg_id, attempt, enqueued in rows}
        groups = [[one for one in group if _key(one) in kept] for group in self._groups]
        self._groups = deque(group for group in groups if group)
        self._renew_at = time.monotonic() + self._lease / 3

    def _put_back(self, *groups: list[Delivery]) -> None:
        self._groups.extendleft(group for group in reversed(groups) if group)


def may_be_the_content(exc: TransportError) -> bool:
    """Whether a statement failed in a way in which one row that it returns can make it fail."""
    state = state_of(exc)
    return state in _MAY_PASS or (state is not None and not state.startswith(_NOT_THE_CONTENT))


def state_of(exc: TransportError) -> str | None:
    return exc.__cause__.sqlstate if isinstance(exc.__cause__, psycopg.Error) else None


def cause_of(exc: TransportError) -> str:
    """Return the server's message without its detail, which can quote content."""
    cause = exc.__cause__
    primary = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
    return f"{primary} (SQLSTATE {state_of(exc)})"


def fences(deliveries: Sequence[Delivery]) -> dict[str, list[Any]]:
    """Return deliveries as the columns by which statements find their rows."""
    return {
        "ids": [int(one.id) for one in deliveries],
        "attempts": [one.attempt for one in deliveries],
        "enqueued": [bytes.fromhex(one.fence) for one in deliveries],
    }


def payload_of(text: str, queue: str) -> tuple[TaskPayload | None, str | None]:
    """Return the payload that JSON text in a queue holds, or what is wrong with it."""
    try:
        return from_wire(text, queue), None
    except MalformedPayload as exc:
        return None, str(exc)


def _key(delivery: Delivery) -> tuple[str, int, str]:
    return delivery.id, delivery.attempt, delivery.fence
