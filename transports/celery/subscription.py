"""`CelerySubscription`: the consumer's side of the Celery transport.

A delivery is a message that the broker has given to our connection and that we have not acknowledged. There are no
leases on AMQP: a message is ours for as long as the connection lives, and the broker gives it to somebody else when
that breaks. So a settlement publishes first, waits for the confirms, and acknowledges then; and what was running when
the connection broke is an *orphan*: its message is taken back when the broker delivers it to us again, and its outcome
is published in any case, because a doubled callback is better than a lost one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import attrs

from transports.celery.broker import Settings
from transports.celery.envelope import COUNT_HEADER, key_of, read_message
from transports.celery.errors import Unroutable, mapped
from transports.celery.link import Link
from transports.celery.protocol import Outgoing
from transports.celery.settling import Received, again, outgoing
from transports.celery.taps import Arrived
from transports.celery.waits import TICK
from unstract_core.errors import (
    TransportClosed,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)
from unstract_core.transport import Delivery, Settlement, Verdict, check_delay

Key: TypeAlias = tuple[str, int]

_ADOPTION = 3.0
"""Seconds after a new connection in which what was running before may come back to us."""
_MOST_PARKED = 10_000
"""How many messages may wait here for their time; with so many nothing else is taken."""


@attrs.define(eq=False)
class _Held:
    """A delivery of ours; without its `arrived` it is an orphan. `sent` names what of its settlement was confirmed."""

    delivery: Delivery
    received: Received
    arrived: Arrived | None
    sent: set[str] = attrs.field(factory=set)


class CelerySubscription:
    """Owned by one thread; only `wake` may be called from another, or from a signal handler."""

    def __init__(
        self,
        settings: Settings,
        queues: Sequence[str],
        *,
        default_queue: str,
        time_limits: bool,
        transport_closed: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._queues = tuple(queues)
        self._default_queue = default_queue
        self._time_limits = time_limits
        self._transport_closed = transport_closed
        self._held: dict[Key, _Held] = {}
        self._answered: dict[Key, bool] = {}
        self._parked: list[tuple[float, int, Arrived]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._link = Link(settings, self._queues)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` messages; see `unstract_core.Subscription.receive`."""
        self._check_open()
        deadline = time.monotonic() + wait
        with self._working("receive"):
            while True:
                room = limit if len(self._parked) < _MOST_PARKED else 0
                self._give_back(self._link.taps.want(room + self._adoptable()))
                self._link.pump()
                self._adopt()
                parked = len(self._parked)
                deliveries = self._take(limit)
                remaining = deadline - time.monotonic()
                if deliveries or remaining <= 0 or self._link.rung():
                    return deliveries
                if len(self._parked) > parked and room:  # there may be others behind it whose time has come
                    continue
                if self._parked:
                    remaining = min(remaining, max(0.0, self._parked[0][0] - time.monotonic()))
                self._link.wait(remaining)
                self._check_open()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Tell which deliveries are still ours: all of them while the connection lives."""
        self._check_open()
        with contextlib.suppress(TransportError), self._working("renew"):
            self._link.tend()
            self._link.pump()
            self._adopt()
        waiting = self._link.age < _ADOPTION
        held = [self._held.get(_key(delivery)) for delivery in deliveries]
        return [one is not None and (one.arrived is not None or waiting) for one in held]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Publish what follows, wait for the confirms, acknowledge; see `unstract_core.Subscription.settle`.

        Raises the error of the first settlement that could not be carried out; the others are done, and asked for
        again they only say so.
        """
        self._check_open()
        plans = self._plans(settlements)
        try:
            with self._working("settle", fate_unknown=True):
                self._await_orphans(plans)
                errors = self._publish(plans)
                self._acknowledge(plans, errors)
                answers = [self._end(plan, error) for plan, error in zip(plans, errors, strict=True)]
        except TransportError:
            self._let_go(plans)
            raise
        if failures := [error for error in errors if error is not None]:
            for plan, answer, error in zip(plans, answers, errors, strict=True):
                if plan.held is not None and error is None:
                    self._answered[_key(plan.settlement.delivery)] = answer
            self._let_go(plans)
            raise failures[0]
        return answers

    def wake(self) -> None:
        self._link.wake()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            held = [one.arrived for one in self._held.values() if one.arrived is not None]
            self._link.close([*held, *(arrived for _, _, arrived in sorted(self._parked))])

    def _plans(self, settlements: Sequence[Settlement]) -> list[_Plan]:
        """Say what each settlement publishes; of two for one delivery the first counts."""
        seen: set[Key] = set()
        plans: list[_Plan] = []
        for settlement in settlements:
            key = _key(settlement.delivery)
            plans.append(_Plan(settlement, None, {}) if key in seen else self._plan(settlement, key))
            seen.add(key)
        return plans

    def _plan(self, settlement: Settlement, key: Key) -> _Plan:
        check_delay(settlement.delay)
        held = self._held.get(key)
        if held is None:
            return _Plan(settlement, None, {}, self._answered.pop(key, False))
        if settlement.verdict is Verdict.RETRY and not settlement.counted and not self._is_quorum(held):
            return _Plan(settlement, held, {})
        messages = outgoing(held.received, settlement, self._settings, self._default_queue)
        if settlement.verdict is Verdict.RETRY and not settlement.counted:
            returned = again(held.received, retries=held.received.envelope.attempt - 1)
            messages[f"given back {returned.id}"] = returned
        return _Plan(settlement, held, {name: one for name, one in messages.items() if name not in held.sent})

    def _let_go(self, plans: Sequence[_Plan]) -> None:
        """Hold no longer what was to be given back: nobody will settle it again, and the broker is to deliver it."""
        for plan in plans:
            if plan.settlement.verdict is not Verdict.RETRY or plan.settlement.counted:
                continue
            held = self._held.pop(_key(plan.settlement.delivery), None)
            if held is not None and held.arrived is not None:
                with contextlib.suppress(Exception):
                    held.arrived.requeue()

    def _is_quorum(self, held: _Held) -> bool:
        """Quorum queues count what is requeued, and drop it in the end: such a message is sent anew instead."""
        return held.arrived is not None and self._counts_returns(held.arrived)

    def _counts_returns(self, arrived: Arrived) -> bool:
        """Whether its queue is known for a quorum queue; one that nobody told us of shows it once it has counted."""
        return self._settings.is_quorum(arrived.queue) or COUNT_HEADER in arrived.message.headers

    def _await_orphans(self, plans: Sequence[_Plan]) -> None:
        """Give the broker a moment to deliver again what was running when the connection broke."""
        taps = self._link.taps
        if any(one.orphaned for one in plans) and (adoptable := self._adoptable()):
            self._give_back(taps.want(adoptable))
            self._link.pump()
            self._adopt()
            if any(one.orphaned for one in plans):
                raise TransportUnavailable("settle: the connection is new, and the message not delivered again yet")

    def _publish(self, plans: Sequence[_Plan]) -> list[TransportError | None]:
        flat = [(plan, name, message) for plan in plans for name, message in plan.messages.items()]
        errors: dict[int, TransportError] = {}
        if flat:
            outcomes = self._link.broker.publish("settle", [message for _, _, message in flat])
            for (plan, name, _), error in zip(flat, outcomes, strict=True):
                if error is not None:
                    errors.setdefault(id(plan), self._for_good(error) if name.startswith("follow-up") else error)
                elif plan.held is not None:
                    plan.held.sent.add(name)
        return [errors.get(id(plan)) for plan in plans]

    def _for_good(self, error: TransportError) -> TransportError:
        """A callback for a queue that cannot be had is refused for good: to try it for ever would hold up others."""
        if not isinstance(error, TransportNotReady) or (isinstance(error, Unroutable) and self._settings.declare):
            return error
        refused = TransportRefused(str(error))
        refused.__cause__ = error
        return refused

    def _acknowledge(self, plans: Sequence[_Plan], errors: list[TransportError | None]) -> None:
        for plan, error in zip(plans, errors, strict=True):
            held = plan.held
            if held is None or held.arrived is None or error is not None:
                continue
            with mapped("settle: acknowledge", fate_unknown=True):
                if plan.settlement.verdict is Verdict.RETRY and not plan.settlement.counted and not plan.messages:
                    held.arrived.requeue()
                else:
                    held.arrived.ack()

    def _end(self, plan: _Plan, error: TransportError | None) -> bool:
        if plan.held is None:
            return plan.answered
        if error is not None:
            return False
        return self._held.pop(_key(plan.settlement.delivery), None) is not None

    def _take(self, limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        arrived = self._link.taps.arrived
        due = self._due()
        while len(deliveries) < limit and (due or arrived):
            one = due.popleft() if due else arrived.popleft()
            delivery = self._opened(one)
            if delivery is not None:
                deliveries.append(delivery)
        for one in due:
            arrived.appendleft(one)
        return deliveries

    def _opened(self, arrived: Arrived) -> Delivery | None:
        """Read a message; None where its time has not come."""
        envelope = read_message(
            arrived.message, arrived.queue, default_queue=self._default_queue, time_limits=self._time_limits
        )
        received = Received(arrived.message, envelope, arrived.queue)
        if envelope.eta is not None and envelope.problem is None:
            seconds = envelope.eta.timestamp() - time.time()
            if seconds > 0:
                until = time.monotonic() + min(seconds, self._settings.longest_parked)
                heapq.heappush(self._parked, (until, next(self._numbers), arrived))
                return None
        name = envelope.id or f"{arrived.queue}/{next(self._numbers)}"
        if (name, envelope.attempt) in self._held:  # the same task was sent twice
            name = f"{name}/{next(self._numbers)}"
        delivery = envelope.delivery(name, arrived.queue)
        self._held[_key(delivery)] = _Held(delivery, received, arrived)
        return delivery

    def _due(self) -> deque[Arrived]:
        """Return what was parked and may be looked at again; what waits for longer is sent anew, to be held anew."""
        due: deque[Arrived] = deque()
        stale: list[Arrived] = []
        while self._parked and self._parked[0][0] <= time.monotonic():
            _, _, arrived = heapq.heappop(self._parked)
            (stale if arrived.is_later_than(time.time()) else due).append(arrived)
        if stale:
            self._send_anew(stale)
        return due

    def _give_back(self, unwanted: Sequence[Arrived]) -> None:
        """Let others have what nobody here has time for; what is requeued in a quorum queue counts, so not there."""
        anew = [one for one in unwanted if self._counts_returns(one)]
        for one in unwanted:
            if one not in anew:
                one.requeue()
        if anew:
            self._send_anew(anew)

    def _send_anew(self, stale: Sequence[Arrived]) -> None:
        copies: list[Outgoing] = []
        for one in stale:
            envelope = read_message(one.message, one.queue, default_queue=self._default_queue, time_limits=True)
            copies.append(again(Received(one.message, envelope, one.queue), retries=envelope.attempt - 1))
        for one, error in zip(stale, self._link.broker.publish("postpone", copies), strict=True):
            if error is None:
                one.ack()
            else:
                heapq.heappush(self._parked, (time.monotonic() + TICK, next(self._numbers), one))

    def _adoptable(self) -> int:
        """How many messages may come back to us that were ours on the connection before this one."""
        return len(self._orphans()) if self._link.age < _ADOPTION else 0

    def _adopt(self) -> None:
        """Take back the messages of orphans, which the broker has delivered again."""
        arrived = self._link.taps.arrived
        if not arrived or not (orphans := self._orphans()):
            return
        for one in [one for one in arrived if one.redelivered]:
            if (orphan := orphans.pop(one.key, None)) is not None:
                orphan.arrived = one
                arrived.remove(one)

    def _orphans(self) -> dict[tuple[str | None, int], _Held]:
        lost = {key_of(one.received.message): one for one in self._held.values() if one.arrived is None}
        return {key: one for key, one in lost.items() if key[0] is not None}

    @contextlib.contextmanager
    def _working(self, doing: str, *, fate_unknown: bool = False) -> Iterator[None]:
        """Map the errors of the block, and let go of a connection that is of no more use."""
        try:
            with mapped(doing, fate_unknown=fate_unknown):
                yield
        finally:
            if self._link.let_go_if_broken():
                self._lose()

    def _lose(self) -> None:
        """What is held becomes orphans; what was not given out yet is the broker's again."""
        self._parked.clear()
        for held in self._held.values():
            held.arrived = None

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")


@attrs.define(eq=False)
class _Plan:
    """A settlement and what is to be published for it; without `held` it was `answered` before, or is not ours."""

    settlement: Settlement
    held: _Held | None
    messages: dict[str, Outgoing]
    answered: bool = False

    @property
    def orphaned(self) -> bool:
        return self.held is not None and self.held.arrived is None


def _key(delivery: Delivery) -> Key:
    return delivery.id, delivery.attempt
