"""The consumer's side: claim, renew, settle, and wait for more.

While any session holds an old snapshot, nothing that was claimed or settled can be vacuumed away. So no statement here
reads dead rows except occasionally, for a small part of the time: claim_planner.py chooses the claim, and expired
leases are looked for beyond those that were found before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import psycopg

from transports.postgres.claim_planner import (
    LONGEST_REST,
    MERGED,
    RECENT_INTERVAL,
    ClaimPlan,
    ClaimPlanner,
    ExpiryPlanner,
    Scan,
    ScanBudget,
)
from transports.postgres.listener import Listener
from transports.postgres.notifier import Notifier
from transports.postgres.rows import settle_parameters
from transports.postgres.statements import Statements
from transports.postgres.unread import Unread, fences, may_be_the_content, payload_of, state_of
from unstract_core.errors import TransportClosed, TransportError
from unstract_core.observability.log_events import emit
from unstract_core.transport import Delivery, Settlement, Verdict
from unstract_core.values import error_text

logger = logging.getLogger("unstract_wire.postgres")

_Key: TypeAlias = tuple[str, int, str]

_REQUEUE_INTERVAL = 0.5
_REQUEUE_LIMIT = 500
_COMMIT_MARGIN = 2.0  # seconds that a claim or a settlement may take to be committed
_SLOW_COMMIT_MARGIN = 20.0  # seconds that may take, where a transaction is slow: looked for once a second
_RETRY_CLAIM_IN = 0.05
_PURGE_INTERVAL = 60.0
_PURGE_LIMIT = 1000
_PURGE_REST = 4.0
"""A sweep that has more to do goes on after this many times the time that its last statement took."""


class PostgresSubscription:
    """Holds one connection of its own, for everything it does. `poll_interval` in seconds.

    Higher priority first, then first in, first out, of what is ready. Only a message that was committed after one with
    a higher id was taken, or that somebody else made ready again, can be overtaken: for some milliseconds as a rule;
    while a session holds an old snapshot for a second, or half a minute at the longest (claim_planner.py).
    """

    def __init__(
        self,
        listener: Listener,
        statements: Statements,
        notifier: Notifier,
        queues: Sequence[str],
        *,
        lease: float,
        poll_interval: float,
        closed: Callable[[], bool],
    ) -> None:
        self._listener = listener
        self._statements = statements
        self._notifier = notifier
        self._queues = list(queues)
        self._claims = ClaimPlanner(statements, self._queues, prepared=listener.prepares)
        self._lease = lease
        self._poll_interval = poll_interval
        self._transport_closed = closed
        self._closed = False
        self._held: set[_Key] = set()
        self._renew_at = math.inf
        self._renewal_was_due = False
        self._just_renewed = False
        self._owes_claim = False
        self._unread = Unread(listener, statements, lease, self._release)
        self._careful = False
        self._requeue_at = 0.0
        self._full_scan_budget = ScanBudget()
        self._recent_scan_budget = ScanBudget(RECENT_INTERVAL)
        self._wide = len(self._queues) > MERGED
        self._expiry = ExpiryPlanner([""] if self._wide else self._queues)
        self._purge_at = time.monotonic() + _PURGE_INTERVAL
        self._purged_until = -math.inf

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        deadline = time.monotonic() + wait
        # A caller that has something in flight renews it first. What it has forgotten must not end each receive.
        # After a renewal that took so long that the next one is due, one statement comes before that.
        self._renewal_was_due = time.monotonic() >= self._renew_at and not self._just_renewed
        self._just_renewed = False
        while True:
            self._check_open()
            self._listener.forget_notifications()
            next_due = math.inf
            if limit > 0:
                if self._unread and ((deliveries := self._read(limit)) or self._must_renew or self._unread):
                    return deliveries
                # Upkeep comes first: if it failed after the claim, what was claimed would be nobody's for a lease.
                ahead = max(0.0, min(deadline - time.monotonic(), self._poll_interval))
                # A renewal that is due comes before any other statement, so there the rest waits for the next call.
                found = None if self._owes_claim else self._kept_up(ahead)
                self._owes_claim = found is not None and self._must_renew
                if self._owes_claim:
                    return ()
                if deliveries := self._claimed(self._claims.next(time.monotonic()), limit):
                    return deliveries
                if self._must_renew or self._unread:
                    return ()
                if (claim := self._claims.otherwise()) and (deliveries := self._claimed(claim, limit)):
                    return deliveries
                if self._must_renew or self._unread:
                    return ()
                requeued, next_due, passed_over = found or self._requeue_expired(ahead)
                if requeued:
                    continue
                if passed_over:
                    for claim in self._claims.last_resorts():
                        if self._must_renew or self._unread:
                            return ()
                        if deliveries := self._claimed(claim, limit):
                            return deliveries
                    next_due = min(next_due, _RETRY_CLAIM_IN)
                next_due = min(next_due, self._claims.sees_more_in(time.monotonic()))
                if self._purged_until > -math.inf:
                    next_due = min(next_due, max(0.0, self._purge_at - time.monotonic()))
            elif self._unread:
                if self._must_renew:
                    return ()
                if self._unread.is_due:
                    self._unread.renew()
                next_due = max(0.0, self._unread.renew_at - time.monotonic())
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._listener.wait(min(remaining, self._poll_interval, next_due)):
                self._check_open()
                return ()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        self._check_open()
        began = time.monotonic()
        self._renew_at, self._just_renewed = began + self._lease / 3, True
        waiting = self._unread.waiting
        held = [delivery for delivery in deliveries if _key(delivery) in self._held]
        rows = self._listener.execute(
            "renew leases",
            self._statements["renew"],
            {**fences([*held, *waiting]), "lease": self._lease},
        )
        kept = {(str(msg_id), attempt, enqueued.hex()) for msg_id, attempt, enqueued in rows}
        self._held.difference_update(key for delivery in held if (key := _key(delivery)) not in kept)
        if waiting:
            self._unread.renewed(kept, began)
        return [_key(delivery) in kept for delivery in deliveries]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self._check_open()
        first: dict[_Key, Settlement] = {}
        for one in settlements:
            if (key := _key(one.delivery)) in self._held:
                first.setdefault(key, one)
        batch = list(first.values())
        parameters = settle_parameters(batch)
        # The next holder of what is given back uncounted may have the same attempt: it is never settled by us again,
        # unless nothing took effect for certain.
        given_back = {key for key, one in first.items() if not one.counted}
        self._held -= given_back

        def commit(wake: list[str | None]) -> list[tuple[Any, ...]]:
            return self._listener.execute(
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

        try:
            rows = self._notifier.announced(_announced(batch), commit)
        except TransportError as exc:
            if not getattr(exc, "fate_unknown", False):
                self._held |= given_back
            raise
        self._held.difference_update(first)
        effective = {id(batch[place - 1]) for place, kept in rows if place is not None and kept is None}
        later = [one for one in batch if one.verdict is Verdict.RETRY and one.delay and id(one) in effective]
        self._expiry.is_due_soon(time.monotonic(), [(int(one.delivery.id), one.delay) for one in later])
        for kept in (batch[place - 1].delivery for place, kept in rows if place is not None and kept is not None):
            fields = {"queue": kept.queue, "id": kept.id, "attempt": kept.attempt}
            emit(logger, logging.ERROR, "row_kept", **fields)
        for one in batch:
            if one.verdict is Verdict.RETRY and not one.delay:
                self._claims.became_ready(one.delivery.queue, one.delivery.priority, int(one.delivery.id))
        return [id(one) in effective for one in settlements]

    def wake(self) -> None:
        self._listener.wake()

    def close(self) -> None:
        """Stop receiving, and release messages that were claimed and not delivered: their attempt is not counted.

        Deliveries in flight come back when their lease ends. So does everything if the server does not answer, or if
        the process exits at once (SystemExit is being raised).
        """
        if self._closed:
            return
        try:
            if self._unread and not isinstance(sys.exc_info()[1], SystemExit):
                with contextlib.suppress(TransportError):
                    self._release(self._unread.waiting, 0.0)
        finally:
            self._closed = True
            self._listener.close()

    def _kept_up(self, ahead: float) -> tuple[int, float, bool] | None:
        """Do what is to be done now and then; return what `_bring_back` has found, if it was its time."""
        now = time.monotonic()
        found = self._requeue_expired(ahead) if now >= self._requeue_at else None
        if now >= self._purge_at and not self._must_renew:
            self._purge_replies()
        return found

    @property
    def _must_renew(self) -> bool:
        """Whether a renewal has become due in this receive: a third of the lease after the last one, or the claim."""
        return bool(self._held) and not self._renewal_was_due and time.monotonic() >= self._renew_at

    def _claimed(self, claim: ClaimPlan, limit: int) -> list[Delivery]:
        began = time.monotonic()
        rows: list[tuple[Any, ...]] = []
        with _recording_cancellation(self._claims.pace_of(claim)):
            if self._claims.many and claim.scan is Scan.WHOLE:
                ready = self._listener.execute("look for queues", self._statements["queues_with_ready"], {})
                claim = self._claims.choose(ready, claim)
            limit = self._claims.most(limit)
            if self._claims.queues and not (self._claims.many and self._must_renew):
                rows = self._claim(claim.statement, {**claim.parameters, "limit": limit, "lease": self._lease})
        ended = time.monotonic()
        claimed = [_delivery(*row) for row in rows]
        self._claims.made(claim, limit, claimed, began, ended)
        self._unread.add([one for one in claimed if not one.raw], began)
        deliveries = self._hold([one for one in claimed if one.raw], began)
        return deliveries or (self._read(limit) if self._unread and not self._must_renew else [])

    def _claim(self, statement: bytes, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Claim messages; without their content after a failure that the content of one of them can have caused."""
        careful, self._careful = self._careful, False
        if not careful:
            try:
                return self._listener.execute("claim messages", statement, parameters)
            except TransportError as exc:
                if not may_be_the_content(exc):
                    raise
                if state_of(exc) == "57014" or self._must_renew:  # it took long: what else is due comes first
                    self._careful = True
                    raise
        return self._listener.execute("claim messages", self._statements.without_content(statement), parameters)

    def _read(self, limit: int) -> list[Delivery]:
        deliveries = self._unread.read(limit, lambda: self._must_renew)
        return self._hold(deliveries, self._unread.since)

    def _release(self, deliveries: Sequence[Delivery], delay: float) -> None:
        """Make messages ready again that were claimed and not delivered, without counting their attempt.

        Args:
            deliveries: the messages; if the call raises, this subscription does not count them as in flight either.
            delay: seconds until they are ready.
        """
        keys = set(map(_key, deliveries))
        self._held |= keys
        try:
            self.settle([Settlement(one, Verdict.RETRY, delay=delay, counted=False) for one in deliveries])
        finally:
            self._held -= keys

    def _hold(self, deliveries: list[Delivery], began: float) -> list[Delivery]:
        """Note deliveries that are returned to the consumer, whose leases are not older than `began`."""
        if deliveries:
            renew_at = began + self._lease / 3
            self._renew_at = min(self._renew_at, renew_at) if self._held else renew_at
        self._held.update(map(_key, deliveries))
        return deliveries

    def _requeue_expired(self, ahead: float) -> tuple[int, float, bool]:
        """Return how many rows became ready again, the seconds until more is to be done, and whether any are ready now.

        It reads all claimed rows where that takes a moment. Where they are many, it reads them in parts, for a small
        share of the time, and in between those that are due and those that are new.
        """
        whole, in_parts = time.monotonic() >= self._full_scan_budget.due_at, self._expiry.in_parts
        requeued, next_due, any_ready = self._requeue_some(ahead, whole=whole)
        if whole and (in_parts or self._expiry.in_parts) and requeued < _REQUEUE_LIMIT and not self._must_renew:
            more, next_due, _ = self._requeue_some(ahead, whole=False)
            requeued += more
        return requeued, next_due, any_ready

    def _requeue_some(self, ahead: float, *, whole: bool) -> tuple[int, float, bool]:
        """Do so for a part of all claimed rows, or for those that are due and those that are new."""
        began = time.monotonic()
        back = began >= self._recent_scan_budget.due_at
        parameters: dict[str, Any] = {"queues": self._queues, "limit": _REQUEUE_LIMIT, "ahead": LONGEST_REST}
        if whole:
            parameters |= self._expiry.next_part()
        else:
            parameters |= self._expiry.due_and_new(began, ahead, _SLOW_COMMIT_MARGIN if back else _COMMIT_MARGIN)
        pace = self._full_scan_budget if whole else self._recent_scan_budget if back else None
        highest = self._claims.highest
        name = ("requeue_expired" if whole else "requeue_expired_recent") + ("_any_queue" if self._wide else "")
        with _recording_cancellation(pace):
            rows = self._listener.execute("requeue expired messages", self._statements[name], parameters)
        ended = time.monotonic()
        ((requeued, next_due, first_ready, lowest, last, newest, read, soon, cut),) = rows
        if pace is not None:
            pace.took(began, ended)
        if first_ready is not None:
            self._claims.none_ready_above(first_ready)
        for queue, priority, msg_id in lowest or ():
            self._claims.became_ready(queue, priority, msg_id)
        seen_all = read < parameters["window"] if whole else cut is None
        if requeued < _REQUEUE_LIMIT:
            self._requeue_at = ended + _REQUEUE_INTERVAL
            if whole:
                self._expiry.read_part(ended, last, newest, to_the_end=seen_all)
            else:
                self._expiry.read_new(ended, parameters["known"], highest if seen_all else cut)
            self._expiry.is_due_soon(ended, soon or ())
        else:
            self._requeue_at = 0.0
        seen_all = seen_all and whole
        again_at = math.inf if seen_all else self._full_scan_budget.due_at
        if not whole and not back:
            again_at = min(again_at, self._recent_scan_budget.due_at)
        next_due = math.inf if next_due is None else next_due
        if not seen_all:
            next_due = min(next_due, self._expiry.next_due(ended))
        any_ready = bool(self._claims.queues) if self._wide else bool(first_ready)
        return requeued, max(0.0, min(again_at - ended, next_due)), any_ready

    def _purge_replies(self) -> None:
        """Remove expired replies, a bite at a time. Nobody waits for it: when it fails, work is taken all the same."""
        self._purge_at = time.monotonic() + _PURGE_INTERVAL
        parameters = {"limit": _PURGE_LIMIT, "since": self._purged_until}
        self._purged_until = -math.inf
        began = time.monotonic()
        try:
            rows = self._listener.execute("purge expired replies", self._statements["purge_replies"], parameters)
        except TransportError as exc:
            emit(logger, logging.WARNING, "sweep_failed", error_type=type(exc).__name__, error=error_text(exc))
            return
        if len(rows) == _PURGE_LIMIT:
            ended = time.monotonic()
            self._purge_at = ended + _PURGE_REST * (ended - began)
            self._purged_until = max(until for (until,) in rows)

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")


