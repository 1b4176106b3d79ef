"""`PostgresSubscription`: claims, renews and settles messages on its own connection.

While a session holds an old snapshot, no vacuum can remove the rows that were claimed or settled since. So the
statements of a subscription read dead rows only in scans with a ScanBudget: see claim_planner.py and expiry_planner.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from transports.postgres.claim_planner import Attempt, ClaimCancelled, ClaimPlan, ClaimPlanner, ClaimResult, ReadyAgain
from transports.postgres.connection import Rows
from transports.postgres.content_errors import QUERY_CANCELED, may_be_the_content, state_of, was_cancelled
from transports.postgres.listener import Listener
from transports.postgres.notifier import Notifier
from transports.postgres.reply_purger import ReplyPurger
from transports.postgres.requeuer import Requeuer, RequeueResult
from transports.postgres.rows import Fence, delivery_in, fence_columns, fence_of, fences_in, settle_parameters
from transports.postgres.settlement_writer import SettlementWriter
from transports.postgres.statements import Statements
from transports.postgres.unread import UnreadMessages
from unstract_core.errors import TransportClosed, TransportError
from unstract_core.observability.log_events import emit
from unstract_core.transport import Delivery, Settlement, Verdict

logger = logging.getLogger("unstract_wire.postgres")

_CLAIM_AGAIN_IN = 0.05
"""Seconds until the next claim if ready rows were skipped, because others have locked them."""


@attrs.frozen
class _Step:
    """One pass of `receive`. The next step: return, continue at once (`again`), or wait at most `next_in` seconds."""

    done: bool = False
    deliveries: Sequence[Delivery] = ()
    again: bool = False
    next_in: float = math.inf


_NOTHING = _Step(done=True)


class PostgresSubscription:
    """Receives by priority, then first in, first out, among the ready messages.

    A later message may come first in two cases: a message was committed after one with a higher id was claimed, or
    another program made it ready again. This lasts some milliseconds. While a session holds an old snapshot, it lasts
    about a second, and at most 30 s.

    Attributes:
        claims: plans its claims.
        requeuer: makes expired messages ready again.
        purger: removes expired replies.
        unread: the messages that it has claimed without their content.

    Args:
        listener: its connection.
        statements: the statements of its schema.
        notifier: notifies other workers of the messages that a settlement makes ready.
        queues: its queues.
        lease: seconds for which a message is claimed.
        poll_interval: seconds between two claims while it waits.
        closed: returns whether the transport was closed.
        clock: returns monotonic seconds. Default: the machine's clock.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener = listener
        self._statements = statements
        self._writer = SettlementWriter(listener, statements, notifier)
        self._lease = lease
        self._poll_interval = poll_interval
        self._transport_closed = closed
        self._clock = clock
        self._closed = False
        self._in_flight: set[Fence] = set()
        self._renew_at = math.inf
        self._renewal_was_due = False
        self._just_renewed = False
        self._owes_claim = False
        self._without_content = False
        self.claims = ClaimPlanner(statements, queues, prepared=listener.prepares, clock=clock)
        self.requeuer = Requeuer(listener, statements, queues, self.claims, clock=clock)
        self.purger = ReplyPurger(listener, statements, clock=clock)
        self.unread = UnreadMessages(listener, statements, lease, self._release, clock=clock)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        deadline = self._clock() + wait
        # A caller with messages in flight renews them first. Deliveries that it has forgotten must not end each call.
        # If a renewal took so long that the next one is due, one other statement comes before the next renewal.
        self._renewal_was_due = self._clock() >= self._renew_at and not self._just_renewed
        self._just_renewed = False
        while True:
            self._check_open()
            self._listener.forget_notifications()
            step = self._claim_or_upkeep(limit, deadline) if limit > 0 else self._renew_unread()
            if step.done:
                return step.deliveries
            if step.again:
                continue
            remaining = deadline - self._clock()
            if remaining <= 0 or self._listener.wait(min(remaining, self._poll_interval, step.next_in)):
                self._check_open()
                return ()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        self._check_open()
        began = self._clock()
        self._renew_at, self._just_renewed = began + self._lease / 3, True
        waiting = self.unread.waiting
        held = [delivery for delivery in deliveries if fence_of(delivery) in self._in_flight]
        parameters = {**fence_columns([*held, *waiting]), "lease": self._lease}
        kept = fences_in(self._listener.execute("renew leases", self._statements["renew"], parameters))
        self._in_flight.difference_update(fence for delivery in held if (fence := fence_of(delivery)) not in kept)
        if waiting:
            self.unread.record_renewal(kept, began)
        return [fence_of(delivery) in kept for delivery in deliveries]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self._check_open()
        first: dict[Fence, Settlement] = {}
        for settlement in settlements:
            if (fence := fence_of(settlement.delivery)) in self._in_flight:
                first.setdefault(fence, settlement)
        batch = list(first.values())
        parameters = settle_parameters(batch)
        # The next holder of a released message may have the same attempt number. So this subscription never settles it
        # again, unless the release certainly had no effect.
        released = {fence for fence, settlement in first.items() if not settlement.counted}
        self._in_flight -= released
        try:
            rows = self._writer.write(batch, parameters)
        except TransportError as exc:
            if not getattr(exc, "fate_unknown", False):
                self._in_flight |= released
            raise
        self._in_flight.difference_update(first)
        effective = {id(batch[row.place - 1]) for row in rows if row.place is not None and row.kept is None}
        for row in rows:
            if row.place is not None and row.kept is not None:
                kept = batch[row.place - 1].delivery
                fields = {"queue": kept.queue, "id": kept.id, "attempt": kept.attempt}
                emit(logger, logging.ERROR, "row_kept", **fields)
        retries = [settlement for settlement in batch if settlement.verdict is Verdict.RETRY]
        delayed = [each for each in retries if each.delay and id(each) in effective]
        self.requeuer.planner.is_due_soon([(int(each.delivery.id), each.delay) for each in delayed])
        for delivery in [each.delivery for each in retries if not each.delay]:
            self.claims.record(ReadyAgain(delivery.queue, delivery.priority, int(delivery.id)))
        return [id(settlement) in effective for settlement in settlements]

    def wake(self) -> None:
        self._listener.wake()

    def close(self) -> None:
        """Stop receiving, and release the messages that were claimed and not delivered, without counting the attempt.

        Deliveries in flight are ready again when their leases expire. The same is true for all others if the server
        does not answer, or if the process exits at once (SystemExit is being raised).
        """
        if self._closed:
            return
        try:
            if self.unread and not isinstance(sys.exc_info()[1], SystemExit):
                with contextlib.suppress(TransportError):
                    self._release(self.unread.waiting, 0.0)
        finally:
            self._closed = True
            self._listener.close()

    def _claim_or_upkeep(self, limit: int, deadline: float) -> _Step:
        """Claim messages; before that, requeue expired ones and purge replies if these are due."""
        if self.unread and ((deliveries := self._read(limit)) or self._must_stop):
            return _Step(done=True, deliveries=deliveries)
        # Upkeep comes before the claim: if it failed afterwards, the claimed messages would be lost for a lease.
        ahead = max(0.0, min(deadline - self._clock(), self._poll_interval))
        # A renewal that is due comes before any other statement, so the claim waits for the next call.
        requeued = None if self._owes_claim else self._upkeep(ahead)
        self._owes_claim = requeued is not None and self._must_renew
        if self._owes_claim:
            return _NOTHING
        if (step := self._claim_step(limit, Attempt.FIRST, Attempt.IF_CHEAP)) is not None:
            return step
        result = requeued if requeued is not None else self._requeue(ahead)
        if result.requeued:
            return _Step(again=True)
        next_in = result.next_in
        if result.any_ready:
            if (step := self._claim_step(limit, Attempt.WHOLE, Attempt.UNBOUNDED, check_first=True)) is not None:
                return step
            next_in = min(next_in, _CLAIM_AGAIN_IN)
        return _Step(next_in=min(next_in, self.claims.sees_more_in, self.purger.next_in))

    def _claim_step(self, limit: int, *attempts: Attempt, check_first: bool = False) -> _Step | None:
        """Make attempts until one claims messages or the call must end; None if neither happens."""
        for attempt in attempts:
            if check_first and self._must_stop:
                return _NOTHING
            if deliveries := self._claim(limit, attempt):
                return _Step(done=True, deliveries=deliveries)
            if not check_first and self._must_stop:
                return _NOTHING
        return None

    def _renew_unread(self) -> _Step:
        """Renew the messages that were claimed without their content, while the consumer asks for none."""
        if not self.unread:
            return _Step()
        if self._must_renew:
            return _NOTHING
        if self.unread.is_due:
            self.unread.renew()
        return _Step(next_in=max(0.0, self.unread.renew_at - self._clock()))

    def _upkeep(self, ahead: float) -> RequeueResult | None:
        """Requeue expired messages and purge replies, each if due. Return the result of the former, if it ran."""
        purge = self.purger.is_due
        requeued = self._requeue(ahead) if self.requeuer.planner.is_due else None
        if purge and not self._must_renew:
            self.purger.run()
        return requeued

    def _requeue(self, ahead: float) -> RequeueResult:
        return self.requeuer.run(ahead, lambda: self._must_renew)

    @property
    def _must_renew(self) -> bool:
        """Whether a renewal became due in this call: a third of the lease after the last one, or after the claim."""
        return bool(self._in_flight) and not self._renewal_was_due and self._clock() >= self._renew_at

    @property
    def _must_stop(self) -> bool:
        return self._must_renew or bool(self.unread)

    def _claim(self, limit: int, attempt: Attempt) -> list[Delivery]:
        """Make a claim, if the planner has one for this attempt, and return the deliveries with their content."""
        plan = self.claims.plan(limit, attempt)
        if plan is None:
            return []
        try:
            if plan.needs_ready_queues:
                ready = self._listener.execute("look for queues", self._statements["queues_with_ready"], {})
                plan = self.claims.plan(limit, attempt, ready=[(queue, priority) for queue, priority in ready])
            rows = [] if self.claims.reads_queues_first and self._must_renew else self._execute_claim(plan)
        except TransportError as exc:
            if was_cancelled(exc):
                self.claims.record(ClaimCancelled(plan))
            raise
        claimed = [delivery_in(row) for row in rows]
        self.claims.record(ClaimResult(plan, claimed))
        self.unread.add([delivery for delivery in claimed if not delivery.raw], plan.began)
        deliveries = self._deliver([delivery for delivery in claimed if delivery.raw], plan.began)
        return deliveries or (self._read(plan.limit) if self.unread and not self._must_renew else [])

    def _execute_claim(self, plan: ClaimPlan) -> Rows:
        """Claim messages. If the content of one may have caused a failure, claim them without their content."""
        if plan.statement is None:
            return []
        parameters: dict[str, Any] = {**plan.parameters, "lease": self._lease}
        without_content, self._without_content = self._without_content, False
        if not without_content:
            try:
                return self._listener.execute("claim messages", plan.statement, parameters)
            except TransportError as exc:
                if not may_be_the_content(exc):
                    raise
                if state_of(exc) == QUERY_CANCELED or self._must_renew:  # it took long: other work comes first
                    self._without_content = True
                    raise
        statement = self._statements.without_content(plan.statement)
        return self._listener.execute("claim messages", statement, parameters)

    def _read(self, limit: int) -> list[Delivery]:
        deliveries = self.unread.read(limit, lambda: self._must_renew)
        return self._deliver(deliveries, self.unread.since)

    def _release(self, deliveries: Sequence[Delivery], delay: float) -> None:
        """Release messages that were claimed and not delivered, without counting their attempt.

        Args:
            deliveries: the messages. They are not in flight afterwards, also if this raises.
            delay: seconds until they are ready.
        """
        fences = set(map(fence_of, deliveries))
        self._in_flight |= fences
        try:
            self.settle([Settlement(each, Verdict.RETRY, delay=delay, counted=False) for each in deliveries])
        finally:
            self._in_flight -= fences

    def _deliver(self, deliveries: list[Delivery], began: float) -> list[Delivery]:
        """Record deliveries, whose leases began at `began` or later, as in flight, and return them."""
        if deliveries:
            renew_at = began + self._lease / 3
            self._renew_at = min(self._renew_at, renew_at) if self._in_flight else renew_at
        self._in_flight.update(map(fence_of, deliveries))
        return deliveries

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")
