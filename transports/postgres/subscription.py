"""The consumer's side: claim, renew, settle, and wait for more."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transports.postgres.notifier import Notifier
from transports.postgres.session import Session
from transports.postgres.settling import settle_parameters
from transports.postgres.statements import Statements
from unstract_core.codec import from_wire
from unstract_core.errors import MalformedPayload, TransportClosed, TransportError
from unstract_core.events import emit
from unstract_core.transport import Delivery, Settlement, Verdict
from unstract_core.values import error_text

logger = logging.getLogger(__name__)

_BRING_BACK_INTERVAL = 0.5
_BRING_BACK_LIMIT = 500
_LOOK_AGAIN = 0.05
_SWEEP_INTERVAL = 60.0
_SWEEP_LIMIT = 1000


class PostgresSubscription:
    """Holds one connection of its own, for everything it does. `poll_interval` in seconds."""

    def __init__(
        self,
        session: Session,
        statements: Statements,
        notifier: Notifier,
        queues: Sequence[str],
        *,
        lease: float,
        poll_interval: float,
        closed: Callable[[], bool],
    ) -> None:
        self._session = session
        self._statements = statements
        self._notifier = notifier
        self._queues = list(queues)
        self._claim, self._queue_names = statements.claim(self._queues)
        self._thorough_claim, _ = statements.claim(self._queues, bounded=False)
        self._lease = lease
        self._poll_interval = poll_interval
        self._transport_closed = closed
        self._closed = False
        self._held: set[tuple[str, int]] = set()
        self._bring_back_at = 0.0
        self._sweep_at = time.monotonic() + _SWEEP_INTERVAL

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        deadline = time.monotonic() + wait
        while True:
            self._check_open()
            self._session.forget_heard()
            next_due = math.inf
            if limit > 0:
                if deliveries := self._take(limit, self._claim):
                    return deliveries
                brought, next_due, passed_over = self._bring_back()
                if passed_over:
                    if deliveries := self._take(limit, self._thorough_claim):
                        return deliveries
                    next_due = min(next_due, _LOOK_AGAIN)
                if brought:
                    continue
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._session.wait(min(remaining, self._poll_interval, next_due)):
                self._check_open()
                return ()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        self._check_open()
        held = [delivery for delivery in deliveries if _key(delivery) in self._held]
        rows = self._session.execute(
            "renew leases",
            self._statements["renew"],
            {
                "ids": [int(delivery.id) for delivery in held],
                "attempts": [delivery.attempt for delivery in held],
                "lease": self._lease,
            },
        )
        kept = {(str(msg_id), attempt) for msg_id, attempt in rows}
        self._held.difference_update(key for delivery in held if (key := _key(delivery)) not in kept)
        return [_key(delivery) in kept for delivery in deliveries]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self._check_open()
        first: dict[tuple[str, int], Settlement] = {}
        for one in settlements:
            if (key := _key(one.delivery)) in self._held:
                first.setdefault(key, one)
        batch = list(first.values())
        parameters = settle_parameters(batch)
        # The next holder of what is given back uncounted may have the same attempt: it is never settled by us again.
        self._held.difference_update(key for key, one in first.items() if not one.counted)

        def commit(wake: list[str | None]) -> list[tuple[Any, ...]]:
            return self._session.execute(
                "settle",
                self._statements["settle"],
                {
                    **parameters,
                    "channel": self._notifier.channels.queues,
                    "wake": [queue for queue in wake if queue is not None],
                    "reply_channel": self._notifier.channels.replies,
                    "wake_callers": None in wake,
                },
            )

        rows = self._notifier.announced(_announced(batch), commit)
        self._held.difference_update(first)
        effective = {id(batch[place - 1]) for place, _ in rows if place is not None}
        return [id(one) in effective for one in settlements]

    def wake(self) -> None:
        self._session.wake()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._session.close()

    def _take(self, limit: int, claim: bytes) -> list[Delivery]:
        # Upkeep comes first: if it failed after the claim, what was claimed would be held by nobody for a lease.
        now = time.monotonic()
        if now >= self._bring_back_at:
            self._bring_back()
        if now >= self._sweep_at:
            self._sweep()
        rows = self._session.execute(
            "claim messages", claim, {**self._queue_names, "limit": limit, "lease": self._lease}
        )
        deliveries = [_delivery(*row) for row in rows]
        self._held.update(map(_key, deliveries))
        return deliveries

    def _bring_back(self) -> tuple[int, float, bool]:
        """Return how many rows became ready again, the seconds until the next is due, and whether any are ready now."""
        rows = self._session.execute(
            "bring back expired leases",
            self._statements["bring_back"],
            {"queues": self._queues, "limit": _BRING_BACK_LIMIT},
        )
        ((brought, next_due, passed_over),) = rows
        self._bring_back_at = time.monotonic() + (0.0 if brought == _BRING_BACK_LIMIT else _BRING_BACK_INTERVAL)
        return brought, math.inf if next_due is None else max(0.0, next_due), bool(passed_over)

    def _sweep(self) -> None:
        """Remove expired replies, a bite at a time. Nobody waits for it: when it fails, work is taken all the same."""
        self._sweep_at = time.monotonic() + _SWEEP_INTERVAL
        try:
            rows = self._session.execute(
                "sweep expired replies", self._statements["sweep_replies"], {"limit": _SWEEP_LIMIT}
            )
        except TransportError as exc:
            emit(logger, logging.WARNING, "sweep_failed", error_type=type(exc).__name__, error=error_text(exc))
            return
        if len(rows) == _SWEEP_LIMIT:
            self._sweep_at = time.monotonic() + 1.0

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")


def _key(delivery: Delivery) -> tuple[str, int]:
    return delivery.id, delivery.attempt


def _announced(settlements: Iterable[Settlement]) -> Iterator[str | None]:
    """Yield the queues in which something becomes ready, and None where a caller may be waiting."""
    for one in settlements:
        if one.follow_up is not None and not one.follow_up.delay:
            yield one.follow_up.queue
        if one.verdict is Verdict.RETRY and not one.delay:
            yield one.delivery.queue
        if one.reply is not None:
            yield None


def _delivery(msg_id: int, queue: str, attempt: int, message: str, org_id: str, priority: int) -> Delivery:
    payload, problem = None, None
    try:
        payload = from_wire(message)
    except MalformedPayload as exc:
        problem = str(exc)
    return Delivery(str(msg_id), queue, attempt, payload, message, problem, org_id, priority)
