"""`CelerySubscription`: the consumer's side of the Celery transport.

A delivery is a message that the broker has given to our connection and that we have not acknowledged. There are no
leases on AMQP: a message is ours for as long as the connection lives, and the broker gives it to somebody else when
that breaks. So a settlement publishes first, waits for the confirms, and acknowledges then; and what was running when
the connection broke waits for its redelivery: its message is taken back when the broker delivers it to us again, and
its outcome is published in any case, because a doubled callback is better than a lost one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

import attrs
from kombu.message import Message as Raw

from transports.celery.amqp_patches import TICK
from transports.celery.broker import BrokerSettings
from transports.celery.connection import BrokerConnection
from transports.celery.consumers import Incoming
from transports.celery.decode import Envelope, key_of, read_message
from transports.celery.encode import Outgoing
from transports.celery.errors import InDoubt, Nacked, Unroutable, mapped
from transports.celery.settling import Received, again, outgoing
from unstract_core.errors import (
    TransportClosed,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)
from unstract_core.observability.log_events import emit
from unstract_core.transport import Delivery, Settlement, Verdict, check_delay

logger = logging.getLogger("unstract_wire.celery")

Key: TypeAlias = tuple[str, int]

_REDELIVERY_WINDOW = 3.0
"""Seconds after a new connection in which what was running before may come back to us."""
_MAX_DELAYED = 10_000
"""How many messages may wait here for their time; of more, those that have longest to wait are sent again."""
_THINNED = 500
"""How many are sent again at once."""
_ROUND = 5.0
"""Seconds without taking more, after what was sent again has come back: then all that is in the queue was seen."""
_MOST_UNSTARTED = 20_000
_UNSTARTED_FOR = 3600.0
"""Of how many messages, and for how many seconds, is remembered that they went back without having been started."""
_GOODBYE = 5.0
"""Seconds that a broker is given to answer when messages are given back at the end."""
_GIVEN_BACK = "given back"
"""What the copy of a message is called that goes back to a queue that counts."""
_MOST_STUCK = 3
"""How many messages of one queue may wait for room in another one before no more of it are taken."""
_TAKEN_EVERY = 0.5
"""Seconds after which some of them are taken all the same."""
_MOST_STUCK_ITSELF = 1000
"""The same of a queue that is full itself, and only shrinks when more is taken."""


@attrs.define(eq=False)
class InFlightDelivery:
    """A delivery of ours; without `incoming` it waits for its redelivery. `sent` names its confirmed messages.

    `in_doubt` is what was handed to a broker that will confirm it when it takes messages again, `full` the queue that
    has no room for what follows, `unstarted` as in Incoming. `asked` is when the consumer last showed that it has this
    delivery, on the monotonic clock.
    """

    delivery: Delivery
    received: Received
    incoming: Incoming | None
    sent: set[str] = attrs.field(factory=set)
    in_doubt: dict[str, int] = attrs.field(factory=dict)
    full: str = ""
    unstarted: int = 0
    asked: float = attrs.field(factory=time.monotonic)


class CelerySubscription:
    """Owned by one thread; only `wake` may be called from another, or from a signal handler."""

    def __init__(
        self,
        settings: BrokerSettings,
        queues: Sequence[str],
        *,
        lease: float,
        default_queue: str,
        time_limits: bool,
        transport_closed: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._queues = tuple(queues)
        self._forgotten_after = lease + settings.confirm_timeout
        self._default_queue = default_queue
        self._time_limits = time_limits
        self._transport_closed = transport_closed
        self._in_flight: dict[Key, InFlightDelivery] = {}
        self._answered: dict[Key, bool] = {}
        self._delayed: list[tuple[float, int, Incoming]] = []
        self._sent_again: set[str | None] = set()
        self._thin_out_at = 0.0
        self._logged_crowded = False
        self._take_at: dict[str, float] = {}
        self._full: set[str] = set()
        self._unstarted: OrderedDict[tuple[str | None, int], tuple[int, float]] = OrderedDict()
        self._numbers = itertools.count()
        self._closed = False
        self._connection = BrokerConnection(settings, self._queues)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` messages; see `unstract_core.Subscription.receive`."""
        self._check_open()
        deadline = time.monotonic() + wait
        with self._working("receive"):
            while True:
                room, blocked = self._room(limit), self._connection.blocked
                paused = self._paused()
                if not blocked:
                    self._release(self._connection.consumers.want(room + self._redeliveries_expected(), paused))
                self._connection.pump()
                self._match_redelivered()
                delayed = len(self._delayed)
                deliveries = self._take(limit, paused) if not self._connection.blocked else []
                if self._delayed and not self._connection.blocked:
                    self._gather()
                    self._thin_out(limit)
                remaining = deadline - time.monotonic()
                if deliveries or remaining <= 0 or self._connection.woken():
                    return deliveries
                if len(self._delayed) > delayed and room:  # there may be others behind it whose time has come
                    continue
                if self._delayed and not blocked:
                    remaining = min(remaining, max(0.0, self._delayed[0][0] - time.monotonic()))
                self._connection.wait(remaining)
                self._check_open()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Return which deliveries are still ours: all of them while the connection lives."""
        self._check_open()
        with contextlib.suppress(TransportError), self._working("renew"):
            self._connection.tend()
            self._connection.pump()
            self._match_redelivered()
        waiting = self._connection.age < _REDELIVERY_WINDOW
        return [self._is_ours(_key(delivery), waiting) for delivery in deliveries]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Publish what follows, wait for the confirms, acknowledge; see `unstract_core.Subscription.settle`.

        Raises the error of the first settlement that could not be carried out; the others are done, and asked for
        again they only say so.
        """
        self._check_open()
        plans = self._plans(settlements)
        try:
            with self._working("settle", fate_unknown=True):
                self._await_redelivery(plans)
                errors = self._publish(plans)
                self._acknowledge(plans, errors)
                answers = [self._end(plan, error) for plan, error in zip(plans, errors, strict=True)]
        except TransportError:
            self._release_settled(plans)
            raise
        if failures := [error for error in errors if error is not None]:
            for plan, answer, error in zip(plans, answers, errors, strict=True):
                if plan.held is not None and error is None:
                    self._answered[_key(plan.settlement.delivery)] = answer
            self._release_settled(plans)
            raise failures[0]
        return answers

    def wake(self) -> None:
        self._connection.wake()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):
                self._return_unstarted()
            held = [one.incoming for one in self._in_flight.values() if one.incoming is not None]
            self._connection.close([*held, *(incoming for _, _, incoming in sorted(self._delayed))])

    def _return_unstarted(self) -> None:
        """Give back what was not started, so that it does not count where the end of a connection does."""
        if not self._connection.live or not self._connection.broker.amqp:
            return
        self._connection.broker.hurry(_GOODBYE)
        consumers = self._connection.consumers
        self._connection.pump()  # a message that is on its way here may show that its queue counts
        if not any(map(consumers.counts_returns, self._queues)):
            return
        consumers.cancel()
        self._delayed, delayed = [], sorted(self._delayed)
        waiting = [*(incoming for _, _, incoming in delayed), *consumers.buffer]
        if counted := [one for one in waiting if consumers.counts_returns(one.queue)]:
            self._send_anew(counted)
        consumers.flush()

    def _is_ours(self, key: Key, waiting: bool) -> bool:
        held = self._in_flight.get(key)
        if held is None:
            return key in self._answered  # it is settled, and its consumer has not asked for the answer yet
        held.asked = time.monotonic()
        return held.incoming is not None or waiting

    def _plans(self, settlements: Sequence[Settlement]) -> list[SettlementPlan]:
        """Say what each settlement publishes; of two for one delivery the first counts."""
        seen: set[Key] = set()
        plans: list[SettlementPlan] = []
        for settlement in settlements:
            key = _key(settlement.delivery)
            plans.append(SettlementPlan(settlement, None, {}) if key in seen else self._plan(settlement, key))
            seen.add(key)
        return plans

    def _plan(self, settlement: Settlement, key: Key) -> SettlementPlan:
        check_delay(settlement.delay)
        held = self._in_flight.get(key)
        if held is None:
            return SettlementPlan(settlement, None, {}, self._answered.pop(key, False))
        held.asked = time.monotonic()
        if settlement.verdict is Verdict.RETRY and not settlement.counted and not self._is_quorum(held):
            return SettlementPlan(settlement, held, {})
        messages = outgoing(held.received, settlement, self._settings, self._default_queue)
        if settlement.verdict is Verdict.RETRY and not settlement.counted:
            returned = again(held.received, retries=held.received.envelope.attempt - 1)
            messages[f"{_GIVEN_BACK} {returned.id}"] = returned
        return SettlementPlan(settlement, held, {name: one for name, one in messages.items() if name not in held.sent})

    def _release_settled(self, plans: Sequence[SettlementPlan]) -> None:
        """Hold no longer what was to be given back: nobody will settle it again, and the broker is to deliver it."""
        for plan in plans:
            if plan.settlement.verdict is not Verdict.RETRY or plan.settlement.counted:
                continue
            held = self._in_flight.pop(_key(plan.settlement.delivery), None)
            if held is None:
                continue
            if held.incoming is not None and self._keeps_given_back(held, held.incoming):
                continue
            self._note_unstarted(held.received.message, held.unstarted)
            if held.incoming is not None:
                with contextlib.suppress(Exception):
                    held.incoming.requeue()

    def _keeps_given_back(self, held: InFlightDelivery, incoming: Incoming) -> bool:
        """Keep a message here while its copy may be accepted later (a requeue would double it), or be sent later."""
        tag = next((tag for name, tag in held.in_doubt.items() if name.startswith(_GIVEN_BACK)), None)
        if tag is None and not (self._connection.blocked and self._is_quorum(held)):
            return False
        incoming.in_doubt = tag
        incoming.unstarted = held.unstarted
        heapq.heappush(self._delayed, (time.monotonic() + TICK, next(self._numbers), incoming))
        return True

    def _is_quorum(self, held: InFlightDelivery) -> bool:
        """Quorum queues count what is requeued, and drop it in the end: such a message is sent anew instead."""
        return held.incoming is not None and self._connection.consumers.counts_returns(held.incoming.queue)

    def _await_redelivery(self, plans: Sequence[SettlementPlan]) -> None:
        """Give the broker a moment to deliver again what was running when the connection broke."""
        consumers = self._connection.consumers
        if any(one.awaits_redelivery for one in plans) and (expected := self._redeliveries_expected()):
            if not self._connection.blocked:
                self._release(consumers.want(expected))
            self._connection.pump()
            self._match_redelivered()
            if any(one.awaits_redelivery for one in plans):
                raise TransportUnavailable("settle: the connection is new, and the message not delivered again yet")

    def _publish(self, plans: Sequence[SettlementPlan]) -> list[TransportError | None]:
        errors: dict[int, TransportError] = {}
        for plan in plans:
            if plan.held is not None and plan.held.in_doubt and (error := self._resolve(plan, plan.held)) is not None:
                errors[id(plan)] = error
        flat = [(plan, name, one) for plan in plans if id(plan) not in errors for name, one in plan.messages.items()]
        if flat:
            outcomes = self._connection.broker.publish("settle", [message for _, _, message in flat])
            for (plan, name, message), error in zip(flat, outcomes, strict=True):
                if error is not None:
                    errors.setdefault(id(plan), self._for_good(error) if name.startswith("follow-up") else error)
                elif plan.held is not None:
                    plan.held.sent.add(name)
                if plan.held is not None:
                    self._note_outcome(plan.held, name, message.queue, error)
            self._log_room([message.queue for (_, _, message), error in zip(flat, outcomes, strict=True) if not error])
        return [errors.get(id(plan)) for plan in plans]

    def _resolve(self, plan: SettlementPlan, held: InFlightDelivery) -> TransportError | None:
        """Take in the broker's late answers about a settlement; returns an error while one is missing."""
        for name, tag in list(held.in_doubt.items()):
            answer = self._connection.broker.answer_to(tag)
            if answer is None:
                return InDoubt("settle: the broker takes no messages for now, and has not confirmed one yet", tag)
            del held.in_doubt[name]
            if answer:
                held.sent.add(name)
                plan.messages.pop(name, None)
        return None

    def _note_outcome(self, held: InFlightDelivery, name: str, queue: str, error: TransportError | None) -> None:
        if isinstance(error, InDoubt):
            held.in_doubt[name] = error.tag
        if isinstance(error, Nacked):
            held.full = queue
            if queue not in self._full:
                self._full.add(queue)
                emit(logger, logging.WARNING, "queue_full", queue=queue, waiting_in=held.delivery.queue)
        elif held.full == queue:
            held.full = ""

    def _log_room(self, taken: Sequence[str]) -> None:
        """Log that a queue has room again, when nothing waits for that any more."""
        for queue in self._full.intersection(taken) if self._full else ():
            if not any(held.full == queue for held in self._in_flight.values()):
                self._full.discard(queue)
                emit(logger, logging.INFO, "queue_has_room", queue=queue)

    def _paused(self) -> frozenset[str]:
        """Return the queues of which nothing more is taken, because what follows from theirs has no room."""
        if not self._full:
            return frozenset()
        stuck = Counter(held.delivery.queue for held in self._in_flight.values() if held.full)
        return frozenset(queue for queue, count in stuck.items() if self._must_wait(queue, count))

    def _must_wait(self, queue: str, stuck: int) -> bool:
        """Whether nothing is taken from a queue whose results are stuck.

        Some are taken now and then: each makes room in its own queue, for which the worker of the full one may wait.
        """
        if stuck <= (_MOST_STUCK_ITSELF if queue in self._full else _MOST_STUCK):
            self._take_at.pop(queue, None)
            return False
        now = time.monotonic()
        if stuck > _MOST_STUCK_ITSELF or now < self._take_at.setdefault(queue, now + _TAKEN_EVERY):
            return True
        self._take_at[queue] = now + _TAKEN_EVERY
        return False

    def _for_good(self, error: TransportError) -> TransportError:
        """A callback for a queue that cannot be had is refused for good: to try it for ever would hold up others."""
        if not isinstance(error, TransportNotReady) or (isinstance(error, Unroutable) and self._settings.declare):
            return error
        refused = TransportRefused(str(error))
        refused.__cause__ = error
        return refused

    def _acknowledge(self, plans: Sequence[SettlementPlan], errors: list[TransportError | None]) -> None:
        for plan, error in self._connection.broker.in_requeue_order(list(zip(plans, errors, strict=True))):
            held = plan.held
            if held is None or held.incoming is None or error is not None:
                continue
            with mapped("settle: acknowledge", fate_unknown=True):
                if plan.settlement.verdict is Verdict.RETRY and not plan.settlement.counted and not plan.messages:
                    held.incoming.requeue()
                else:
                    held.incoming.ack()

    def _end(self, plan: SettlementPlan, error: TransportError | None) -> bool:
        if plan.held is None:
            return plan.answered
        if error is not None:
            return False
        if plan.held.incoming is None and not plan.settlement.counted:
            self._note_unstarted(plan.held.received.message, plan.held.unstarted)
        return self._in_flight.pop(_key(plan.settlement.delivery), None) is not None

    def _take(self, limit: int, paused: Collection[str] = ()) -> list[Delivery]:
        deliveries: list[Delivery] = []
        incoming = self._connection.consumers.buffer
        due = self._due()
        skipped: list[Incoming] = []
        while len(deliveries) < limit and (due or incoming):
            one = due.popleft() if due else incoming.popleft()
            if one.queue in paused:
                skipped.append(one)
                continue
            delivery = self._opened(one)
            if delivery is not None:
                deliveries.append(delivery)
        incoming.extendleft(reversed([*skipped, *due]))
        return deliveries

    def _opened(self, incoming: Incoming) -> Delivery | None:
        """Read a message; None where its time has not come."""
        envelope = self._read(incoming, time_limits=self._time_limits)
        received = Received(incoming.message, envelope, incoming.queue)
        if (seconds := incoming.due - time.time()) > 0:
            self._delay(incoming, seconds)
            return None
        name = envelope.id or f"{incoming.queue}/{next(self._numbers)}"
        if (name, envelope.attempt) in self._in_flight:  # the same task was sent twice
            name = f"{name}/{next(self._numbers)}"
        incoming.wait_no_more()
        self._connection.consumers.took(incoming.queue)
        delivery = envelope.delivery(name, incoming.queue)
        self._in_flight[_key(delivery)] = InFlightDelivery(delivery, received, incoming, unstarted=incoming.unstarted)
        return delivery

    def _read(self, incoming: Incoming, *, time_limits: bool = True) -> Envelope:
        """Read a message, without the deliveries that the broker has counted and that have started nothing.

        A message that comes before its time was never started since that was set, however often it was delivered.
        """
        envelope = read_message(
            incoming.message, incoming.queue, default_queue=self._default_queue, time_limits=time_limits
        )
        counted = envelope.attempt - 1 - envelope.retries
        if envelope.eta is not None and envelope.problem is None:
            incoming.due = envelope.eta.timestamp()
            if incoming.due > time.time():
                incoming.unstarted = counted
        if self._unstarted:
            known, since = self._unstarted.pop(incoming.key, (0, 0.0))
            if time.monotonic() - since < _UNSTARTED_FOR:
                incoming.unstarted = max(incoming.unstarted, known)
        incoming.unstarted = min(incoming.unstarted, counted)
        return attrs.evolve(envelope, attempt=envelope.attempt - incoming.unstarted) if incoming.unstarted else envelope

    def _note_unstarted(self, message: Raw, already: int = 0) -> None:
        """Remember that a message of ours goes back without having been started: the broker may count that."""
        now, key = time.monotonic(), key_of(message)
        self._unstarted[key] = (already + 1, now)
        self._unstarted.move_to_end(key)
        while len(self._unstarted) > _MOST_UNSTARTED or now - next(iter(self._unstarted.values()))[1] > _UNSTARTED_FOR:
            self._unstarted.popitem(last=False)

    def _room(self, limit: int) -> int:
        """Return how many more messages may come: none for a while when too many wait here and all were looked at."""
        return limit if len(self._delayed) < _MAX_DELAYED or self._thin_out_at <= time.monotonic() else 0

    def _delay(self, incoming: Incoming, seconds: float) -> None:
        if self._sent_again and incoming.key[0] in self._sent_again:
            self._sent_again.clear()
            self._thin_out_at = time.monotonic() + _ROUND
        incoming.wait()
        until = time.monotonic() + min(seconds, self._settings.longest_local_delay)
        heapq.heappush(self._delayed, (until, next(self._numbers), incoming))

    def _gather(self) -> None:
        """Send again what waits here through too many consumers, so that it comes through few."""
        if scattered := self._connection.consumers.scattered():
            lone = [entry for entry in self._delayed if entry[2].consumer in scattered]
            self._delayed = [entry for entry in self._delayed if entry[2].consumer not in scattered]
            heapq.heapify(self._delayed)
            self._send_anew([incoming for _, _, incoming in sorted(lone)])

    def _thin_out(self, limit: int) -> None:
        """Send again what has longest to wait, where so much waits that nothing else could be received."""
        if len(self._delayed) < _MAX_DELAYED - 2 * _THINNED:
            self._logged_crowded = False
        if not limit or self._thin_out_at > time.monotonic():
            return
        consumers = self._connection.consumers
        crowd = (
            [entry for entry in self._delayed if consumers.is_used_up(entry[2].queue)] if consumers.has_single else []
        )
        if len(self._delayed) > _MAX_DELAYED:
            crowd, number = self._delayed, _THINNED
            if not self._logged_crowded:
                self._logged_crowded = True
                emit(logger, logging.WARNING, "too_many_delayed", waiting=len(self._delayed), limit=_MAX_DELAYED)
        elif crowd:
            number = 1
        else:
            return
        farthest = heapq.nlargest(number, crowd, key=lambda entry: entry[2].due)
        gone = {entry[1] for entry in farthest}
        self._delayed = [entry for entry in self._delayed if entry[1] not in gone]
        heapq.heapify(self._delayed)
        if len(self._sent_again) > 10 * _MAX_DELAYED:
            self._sent_again.clear()
        self._sent_again.update(entry[2].key[0] for entry in farthest)
        self._send_anew([entry[2] for entry in sorted(farthest, key=lambda entry: entry[1])])

    def _due(self) -> deque[Incoming]:
        """Return what was delayed and may be looked at again; what waits for longer is sent anew, to be held anew."""
        due: deque[Incoming] = deque()
        stale: list[Incoming] = []
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            _, _, incoming = heapq.heappop(self._delayed)
            later = incoming.due > time.time() or incoming.in_doubt is not None
            (stale if later else due).append(incoming)
        if stale:
            self._send_anew(stale)
        return due

    def _release(self, unwanted: Sequence[Incoming]) -> None:
        """Let others have what nobody here has time for; what is requeued in a quorum queue counts, so not there."""
        anew = [one for one in unwanted if self._connection.consumers.counts_returns(one.queue)]
        for one in unwanted:
            if one not in anew:
                one.requeue()
        if anew:
            self._send_anew(anew)

    def _send_anew(self, stale: Sequence[Incoming]) -> None:
        """Send messages again to the end of their queues, and acknowledge them; those that cannot be sent wait here."""
        try:
            stale = [one for one in stale if not self._is_sent(one)]
        except TransportError:
            self._delayed += [(time.monotonic() + TICK, next(self._numbers), one) for one in stale]
            heapq.heapify(self._delayed)
            raise
        for start in range(0, len(stale), _THINNED):
            batch = stale[start : start + _THINNED]
            copies: list[Outgoing] = []
            for one in batch:
                envelope = self._read(one)
                copies.append(again(Received(one.message, envelope, one.queue), retries=envelope.attempt - 1))
            for one, error in zip(batch, self._connection.broker.publish("postpone", copies), strict=True):
                if error is None:
                    one.ack()
                else:
                    one.in_doubt = error.tag if isinstance(error, InDoubt) else None
                    heapq.heappush(self._delayed, (time.monotonic() + TICK, next(self._numbers), one))

    def _is_sent(self, incoming: Incoming) -> bool:
        """Take in the broker's late answer about a message that was sent again; says whether it needs no more."""
        if incoming.in_doubt is None:
            return False
        answer = self._connection.broker.answer_to(incoming.in_doubt)
        if answer is None:
            heapq.heappush(self._delayed, (time.monotonic() + TICK, next(self._numbers), incoming))
            return True
        incoming.in_doubt = None
        if answer:
            incoming.ack()
        return answer

    def _redeliveries_expected(self) -> int:
        """How many messages may come back to us that were ours on the connection before this one."""
        return len(self._awaiting_redelivery()) if self._connection.age < _REDELIVERY_WINDOW else 0

    def _match_redelivered(self) -> None:
        """Take back the messages of deliveries that await it, which the broker has delivered again.

        A delivery that its consumer has not asked for since may be forgotten there: then the message is a new delivery.
        """
        incoming = self._connection.consumers.buffer
        if not incoming or not (awaiting := self._awaiting_redelivery()):
            return
        for one in [one for one in incoming if one.redelivered]:
            if (delivery := awaiting.pop(one.key, None)) is not None:
                delivery.incoming = one
                delivery.unstarted += 1
                incoming.remove(one)

    def _awaiting_redelivery(self) -> dict[tuple[str | None, int], InFlightDelivery]:
        known = time.monotonic() - self._forgotten_after
        lost = {
            key_of(one.received.message): one
            for one in self._in_flight.values()
            if one.incoming is None and one.asked >= known
        }
        return {key: one for key, one in lost.items() if key[0] is not None}

    @contextlib.contextmanager
    def _working(self, doing: str, *, fate_unknown: bool = False) -> Iterator[None]:
        """Map the errors of the block, and let go of a connection that is of no more use."""
        try:
            with mapped(doing, fate_unknown=fate_unknown):
                yield
        finally:
            if self._connection.drop_if_broken():
                self._lose()

    def _lose(self) -> None:
        """What is in flight awaits its redelivery; what was not given out yet is the broker's again."""
        for one in (*self._connection.unread, *(incoming for _, _, incoming in self._delayed)):
            self._note_unstarted(one.message, one.unstarted)
        self._connection.unread.clear()
        self._delayed.clear()
        for held in self._in_flight.values():
            held.incoming = None
            held.in_doubt.clear()

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")


@attrs.define(eq=False)
class SettlementPlan:
    """A settlement and what is to be published for it; without `held` it was `answered` before, or is not ours."""

    settlement: Settlement
    held: InFlightDelivery | None
    messages: dict[str, Outgoing]
    answered: bool = False

    @property
    def awaits_redelivery(self) -> bool:
        return self.held is not None and self.held.incoming is None


def _key(delivery: Delivery) -> Key:
    return delivery.id, delivery.attempt
