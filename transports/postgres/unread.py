"""`UnreadMessages`: messages that were claimed without their content, because the server could not return it.

One statement reads the content of several messages. If it fails, each half is read separately, down to the row whose
content cannot be returned. That row is delivered with its problem, so that the consumer dead-letters it and its sender
gets the error. The server moves the row; its content is never fetched.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Container, Sequence

import attrs

from transports.postgres.content_errors import MAY_PASS, cause_of, may_be_the_content, state_of
from transports.postgres.listener import Listener
from transports.postgres.rows import Fence, contents_in, digest_in, fence_columns, fence_of, fences_in, payload_in
from transports.postgres.statements import Statements
from unstract_core.errors import TransportError
from unstract_core.transport import Delivery

_MAX_FAILURES = 3
"""The number of reads that take too much time or memory after which a row counts as unreadable."""
_REST = 5.0
"""Seconds, times the failures of a row, until a subscription reads it again."""
_MOST_KNOWN = 1000
"""The number of rows, the latest ones, whose failures a subscription remembers."""
_FRESH = 1 / 20
"""The part of a lease that may have passed when a delivery is returned, because the consumer counts from then on."""
TOO_LARGE = "its JSON text is larger than 256 MiB"


class UnreadMessages:
    """The messages of one subscription that are claimed and not yet delivered. Their leases are renewed meanwhile.

    Attributes:
        since: when the oldest of their leases was claimed or renewed, on the monotonic clock.

    Args:
        listener: the subscription's connection.
        statements: the statements of its schema.
        lease: seconds for which a message is claimed.
        release: makes deliveries ready again after a delay in seconds, without counting their attempt.
        clock: returns monotonic seconds. Default: the machine's clock.
    """

    def __init__(
        self,
        listener: Listener,
        statements: Statements,
        lease: float,
        release: Callable[[Sequence[Delivery], float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.since = math.inf
        self._listener = listener
        self._statements = statements
        self._lease = lease
        self._release = release
        self._clock = clock
        self._groups: deque[list[Delivery]] = deque()
        self._ready: list[Delivery] = []
        self._failures: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._groups or self._ready)

    @property
    def waiting(self) -> list[Delivery]:
        """All messages; those whose content was read come first."""
        return [*self._ready, *(delivery for group in self._groups for delivery in group)]

    @property
    def renew_at(self) -> float:
        """When a third of the oldest lease has passed, on the monotonic clock; infinite without messages."""
        return self.since + self._lease / 3 if self else math.inf

    @property
    def is_due(self) -> bool:
        """Whether the leases must be renewed."""
        return self._clock() >= self.renew_at

    @property
    def remembered_failures(self) -> int:
        """The number of rows whose failures are remembered."""
        return len(self._failures)

    def add(self, claimed: list[Delivery], began: float) -> None:
        """Keep messages until `read` returns them. Reading all of them in one statement has failed.

        Args:
            claimed: the messages, without their content.
            began: when the claim began, on the monotonic clock.
        """
        if claimed:
            self.since = min(self.since, began) if self else began
        middle = (len(claimed) + 1) // 2
        self._groups.extend(filter(None, (claimed[:middle], claimed[middle:])))

    def read(self, limit: int, hurried: Callable[[], bool]) -> list[Delivery]:
        """Return deliveries with their payload or problem. Their leases belong to this subscription and are fresh.

        It returns fewer than `limit` as soon as a third of a lease has passed.

        Args:
            limit: the number of deliveries at most.
            hurried: returns True as soon as the caller must do something else.

        Raises:
            TransportError: a statement failed; call `read` again later.
        """
        if self.is_due and not hurried():
            self.renew()
        try:
            while self._groups and len(self._ready) < limit and not hurried() and not self.is_due:
                room = limit - len(self._ready)
                group = self._groups.popleft()
                self._put_back(group[room:])
                self._read(group[:room], hurried)
        except TransportError:
            if not self._ready:
                raise
        if self._ready and self._clock() > self.since + self._lease * _FRESH:
            if hurried():
                return []
            self.renew()
        if self.is_due:
            return []
        deliveries, self._ready = self._ready[:limit], self._ready[limit:]
        return deliveries

    def renew(self) -> None:
        """Renew the leases, and drop the messages whose leases were lost."""
        began = self._clock()
        parameters = {**fence_columns(self.waiting), "lease": self._lease}
        rows = self._listener.execute("renew leases", self._statements["renew"], parameters)
        self.record_renewal(fences_in(rows), began)

    def record_renewal(self, kept: Container[Fence], began: float) -> None:
        """Drop the messages that are not among `kept`. The leases of the others were renewed at `began` or later."""
        self._ready = [delivery for delivery in self._ready if fence_of(delivery) in kept]
        groups = [[delivery for delivery in group if fence_of(delivery) in kept] for group in self._groups]
        self._groups = deque(group for group in groups if group)
        self.since = began

    def _read(self, group: list[Delivery], hurried: Callable[[], bool]) -> None:
        try:
            texts = self._texts(group)
        except TransportError as exc:
            self._read_smaller(group, exc)
            return
        held = [delivery for delivery in group if fence_of(delivery) in texts]
        for place, delivery in enumerate(held):
            if (text := texts[fence_of(delivery)]) is not None:
                self._failures.pop(_row_of(delivery), None)
                payload, problem = payload_in(text, delivery.queue)
                self._ready.append(attrs.evolve(delivery, payload=payload, raw=text, problem=problem))
                continue
            if place and (hurried() or self.is_due):
                self._put_back(held[place:])
                return
            self._add_unreadable(held[place:], TOO_LARGE)

    def _read_smaller(self, group: list[Delivery], exc: TransportError) -> None:
        """Split a group that could not be read, or decide about a single message. Raises `exc` in some cases."""
        if not may_be_the_content(exc):
            self._put_back(group)
            raise exc
        if len(group) > 1:
            self._put_back(group[: len(group) // 2], group[len(group) // 2 :])
            if state_of(exc) in MAY_PASS:  # it took long: other work that is due comes first
                raise exc
            return
        if state_of(exc) in MAY_PASS and (failures := self._count_failure(group[0])) < _MAX_FAILURES:
            self._release_later(group[0], _REST * failures)
            raise exc
        self._add_unreadable(group, f"PostgreSQL cannot return it: {cause_of(exc)}")

    def _texts(self, group: Sequence[Delivery]) -> dict[Fence, str | None]:
        return contents_in(self._listener.execute("read messages", self._statements["contents"], fence_columns(group)))

    def _add_unreadable(self, group: list[Delivery], problem: str) -> None:
        """Add the first of a group with its problem and the addresses of its sender.

        Addresses that cannot be read are omitted. If this raises, the whole group must be read again.
        """
        delivery = group[0]
        try:
            rows = self._listener.execute(
                "read the sender of a message", self._statements["digest"], fence_columns([delivery])
            )
        except TransportError as exc:
            if not may_be_the_content(exc):
                self._put_back(group)
                raise
            rows = []
        problem = f"the stored message cannot be read: {problem}"
        self._ready.append(attrs.evolve(delivery, raw=digest_in(rows) or "{}", problem=problem))

    def _count_failure(self, delivery: Delivery) -> int:
        """Count a read that took too much time or memory; return the number of failures of this row."""
        row = _row_of(delivery)
        failures = self._failures.pop(row, 0) + 1
        self._failures[row] = failures
        if len(self._failures) > _MOST_KNOWN:
            del self._failures[next(iter(self._failures))]
        return failures

    def _release_later(self, delivery: Delivery, delay: float) -> None:
        try:
            self._release([delivery], delay)
        except TransportError as exc:
            if not getattr(exc, "fate_unknown", False):
                self._put_back([delivery])
            raise

    def _put_back(self, *groups: list[Delivery]) -> None:
        self._groups.extendleft(group for group in reversed(groups) if group)


def _row_of(delivery: Delivery) -> tuple[str, str]:
    """Return the part of a fence that is the same in every delivery of a row."""
    return delivery.id, delivery.fence
