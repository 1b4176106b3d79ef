"""Messages that were claimed without their content, because PostgreSQL failed to return it with the claim.

The content of several is read in one statement. If that fails, they are read in halves, until the row is found whose
content cannot be returned. That row is delivered with its problem, so that the consumer dead-letters it and its sender
hears of it; it is moved inside the database and never fetched.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeAlias

import attrs
import psycopg

from transports.postgres.listener import Listener
from transports.postgres.statements import Statements
from unstract_core.codec import from_wire
from unstract_core.errors import MalformedPayload, TransportError
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery

_NOT_THE_CONTENT = ("08", "25", "28", "40", "42", "530", "531", "533", "534", "55", "57", "58")
"""SQLSTATEs that say nothing about the rows that a statement returns: connections, rights, locks, shutdowns."""
_MAY_PASS = ("53200", "57014")
_MAX_READ_FAILURES = 3
"""Reads after which a row counts as unreadable if its content took too long or too much memory each time."""
_REST = 5.0
"""Seconds, times the strikes of a row, until a subscription tries to read it again."""
_MOST_KNOWN = 1000
"""The number of rows whose strikes a subscription remembers: the latest ones."""
_FRESH = 1 / 20
"""The part of a lease that may have passed when a delivery is returned: the consumer counts its lease from then on."""
TOO_LARGE = "its JSON text is larger than 256 MiB"

Key: TypeAlias = tuple[str, int, str]


class Unread:
    """The messages of one subscription that are claimed and not yet delivered. They are renewed while they wait.

    Attributes:
        since: when the oldest lease of them was claimed or renewed, on the monotonic clock.
    """

    def __init__(
        self,
        listener: Listener,
        statements: Statements,
        lease: float,
        release: Callable[[Sequence[Delivery], float], None],
    ) -> None:
        """Begin with no messages.

        Args:
            listener: the subscription's connection.
            statements: the statements of its schema.
            lease: seconds for which a message is claimed.
            release: makes deliveries ready again after a delay in seconds, without counting their attempt.
        """
        self.since = math.inf
        self._listener = listener
        self._statements = statements
        self._lease = lease
        self._release = release
        self._groups: deque[list[Delivery]] = deque()
        self._read_already: list[Delivery] = []
        self._failures: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._groups or self._read_already)

    @property
    def waiting(self) -> list[Delivery]:
        """All of them, those that have been read first."""
        return [*self._read_already, *(one for group in self._groups for one in group)]

    @property
    def renew_at(self) -> float:
        """When a third of the oldest lease has passed, on the monotonic clock; infinite if there are none."""
        return self.since + self._lease / 3 if self else math.inf

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.renew_at

    def add(self, claimed: list[Delivery], began: float) -> None:
        """Keep messages until `read` returns them. Reading all of them together is known to fail.

        Args:
            claimed: the messages, without their content.
            began: when the claim began, on the monotonic clock.
        """
        if claimed:
            self.since = min(self.since, began) if self else began
        middle = (len(claimed) + 1) // 2
        self._groups.extend(filter(None, (claimed[:middle], claimed[middle:])))

    def read(self, limit: int, hurried: Callable[[], bool]) -> list[Delivery]:
        """Return deliveries with their payload or problem, whose leases are ours and have just begun.

        It returns fewer than `limit` as soon as a third of a lease has passed. Raises errors of ours; call it again
        then.

        Args:
            limit: the number of deliveries at most.
            hurried: returns True as soon as the caller has to do something else.
        """
        if self.is_due and not hurried():
            self.renew()
        try:
            while self._groups and len(self._read_already) < limit and not hurried() and not self.is_due:
                room = limit - len(self._read_already)
                group = self._groups.popleft()
                self._put_back(group[room:])
                self._read(group[:room], hurried)
        except TransportError:
            if not self._read_already:
                raise
        if self._read_already and time.monotonic() > self.since + self._lease * _FRESH:
            if hurried():
                return []
            self.renew()
        if self.is_due:
            return []
        found, self._read_already = self._read_already[:limit], self._read_already[limit:]
        return found

    def renew(self) -> None:
        """Extend their leases, and forget those that were lost."""
        began = time.monotonic()
        rows = self._listener.execute(
            "renew leases", self._statements["renew"], {**fences(self.waiting), "lease": self._lease}
        )
        self.renewed({(str(msg_id), attempt, enqueued.hex()) for msg_id, attempt, enqueued in rows}, began)

    def renewed(self, kept: Container[Key], began: float) -> None:
        """Forget those that are not among `kept`: the leases of the others were renewed after the moment `began`."""
        self._read_already = [one for one in self._read_already if _key(one) in kept]
        groups = [[one for one in group if _key(one) in kept] for group in self._groups]
        self._groups = deque(group for group in groups if group)
        self.since = began

    def _read(self, group: list[Delivery], hurried: Callable[[], bool]) -> None:
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
                return
            if state_of(exc) in _MAY_PASS and (failures := self._count_failure(group[0])) < _MAX_READ_FAILURES:
                self._release_for(group[0], _REST * failures)
                raise
            self._add_unreadable(group, f"PostgreSQL cannot return it: {cause_of(exc)}")
            return
        ours = [one for one in group if _key(one) in texts]
        for place, one in enumerate(ours):
            if (text := texts[_key(one)]) is not None:
                self._failures.pop(_row(one), None)
                payload, problem = payload_of(text, one.queue)
                self._read_already.append(attrs.evolve(one, payload=payload, raw=text, problem=problem))
                continue
            if place and (hurried() or self.is_due):
                self._put_back(ours[place:])
                return
            self._add_unreadable(ours[place:], TOO_LARGE)

    def _texts(self, group: Sequence[Delivery]) -> dict[Key, str | None]:
        rows = self._listener.execute("read messages", self._statements["contents"], fences(group))
        return {(str(msg_id), attempt, enqueued.hex()): text for msg_id, attempt, enqueued, text in rows}

    def _add_unreadable(self, group: list[Delivery], problem: str) -> None:
        """Add the first of a group with the reason why it has no payload, and the addresses of its sender.

        Addresses that cannot be read are left out. If this raises, the whole group is still to be read.
        """
        one = group[0]
        try:
            rows = self._listener.execute("read who sent a message", self._statements["digest"], fences([one]))
        except TransportError as exc:
            if not may_be_the_content(exc):
                self._put_back(group)
                raise
            rows = []
        raw = rows[0][0] if rows else None
        problem = f"the stored message cannot be read: {problem}"
        self._read_already.append(attrs.evolve(one, raw=raw or "{}", problem=problem))

    def _count_failure(self, one: Delivery) -> int:
        """Note that the content of a row took too long or too much memory; return how often it has."""
        failures = self._failures.pop(_row(one), 0) + 1
        self._failures[_row(one)] = failures
        if len(self._failures) > _MOST_KNOWN:
            del self._failures[next(iter(self._failures))]
        return failures

    def _release_for(self, one: Delivery, delay: float) -> None:
        try:
            self._release([one], delay)
        except TransportError as exc:
            if not getattr(exc, "fate_unknown", False):
                self._put_back([one])
            raise

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


def _key(delivery: Delivery) -> Key:
    return delivery.id, delivery.attempt, delivery.fence


def _row(delivery: Delivery) -> tuple[str, str]:
    """Return what is the same in every delivery of a row, and of no other row."""
    return delivery.id, delivery.fence
