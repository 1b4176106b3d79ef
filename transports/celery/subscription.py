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
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

import attrs
from kombu.message import Message as Raw

from transports.celery.amqp_patches import TICK
from transports.celery.broker import Settings
from transports.celery.connection import Link
from transports.celery.consumers import Arrived
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

_ADOPTION = 3.0
"""Seconds after a new connection in which what was running before may come back to us."""
_MOST_PARKED = 10_000
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
class _Held:
    """A delivery of ours; without its `arrived` it is an orphan. `sent` names what of its settlement was confirmed.

    `in_doubt` is what was handed to a broker that will confirm it when it takes messages again, `full` the queue that
    has no room for what follows, `unstarted` as in Arrived. `asked` is when the consumer last showed that it has this
    delivery, on the monotonic clock.
    """

    delivery: Delivery
    received: Received
    arrived: Arrived | None
    sent: set[str] = attrs.field(factory=set)
    in_doubt: dict[str, int] = attrs.field(factory=dict)
    full: str = ""
    unstarted: int = 0
    asked: float = attrs.field(factory=time.monotonic)


class CelerySubscription:
    """Owned by one thread; only `wake` may be called from another, or from a signal handler."""

    def __init__(
        self,
        settings: Settings,
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
        self._held: dict[Key, _Held] = {}
        self._answered: dict[Key, bool] = {}
        self._parked: list[tuple[float, int, Arrived]] = []
        self._sent_again: set[str | None] = set()
        self._thin_out_at = 0.0
        self._logged_crowded = False
        self._take_at: dict[str, float] = {}
        self._full: set[str] = set()
        self._unstarted: OrderedDict[tuple[str | None, int], tuple[int, float]] = OrderedDict()
        self._numbers = itertools.count()
        self._closed = False
        self._link = Link(settings, self._queues)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` messages; see `unstract_core.Subscription.receive`."""
        self._check_open()
        deadline = time.monotonic() + wait
        with self._working("receive"):
            while True:
                room, blocked = self._room(limit), self._link.blocked
                paused = self._paused()
                if not blocked:
                    self._give_back(self._link.taps.want(room + self._adoptable(), paused))
                self._link.pump()
                self._adopt()
                parked = len(self._parked)
                deliveries = self._take(limit, paused) if not self._link.blocked else []
                if self._parked and not self._link.blocked:
                    self._gather()
                    self._thin_out(limit)
                remaining = deadline - time.monotonic()
                if deliveries or remaining <= 0 or self._link.rung():
                    return deliveries
                if len(self._parked) > parked and room:  # there may be others behind it whose time has come
                    continue
                if self._parked and not blocked:
                    remaining = min(remaining, max(0.0, self._parked[0][0] - time.monotonic()))
                self._link.wait(remaining)
                self._check_open()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Return which deliveries are still ours: all of them while the connection lives."""
        self._check_open()
        with contextlib.suppress(TransportError), self._working("renew"):
            self._link.tend()
            self._link.pump()
            self._adopt()
        waiting = self._link.age < _ADOPTION
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
            with contextlib.suppress(Exception):
                self._return_unstarted()
            held = [one.arrived for one in self._held.values() if one.arrived is not None]
            self._link.close([*held, *(arrived for _, _, arrived in sorted(self._parked))])

    def _return_unstarted(self) -> None:
        """Give back what was not started, so that it does not count where the end of a connection does."""
        if not self._link.live or not self._link.broker.amqp:
            return
        self._link.broker.hurry(_GOODBYE)
        taps = self._link.taps
        self._link.pump()  # a message that is on its way here may show that its queue counts
        if not any(map(taps.counts_returns, self._queues)):
            return
        taps.cancel()
        self._parked, parked = [], sorted(self._parked)
        waiting = [*(arrived for _, _, arrived in parked), *taps.arrived]
        if counted := [one for one in waiting if taps.counts_returns(one.queue)]:
            self._send_anew(counted)
        taps.flush()

    def _is_ours(self, key: Key, waiting: bool) -> bool:
        held = self._held.get(key)
        if held is None:
            return key in self._answered  # it is settled, and its consumer has not asked for the answer yet
        held.asked = time.monotonic()
        return held.arrived is not None or waiting

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
        held.asked = time.monotonic()
        if settlement.verdict is Verdict.RETRY and not settlement.counted and not self._is_quorum(held):
            return _Plan(settlement, held, {})
        messages = outgoing(held.received, settlement, self._settings, self._default_queue)
        if settlement.verdict is Verdict.RETRY and not settlement.counted:
            returned = again(held.received, retries=held.received.envelope.attempt - 1)
            messages[f"{_GIVEN_BACK} {returned.id}"] = returned
        return _Plan(settlement, held, {name: one for name, one in messages.items() if name not in held.sent})

    def _let_go(self, plans: Sequence[_Plan]) -> None:
        """Hold no longer what was to be given back: nobody will settle it again, and the broker is to deliver it."""
        for plan in plans:
            if plan.settlement.verdict is not Verdict.RETRY or plan.settlement.counted:
                continue
            held = self._held.pop(_key(plan.settlement.delivery), None)
            if held is None:
                continue
            if held.arrived is not None and self._keeps_given_back(held, held.arrived):
                continue
            self._note_unstarted(held.received.message, held.unstarted)
            if held.arrived is not None:
                with contextlib.suppress(Exception):
                    held.arrived.requeue()

    def _keeps_given_back(self, held: _Held, arrived: Arrived) -> bool:
        """Keep a message here while its copy may be accepted later (a requeue would double it), or be sent later."""
        tag = next((tag for name, tag in held.in_doubt.items() if name.startswith(_GIVEN_BACK)), None)
        if tag is None and not (self._link.blocked and self._is_quorum(held)):
            return False
        arrived.in_doubt = tag
        arrived.unstarted = held.unstarted
        heapq.heappush(self._parked, (time.monotonic() + TICK, next(self._numbers), arrived))
        return True

    def _is_quorum(self, held: _Held) -> bool:
        """Quorum queues count what is requeued, and drop it in the end: such a message is sent anew instead."""
        return held.arrived is not None and self._link.taps.counts_returns(held.arrived.queue)

    def _await_orphans(self, plans: Sequence[_Plan]) -> None:
        """Give the broker a moment to deliver again what was running when the connection broke."""
        taps = self._link.taps
        if any(one.orphaned for one in plans) and (adoptable := self._adoptable()):
            if not self._link.blocked:
                self._give_back(taps.want(adoptable))
            self._link.pump()
            self._adopt()
            if any(one.orphaned for one in plans):
                raise TransportUnavailable("settle: the connection is new, and the message not delivered again yet")

    def _publish(self, plans: Sequence[_Plan]) -> list[TransportError | None]:
        errors: dict[int, TransportError] = {}
        for plan in plans:
            if plan.held is not None and plan.held.in_doubt and (error := self._resolve(plan, plan.held)) is not None:
                errors[id(plan)] = error
        flat = [(plan, name, one) for plan in plans if id(plan) not in errors for name, one in plan.messages.items()]
        if flat:
            outcomes = self._link.broker.publish("settle", [message for _, _, message in flat])
            for (plan, name, message), error in zip(flat, outcomes, strict=True):
                if error is not None:
                    errors.setdefault(id(plan), self._for_good(error) if name.startswith("follow-up") else error)
                elif plan.held is not None:
                    plan.held.sent.add(name)
                if plan.held is not None:
                    self._note_outcome(plan.held, name, message.queue, error)
            self._log_room([message.queue for (_, _, message), error in zip(flat, outcomes, strict=True) if not error])
        return [errors.get(id(plan)) for plan in plans]

    def _resolve(self, plan: _Plan, held: _Held) -> TransportError | None:
        """Take in the broker's late answers about a settlement; returns an error while one is missing."""
        for name, tag in list(held.in_doubt.items()):
            answer = self._link.broker.answer_to(tag)
            if answer is None:
                return InDoubt("settle: the broker takes no messages for now, and has not confirmed one yet", tag)
            del held.in_doubt[name]
            if answer:
                held.sent.add(name)
                plan.messages.pop(name, None)
        return None

    def _note_outcome(self, held: _Held, name: str, queue: str, error: TransportError | None) -> None:
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
            if not any(held.full == queue for held in self._held.values()):
                self._full.discard(queue)
                emit(logger, logging.INFO, "queue_has_room", queue=queue)

    def _paused(self) -> frozenset[str]:
        """Return the queues of which nothing more is taken, because what follows from theirs has no room."""
        if not self._full:
            return frozenset()
        stuck = Counter(held.delivery.queue for held in self._held.values() if held.full)
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

    def _acknowledge(self, plans: Sequence[_Plan], errors: list[TransportError | None]) -> None:
        for plan, error in self._link.broker.in_requeue_order(list(zip(plans, errors, strict=True))):
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
        if plan.held.arrived is None and not plan.settlement.counted:
            self._note_unstarted(plan.held.received.message, plan.held.unstarted)
        return self._held.pop(_key(plan.settlement.delivery), None) is not None

    def _take(self, limit: int, paused: Collection[str] = ()) -> list[Delivery]:
        deliveries: list[Delivery] = []
        arrived = self._link.taps.arrived
        due = self._due()
        skipped: list[Arrived] = []
        while len(deliveries) < limit and (due or arrived):
            one = due.popleft() if due else arrived.popleft()
            if one.queue in paused:
                skipped.append(one)
                continue
            delivery = self._opened(one)
            if delivery is not None:
                deliveries.append(delivery)
        arrived.extendleft(reversed([*skipped, *due]))
        return deliveries

    def _opened(self, arrived: Arrived) -> Delivery | None:
        """Read a message; None where its time has not come."""
        envelope = self._read(arrived, time_limits=self._time_limits)
        received = Received(arrived.message, envelope, arrived.queue)
        if (seconds := arrived.due - time.time()) > 0:
            self._park(arrived, seconds)
            return None
        name = envelope.id or f"{arrived.queue}/{next(self._numbers)}"
        if (name, envelope.attempt) in self._held:  # the same task was sent twice
            name = f"{name}/{next(self._numbers)}"
        arrived.wait_no_more()
        self._link.taps.took(arrived.queue)
        delivery = envelope.delivery(name, arrived.queue)
        self._held[_key(delivery)] = _Held(delivery, received, arrived, unstarted=arrived.unstarted)
        return delivery

    def _read(self, arrived: Arrived, *, time_limits: bool = True) -> Envelope:
        """Read a message, without the deliveries that the broker has counted and that have started nothing.

        A message that comes before its time was never started since that was set, however often it was delivered.
        """
        envelope = read_message(
            arrived.message, arrived.queue, default_queue=self._default_queue, time_limits=time_limits
        )
        counted = envelope.attempt - 1 - envelope.retries
        if envelope.eta is not None and envelope.problem is None:
            arrived.due = envelope.eta.timestamp()
            if arrived.due > time.time():
                arrived.unstarted = counted
        if self._unstarted:
            known, since = self._unstarted.pop(arrived.key, (0, 0.0))
            if time.monotonic() - since < _UNSTARTED_FOR:
                arrived.unstarted = max(arrived.unstarted, known)
        arrived.unstarted = min(arrived.unstarted, counted)
        return attrs.evolve(envelope, attempt=envelope.attempt - arrived.unstarted) if arrived.unstarted else envelope

    def _note_unstarted(self, message: Raw, already: int = 0) -> None:
        """Remember that a message of ours goes back without having been started: the broker may count that."""
        now, key = time.monotonic(), key_of(message)
        self._unstarted[key] = (already + 1, now)
        self._unstarted.move_to_end(key)
        while len(self._unstarted) > _MOST_UNSTARTED or now - next(iter(self._unstarted.values()))[1] > _UNSTARTED_FOR:
            self._unstarted.popitem(last=False)

    def _room(self, limit: int) -> int:
        """Return how many more messages may come: none for a while when too many wait here and all were looked at."""
        return limit if len(self._parked) < _MOST_PARKED or self._thin_out_at <= time.monotonic() else 0

    def _park(self, arrived: Arrived, seconds: float) -> None:
        if self._sent_again and arrived.key[0] in self._sent_again:
            self._sent_again.clear()
            self._thin_out_at = time.monotonic() + _ROUND
        arrived.wait()
        until = time.monotonic() + min(seconds, self._settings.longest_parked)
        heapq.heappush(self._parked, (until, next(self._numbers), arrived))

    def _gather(self) -> None:
        """Send again what waits here through too many consumers, so that it comes through few."""
        if scattered := self._link.taps.scattered():
            lone = [entry for entry in self._parked if entry[2].tap in scattered]
            self._parked = [entry for entry in self._parked if entry[2].tap not in scattered]
            heapq.heapify(self._parked)
            self._send_anew([arrived for _, _, arrived in sorted(lone)])

    def _thin_out(self, limit: int) -> None:
        """Send again what has longest to wait, where so much waits that nothing else could be received."""
        if len(self._parked) < _MOST_PARKED - 2 * _THINNED:
            self._logged_crowded = False
        if not limit or self._thin_out_at > time.monotonic():
            return
        taps = self._link.taps
        crowd = [entry for entry in self._parked if taps.is_used_up(entry[2].queue)] if taps.has_single else []
        if len(self._parked) > _MOST_PARKED:
            crowd, number = self._parked, _THINNED
            if not self._logged_crowded:
                self._logged_crowded = True
                emit(logger, logging.WARNING, "too_many_delayed", waiting=len(self._parked), limit=_MOST_PARKED)
        elif crowd:
            number = 1
        else:
            return
        farthest = heapq.nlargest(number, crowd, key=lambda entry: entry[2].due)
        gone = {entry[1] for entry in farthest}
        self._parked = [entry for entry in self._parked if entry[1] not in gone]
        heapq.heapify(self._parked)
        if len(self._sent_again) > 10 * _MOST_PARKED:
            self._sent_again.clear()
        self._sent_again.update(entry[2].key[0] for entry in farthest)
        self._send_anew([entry[2] for entry in sorted(farthest, key=lambda entry: entry[1])])

    def _due(self) -> deque[Arrived]:
        """Return what was parked and may be looked at again; what waits for longer is sent anew, to be held anew."""
        due: deque[Arrived] = deque()
        stale: list[Arrived] = []
        while self._parked and self._parked[0][0] <= time.monotonic():
            _, _, arrived = heapq.heappop(self._parked)
            later = arrived.due > time.time() or arrived.in_doubt is not None
            (stale if later else due).append(arrived)
        if stale:
            self._send_anew(stale)
        return due

    def _give_back(self, unwanted: Sequence[Arrived]) -> None:
        """Let others have what nobody here has time for; what is requeued in a quorum queue counts, so not there."""
        anew = [one for one in unwanted if self._link.taps.counts_returns(one.queue)]
        for one in unwanted:
            if one not in anew:
                one.requeue()
        if anew:
            self._send_anew(anew)

    def _send_anew(self, stale: Sequence[Arrived]) -> None:
        """Send messages again to the end of their queues, and acknowledge them; those that cannot be sent wait here."""
        try:
            stale = [one for one in stale if not self._is_sent(one)]
        except TransportError:
            self._parked += [(time.monotonic() + TICK, next(self._numbers), one) for one in stale]
            heapq.heapify(self._parked)
            raise
        for start in range(0, len(stale), _THINNED):
            batch = stale[start : start + _THINNED]
            copies: list[Outgoing] = []
            for one in batch:
                envelope = self._read(one)
                copies.append(again(Received(one.message, envelope, one.queue), retries=envelope.attempt - 1))
            for one, error in zip(batch, self._link.broker.publish("postpone", copies), strict=True):
                if error is None:
                    one.ack()
                else:
                    one.in_doubt = error.tag if isinstance(error, InDoubt) else None
                    heapq.heappush(self._parked, (time.monotonic() + TICK, next(self._numbers), one))

    def _is_sent(self, arrived: Arrived) -> bool:
        """Take in the broker's late answer about a message that was sent again; says whether it needs no more."""
        if arrived.in_doubt is None:
            return False
        answer = self._link.broker.answer_to(arrived.in_doubt)
        if answer is None:
            heapq.heappush(self._parked, (time.monotonic() + TICK, next(self._numbers), arrived))
            return True
        arrived.in_doubt = None
        if answer:
            arrived.ack()
        return answer

    def _adoptable(self) -> int:
        """How many messages may come back to us that were ours on the connection before this one."""
        return len(self._orphans()) if self._link.age < _ADOPTION else 0

    def _adopt(self) -> None:
        """Take back the messages of orphans, which the broker has delivered again.

        An orphan that its consumer has not asked for since may be forgotten there: then the message is a new delivery.
        """
        arrived = self._link.taps.arrived
        if not arrived or not (orphans := self._orphans()):
            return
        for one in [one for one in arrived if one.redelivered]:
            if (orphan := orphans.pop(one.key, None)) is not None:
                orphan.arrived = one
                orphan.unstarted += 1
                arrived.remove(one)

    def _orphans(self) -> dict[tuple[str | None, int], _Held]:
        known = time.monotonic() - self._forgotten_after
        lost = {
            key_of(one.received.message): one
            for one in self._held.values()
            if one.arrived is None and one.asked >= known
        }
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
        for one in (*self._link.unread, *(arrived for _, _, arrived in self._parked)):
            self._note_unstarted(one.message, one.unstarted)
        self._link.unread.clear()
        self._parked.clear()
        for held in self._held.values():
            held.arrived = None
            held.in_doubt.clear()

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
