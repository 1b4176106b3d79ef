"""How many messages the broker may send ahead, and what has arrived.

RabbitMQ sends to a consumer until as many of its messages are unacknowledged as the consumer was granted, and a grant
cannot be changed (quorum queues know no other kind). So a queue has two kinds of consumers here:

- The *standing* one is registered at the first call and stays for as long as the connection. So a queue with
  `x-expires` or auto-delete is in use while its worker is busy, and `x-single-active-consumer` holds. Its grant is what
  was wanted first: the number of threads, or the fixed prefetch. While that many of its messages run it has no credit
  left, and the broker sends it nothing.
- *Flows* are consumers beside it, for as much more as is wanted: adaptive prefetch grows through them, and messages
  that wait here for their time use up their credit. They are cancelled when their queue is not wanted for `_WINDOW`
  seconds, and one whose grant is used up is cancelled when the next is opened. Grants double while all that comes has
  to wait, because a quorum queue keeps a cancelled consumer for as long as we hold a message of it. A queue that is
  declared with `x-single-active-consumer` has no flow, because the broker sends nothing to a second consumer.

When a queue is not wanted, because every thread is busy, what its flows brought is given back at once. The standing
consumer may have credit left, because running messages came through flows; then the broker sends it as many messages,
and they wait here. They are offered to others, at pauses that double up to `_LONGEST_PAUSE`: the broker is asked
whether there are other consumers and nothing is ready, which means that one of them may be idle, and only then they
are given back. Where no other consumer has room they would come back at once, and the queue's order would suffer for
nothing.

The brokers that kombu plays itself have one grant for a channel, which can be changed, and no use for a standing
consumer.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import attrs
import kombu

from transports.celery.broker import Broker, BrokerSettings
from transports.celery.decode import COUNT_HEADER, key_of
from transports.celery.errors import mapped
from unstract_core.errors import TransportNotReady

_WINDOW = 0.05
"""Seconds after which what nobody wants is given back."""
_LONGEST_PAUSE = 1.0
"""Seconds between two looks whether others have time for what the standing consumers have brought."""
_QUIET = 100
_SILENT = 10
_PULSE = 0.01
"""For how many pulses (seconds) what is on its way is waited for, and how many without any of it are enough."""
_LOOKS = 2
"""How many looks in a row, a second apart, show that a queue has one active consumer."""
_LARGEST_STEP = 500
"""The largest grant of a flow that is to find the end of many delayed messages."""
_MOST_HOLDING = 32
_LEFT_HOLDING = 8
"""Of how many cancelled consumers of a quorum queue messages may wait here, and how many are left when it is more."""
_LARGEST_BUFFER = 2000
_LARGEST_GRANT = 65535
_ABSENCE = 2.0
"""Seconds between two looks for a queue that is not there."""


@attrs.define(eq=False)
class QueueConsumer:
    """A consumer of one queue, with its grant and how many of its messages are unacknowledged."""

    queue: kombu.Queue
    tag: str
    granted: int
    sent_back: Counter[str]
    """Acknowledgements and requeues of all consumers by queue, since they were last flushed."""
    unacknowledged: int = 0
    waiting: int = 0
    """How many of its messages wait here for their time."""

    @property
    def free(self) -> int:
        """How many more messages the broker may send through it."""
        return max(0, self.granted - self.unacknowledged)


_IN_FLIGHT, _LEAST_ROUNDS, _ROUND = 16, 5, 0.01
"""Acknowledgements in a round, how many rounds there are at least, and seconds between two."""


@attrs.define
class _Unwanted:
    """When what has come of a queue is to be offered to others, on the monotonic clock, and the pause after that."""

    due: float
    pause: float = _WINDOW


@attrs.define(eq=False)
class Incoming:
    """A message that the broker sent, through one consumer."""

    message: kombu.Message
    queue: str
    consumer: QueueConsumer
    unstarted: int = 0
    """How many of the deliveries that the broker has counted are known to have started nothing."""
    due: float = 0.0
    """Before when it is not to be started, in seconds since the epoch; known once it was read."""
    in_doubt: int | None = None
    """The number under which it was sent again, where the broker has not confirmed that yet."""
    waits: bool = False
    """Whether it waits here for its time."""

    @property
    def redelivered(self) -> bool:
        return bool((self.message.delivery_info or {}).get("redelivered"))

    @property
    def key(self) -> tuple[str | None, int]:
        return key_of(self.message)

    def wait(self) -> None:
        self.consumer.waiting += not self.waits
        self.waits = True

    def wait_no_more(self) -> None:
        self.consumer.waiting -= self.waits
        self.waits = False

    def ack(self) -> None:
        self.message.ack()  # which is asked again where it fails, and counts once
        self.consumer.unacknowledged -= 1
        self.consumer.sent_back[self.queue] += 1
        self.wait_no_more()

    def requeue(self) -> None:
        self.message.requeue()
        self.consumer.unacknowledged -= 1
        self.consumer.sent_back[self.queue] += 1
        self.wait_no_more()


class QueueConsumers:
    """The consumers of a subscription, on a channel of their own. `standing` are the grants of its standing consumers.

    `counting` are the queues whose messages have shown that the broker counts their deliveries. The owner keeps both,
    for the next connection.
    """

    def __init__(
        self,
        broker: Broker,
        queues: Sequence[kombu.Queue],
        settings: BrokerSettings,
        standing: dict[str, int],
        counting: set[str],
    ) -> None:
        self.buffer: deque[Incoming] = deque()
        self._broker = broker
        self._settings = settings
        self._grants = standing
        self._counting = counting
        single = "x-single-active-consumer"
        self._single = {queue.name for queue in queues if settings.arguments_of(queue.name).get(single)}
        self._idle_looks: dict[str, tuple[float, int]] = {}
        self._sent_back: Counter[str] = Counter()
        self._standing: dict[str, QueueConsumer] = {}
        self._flows: dict[str, list[QueueConsumer]] = {queue.name: [] for queue in queues}
        self._holding: dict[str, list[QueueConsumer]] = {}
        self._steps: dict[str, int] = {}
        self._every: list[QueueConsumer] = []
        self._unwanted: dict[str, _Unwanted] = {}
        self._deleted: set[str] = set()
        self._missing: dict[str, float] = {}
        with mapped("subscribe"):
            self._channel = broker.channel()
            self._queues = deque(queue.bind(self._channel) for queue in queues)

    def find(self) -> None:
        """See that every queue is there, or raise."""
        for queue in self._queues:
            self._broker.find(queue.name, "subscribe")

    @property
    def full(self) -> bool:
        return len(self.buffer) >= _LARGEST_BUFFER

    @property
    def patience(self) -> float:
        """Seconds until what nobody wants is to be offered to others."""
        if not self._unwanted or not self.buffer:
            return math.inf
        waiting = {one.queue for one in self.buffer}
        due = min((one.due for name, one in self._unwanted.items() if name in waiting), default=math.inf)
        return max(0.0, due - time.monotonic())

    def want(self, limit: int, paused: Collection[str] = ()) -> Sequence[Incoming]:
        """Say how many more messages there is room for now, of any queue that is not `paused`.

        Returns what is to be given back to its queue, in the order of requeueing. Raises
        TransportNotReady for a queue that is not there any more.
        """
        limit = min(limit, _LARGEST_GRANT)
        unwanted = []
        for queue in list(self._queues):
            if self._missing and self._missing.get(queue.name, 0.0) > time.monotonic():
                continue
            if self._broker.amqp and queue.name not in self._standing:
                self._stand(queue, limit)
            if limit and queue.name not in paused:
                self._unwanted.pop(queue.name, None)
                self._grant(queue, limit)
            else:
                unwanted.append(queue)
        return self._broker.in_requeue_order(self._offers(unwanted)) if unwanted else ()

    def cancel(self) -> None:
        """Let nothing more be sent. When this returns the queues have taken in what was acknowledged before."""
        for queue in self._queues:
            self._cancel_flows(queue)
        self._settle_down(self._standing.values())
        for consumer in self._standing.values():
            consumer.queue.cancel(consumer.tag)
        self._standing.clear()

    def deleted(self) -> list[str]:
        """Return the queues that were deleted since this was last asked; they are declared and consumed anew."""
        deleted = sorted(self._deleted)
        self._deleted.clear()
        return deleted

    def took(self, queue: str) -> None:
        """Note that a message of a queue can be started: not all that comes of it has to wait."""
        if self._steps:
            self._steps.pop(queue, None)

    def scattered(self) -> set[QueueConsumer]:
        """Return cancelled consumers that a queue keeps for what waits here, where these are too many."""
        found: set[QueueConsumer] = set()
        for name, consumers in self._holding.items():
            if len(consumers) > _MOST_HOLDING:
                consumers = self._holding[name] = [consumer for consumer in consumers if consumer.unacknowledged > 0]
            if len(consumers) > _MOST_HOLDING:
                consumers.sort(key=lambda consumer: consumer.unacknowledged)
                found.update(consumers[:-_LEFT_HOLDING])
                self._holding[name] = consumers[-_LEFT_HOLDING:]
        return found

    def counts_returns(self, queue: str) -> bool:
        """Whether a queue counts requeued messages, as quorum queues do; where that is unknown, whether it may."""
        return self._broker.amqp and (queue in self._counting or self._settings.may_be_quorum(queue))

    def flush(self) -> None:
        """Return when the queues have taken in what was acknowledged, also where nothing is left to cancel.

        The broker hands a quorum queue some 32 acknowledgements of a channel at a time. The others wait in the channel,
        and would be lost with it: their messages would be delivered again. So it gets time for all of them.
        """
        for queue in self._queues:
            counts, sent_back = self.counts_returns(queue.name), self._sent_back.pop(queue.name, 0)
            for _ in range(_LEAST_ROUNDS + sent_back // _IN_FLIGHT if counts and sent_back else 0):
                self._channel.queue_declare(queue.name, passive=True)
                time.sleep(_ROUND)
            self._channel.queue_declare(queue.name, passive=True)

    @property
    def has_single(self) -> bool:
        """Whether there are queues with one active consumer, as far as that is known."""
        return bool(self._single)

    def is_used_up(self, queue: str) -> bool:
        """Whether nothing more comes of a queue before something of it is acknowledged, whatever is wanted."""
        return queue in self._single and queue in self._standing and not self._standing[queue].free

    def _stand(self, queue: kombu.Queue, limit: int) -> None:
        self._find(queue.name)
        if limit:
            self._grants.setdefault(queue.name, limit)
        self._standing[queue.name] = self._open(queue, self._grants.get(queue.name, 1))

    def _grant(self, queue: kombu.Queue, limit: int) -> None:
        flows = self._flows[queue.name]
        if not self._broker.amqp:  # one grant for the whole channel, which can be changed
            self._channel.basic_qos(0, limit + sum(one.unacknowledged for one in self._every), False)
            if not flows:
                self._find(queue.name)
                flows.append(self._open(queue, limit))
            return
        granted = self._granted(queue)
        if flows and self._standing[queue.name].waiting:
            self._notice_single(queue)
        if queue.name in self._single or (granted and limit < 2 * granted):
            return
        if (last := flows[-1] if flows else self._standing[queue.name]).waiting >= last.granted:
            self._steps[queue.name] = min(_LARGEST_STEP, 2 * max(last.granted, self._steps.get(queue.name, 0)))
        for consumer in list(flows):
            # What is on its way to a cancelled consumer of a quorum queue counts as a crash.
            if not consumer.free or not self.counts_returns(queue.name):
                flows.remove(consumer)
                self._cancel(consumer)
        if (more := limit - self._granted(queue)) > 0:
            flows.append(self._open(queue, max(more, self._steps.get(queue.name, 0))))

    def _notice_single(self, queue: kombu.Queue) -> None:
        """Find out that a queue has one active consumer: messages are ready, and none comes through idle flows."""
        if self._standing[queue.name].free or any(consumer.unacknowledged for consumer in self._flows[queue.name]):
            self._idle_looks.pop(queue.name, None)
            return
        now = time.monotonic()
        due, looks = self._idle_looks.setdefault(queue.name, (now + _LONGEST_PAUSE, 0))
        if now < due:
            return
        looks = looks + 1 if self._broker.state_of(queue.name)[0] else 0
        self._idle_looks[queue.name] = (now + _LONGEST_PAUSE, looks)
        if looks >= _LOOKS:
            self._single.add(queue.name)
            self._cancel_flows(queue)

    def _find(self, name: str) -> None:
        """See that a queue is there. One that cannot be had is told, and left alone for a while: there are others."""
        try:
            self._broker.find(name, "receive")
        except TransportNotReady:
            self._missing[name] = time.monotonic() + _ABSENCE
            raise

    def _granted(self, queue: kombu.Queue) -> int:
        """Return how many more messages of a queue may come, with those that have come and wait."""
        waiting = sum(one.queue == queue.name for one in self.buffer) if self.buffer else 0
        return self._standing[queue.name].free + sum(one.free for one in self._flows[queue.name]) + waiting

    def _open(self, queue: kombu.Queue, limit: int) -> QueueConsumer:
        consumer = QueueConsumer(queue, f"unstract-wire-{uuid.uuid4()}", limit, self._sent_back)

        def receive(raw: Any) -> None:
            consumer.unacknowledged += 1
            incoming = Incoming(self._channel.message_to_python(raw), queue.name, consumer)
            if COUNT_HEADER in incoming.message.headers:
                self._counting.add(queue.name)
            self.buffer.append(incoming)

        if self._broker.amqp:
            self._channel.basic_qos(0, limit, False)
        else:
            self._every = [consumer, *(one for one in self._every if one.unacknowledged or self._is_registered(one))]
        queue.consume(consumer.tag, receive, no_ack=False, on_cancel=lambda tag: self._note_deleted(consumer))
        return consumer

    def _is_registered(self, consumer: QueueConsumer) -> bool:
        name = consumer.queue.name
        return self._standing.get(name) is consumer or consumer in self._flows[name]

    def _note_deleted(self, consumer: QueueConsumer) -> None:
        """The broker has cancelled a consumer, as it does with all of a queue's, one by one, when that is deleted."""
        if self._is_registered(consumer):
            name = consumer.queue.name
            self._broker.connection.declared_entities.clear()
            self._standing.pop(name, None)
            self._flows[name].clear()
            self._deleted.add(name)

    def _offers(self, unwanted: Sequence[kombu.Queue]) -> list[Incoming]:
        if not self.buffer:
            return []
        now = time.monotonic()
        waiting = {one.queue for one in self.buffer}
        offers: list[Incoming] = []
        for queue in unwanted:
            if queue.name in waiting:
                state = self._unwanted.setdefault(queue.name, _Unwanted(now + _WINDOW))
                if state.due <= now:
                    offers += self._offer(queue)
                    state.pause = min(_LONGEST_PAUSE, 2 * state.pause)
                    state.due = time.monotonic() + state.pause
        if offers:
            self._queues.rotate(-1)  # so that none is always the first to send, and the others given back
            given_back = set(map(id, offers))
            self.buffer = deque(one for one in self.buffer if id(one) not in given_back)
        return offers

    def _offer(self, queue: kombu.Queue) -> list[Incoming]:
        """Return what others are to have of a queue: what flows brought, and the rest if somebody may have time."""
        if queue.name in self._single:
            return []
        self._cancel_flows(queue)
        standing = self._standing.get(queue.name)
        waiting = [one for one in self.buffer if one.queue == queue.name]
        ahead = [one for one in waiting if one.consumer is not standing]
        if len(ahead) == len(waiting) or self._others_may_be_idle(queue.name):
            return waiting
        return ahead

    def _others_may_be_idle(self, queue: str) -> bool:
        with mapped("receive"):
            ready, attached = self._broker.state_of(queue)
        # A quorum queue counts our cancelled ones too, for as long as something of theirs runs or waits here.
        ours = 1 + sum(consumer.unacknowledged > 0 for consumer in self._holding.get(queue, ()))
        return attached > ours and not ready

    def _cancel_flows(self, queue: kombu.Queue) -> None:
        flows = self._flows[queue.name]
        self._settle_down(flows)
        while flows:
            self._cancel(flows.pop())

    def _cancel(self, consumer: QueueConsumer) -> None:
        consumer.queue.cancel(consumer.tag)
        if consumer.unacknowledged and self.counts_returns(consumer.queue.name):
            self._holding.setdefault(consumer.queue.name, []).append(consumer)

    def _settle_down(self, consumers: Iterable[QueueConsumer]) -> None:
        """Let what is on its way to consumers of quorum queues arrive, before they are cancelled: it would count."""
        for consumer in consumers:
            if not self.counts_returns(consumer.queue.name):
                continue
            silent = 0
            for _ in range(_QUIET):
                if not consumer.free or silent >= _SILENT or not self._broker.state_of(consumer.queue.name)[0]:
                    break
                before = len(self.buffer)
                with contextlib.suppress(TimeoutError):
                    self._broker.connection.drain_events(timeout=_PULSE)
                silent = silent + 1 if len(self.buffer) == before else 0
            self._channel.basic_qos(0, 1, False)  # which is answered after what was sent before