@contextlib.contextmanager
def _recording_cancellation(pace: ScanBudget | None) -> Iterator[None]:
    """Note where the server cancels the statement inside: one that is away says nothing about how long it takes."""
    began = time.monotonic()
    try:
        yield
    except TransportError as exc:
        if pace is not None and isinstance(exc.__cause__, psycopg.errors.QueryCanceled):
            pace.failed(began, time.monotonic())
        raise


def _key(delivery: Delivery) -> _Key:
    return delivery.id, delivery.attempt, delivery.fence


def _announced(settlements: Iterable[Settlement]) -> Iterator[str | None]:
    """Yield the queues in which something becomes ready, and None where a caller may be waiting."""
    for one in settlements:
        if one.follow_up is not None and not one.follow_up.delay:
            yield one.follow_up.queue
        if one.verdict is Verdict.RETRY and not one.delay:
            yield one.delivery.queue
        if one.reply is not None:
            yield None


def _delivery(
    msg_id: int, queue: str, attempt: int, message: str | None, org_id: str, priority: int, enqueued: bytes
) -> Delivery:
    """Return a claimed row as a delivery; with nothing in `raw` where its content was not returned."""
    payload, problem = (None, None) if message is None else payload_of(message, queue)
    return Delivery(
        str(msg_id), queue, attempt, payload, message or "", problem, org_id, priority, fence=enqueued.hex()
    )
