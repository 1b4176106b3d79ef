"""The consumers of a subscription: how many messages the broker may send ahead, and the messages that have arrived.

Terms:

- *Grant*: the number of unacknowledged messages that a consumer may have (its prefetch count). It cannot be changed.
- *Credit*: the number of messages that the broker may still send to a consumer.
- *Demand*: the number of messages that the worker wants to receive from a queue now.

A queue has two kinds of consumers:

- The *standing* consumer is registered at the first demand and lasts as long as the connection. So a queue with
  `x-expires` or auto-delete is in use while its worker is busy, and `x-single-active-consumer` works. Its grant is the
  first demand: the number of threads, or the fixed prefetch. While that many of its messages run, it has no credit, and
  the broker sends it nothing.
- *Extra* consumers serve a larger demand, from adaptive prefetch or from delayed messages, which use up credit while
  they wait in this process. An extra consumer is cancelled when its queue has had no demand for a short time. An extra
  consumer without credit is cancelled when the next one is opened. Grants double while all messages are delayed,
  because a quorum queue keeps a cancelled consumer for as long as one of its messages is unacknowledged. A queue with
  `x-single-active-consumer` has no extra consumers, because the broker sends nothing to a second consumer.

When a queue has no demand because every thread is busy, the messages of its extra consumers are released at once. If
running messages came through extra consumers, the standing consumer may still have credit; its messages then wait in
this process. They are released at intervals if another consumer of the queue may be idle: the queue has other
consumers, and no ready messages. Otherwise the broker would send them to this worker again, in another order.

A broker that kombu emulates has one grant for a channel, which can be changed, and needs no standing consumer.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import kombu

from transports.celery.broker import Broker
from transports.celery.broker_settings import BrokerSettings
from transports.celery.decode import COUNT_HEADER
from transports.celery.errors import mapped
from transports.celery.incoming import Incoming, QueueConsumer
from transports.celery.release_schedule import ReleaseSchedule
from transports.celery.single_active import SingleActiveQueues
from unstract_core.errors import TransportNotReady

_PULSE, _MAX_PULSES, _MAX_SILENT_PULSES = 0.01, 100, 10
"""Messages in transit are awaited in pulses of so many seconds: the most pulses, and the most without a message."""
_MAX_GRANT_STEP = 500
"""The largest grant of an extra consumer that receives delayed messages only."""
_MAX_CANCELLED, _CANCELLED_LEFT = 32, 8
"""The highest number of cancelled consumers of a quorum queue with messages here, and the number left of more."""
_MAX_BUFFER = 2000
_MAX_GRANT = 65535
_MISSING_INTERVAL = 2.0
"""The time in seconds between two checks whether a missing queue exists."""
_FLUSH_STEP, _MIN_FLUSH_ROUNDS, _FLUSH_PAUSE = 16, 5, 0.01
"""A flush has one round for so many acknowledgements, a least number of rounds, and pauses of so many seconds."""


class QueueConsumers:
    """The consumers of a subscription, on a separate channel.

    Args:
        broker: The connection.
        queues: The queues.
        settings: The settings of the broker.
        grants: The grants of the standing consumers by queue, which the owner keeps for the next connection.
        counting: The queues whose messages show that the broker counts their deliveries; also kept by the owner.

    Attributes:
        buffer: The messages that have arrived and that the owner has not taken yet.
    """

    def __init__(
        self,
        broker: Broker,
        queues: Sequence[kombu.Queue],
        settings: BrokerSettings,
        grants: dict[str, int],
        counting: set[str],
    ) -> None:
        self.buffer: deque[Incoming] = deque()
        self._broker = broker
        self._settings = settings
        self._grants = grants
        self._counting = counting
        names = [queue.name for queue in queues]
        single = "x-single-active-consumer"
        self._single = SingleActiveQueues(name for name in names if settings.arguments_of(name).get(single))
        self._returned: Counter[str] = Counter()
        self._standing: dict[str, QueueConsumer] = {}
        self._extra: dict[str, list[QueueConsumer]] = {name: [] for name in names}
        self._cancelled: dict[str, list[QueueConsumer]] = {}
        self._grant_steps: dict[str, int] = {}
        self._all: list[QueueConsumer] = []
        self._releases = ReleaseSchedule()
        self._deleted: set[str] = set()
        self._check_missing_at: dict[str, float] = {}
        with mapped("subscribe"):
            self._channel = broker.channel()
            self._queues = deque(queue.bind(self._channel) for queue in queues)

    def ensure_queues(self) -> None:
        """Declare the queues, or raise TransportNotReady if one does not exist (`Broker.ensure_queue`)."""
        for queue in self._queues:
            self._broker.ensure_queue(queue.name, "subscribe")

    @property
    def full(self) -> bool:
        return len(self.buffer) >= _MAX_BUFFER

    @property
    def seconds_until_release(self) -> float:
        """The time in seconds until buffered messages must be released; infinity if there are none."""
        if not self._releases or not self.buffer:
            return math.inf
        return self._releases.seconds_until_next({incoming.queue for incoming in self.buffer})

    def set_demand(self, limit: int, paused: Collection[str] = ()) -> Sequence[Incoming]:
        """Set how many more messages may arrive, and return the messages to release, in the order of requeueing.

        Args:
            limit: The number of messages, for each queue.
            paused: The queues without demand.

        Raises:
            TransportNotReady: A queue no longer exists.
        """
        limit = min(limit, _MAX_GRANT)
        without_demand = []
        for queue in list(self._queues):
            if self._check_missing_at and self._check_missing_at.get(queue.name, 0.0) > time.monotonic():
                continue
            if self._broker.amqp and queue.name not in self._standing:
                self._open_standing(queue, limit)
            if limit and queue.name not in paused:
                self._releases.clear(queue.name)
                self._grant(queue, limit)
            else:
                without_demand.append(queue)
        return self._broker.in_requeue_order(self._take_released(without_demand)) if without_demand else ()

    def cancel(self) -> None:
        """Cancel every consumer. When this returns the queues have processed the acknowledgements sent before."""
        for queue in self._queues:
            self._cancel_extra(queue)
        self._receive_in_transit(self._standing.values())
        for consumer in self._standing.values():
            consumer.queue.cancel(consumer.tag)
        self._standing.clear()

    def take_deleted(self) -> list[str]:
        """Return the queues that were deleted since the last call; they are declared and consumed again."""
        deleted = sorted(self._deleted)
        self._deleted.clear()
        return deleted

    def note_started(self, queue: str) -> None:
        """Record that a message of a queue can be started: not all of its messages are delayed."""
        if self._grant_steps:
            self._grant_steps.pop(queue, None)

    def excess_cancelled(self) -> set[QueueConsumer]:
        """Return the cancelled consumers that a queue keeps because of messages here, if they are too many."""
        excess: set[QueueConsumer] = set()
        for name, consumers in self._cancelled.items():
            if len(consumers) > _MAX_CANCELLED:
                consumers = self._cancelled[name] = [consumer for consumer in consumers if consumer.unacknowledged > 0]
            if len(consumers) > _MAX_CANCELLED:
                consumers.sort(key=lambda consumer: consumer.unacknowledged)
                excess.update(consumers[:-_CANCELLED_LEFT])
                self._cancelled[name] = consumers[-_CANCELLED_LEFT:]
        return excess

    def counts_returns(self, queue: str) -> bool:
        """Whether a queue counts requeued messages, as quorum queues do, or may do so because its type is unknown."""
        return self._broker.amqp and (queue in self._counting or self._settings.may_be_quorum(queue))

    def flush(self) -> None:
        """Wait until the queues have processed all acknowledgements, even without a consumer to cancel.

        The broker passes about 32 acknowledgements of a channel at a time to a quorum queue. The others wait in the
        channel. If the channel were closed, they would be lost, and their messages would be delivered again.
        """
        for queue in self._queues:
            counts, returned = self.counts_returns(queue.name), self._returned.pop(queue.name, 0)
            for _ in range(_MIN_FLUSH_ROUNDS + returned // _FLUSH_STEP if counts and returned else 0):
                self._channel.queue_declare(queue.name, passive=True)
                time.sleep(_FLUSH_PAUSE)
            self._channel.queue_declare(queue.name, passive=True)

    @property
    def has_single(self) -> bool:
        """Whether there are queues that are known to have one active consumer."""
        return bool(self._single)

    def is_used_up(self, queue: str) -> bool:
        """Whether a queue delivers no more messages until one is acknowledged, at any demand."""
        return queue in self._single and queue in self._standing and not self._standing[queue].free

    def _open_standing(self, queue: kombu.Queue, limit: int) -> None:
        self._check_exists(queue.name)
        if limit:
            self._grants.setdefault(queue.name, limit)
        self._standing[queue.name] = self._open(queue, self._grants.get(queue.name, 1))

    def _grant(self, queue: kombu.Queue, limit: int) -> None:
        extra = self._extra[queue.name]
        if not self._broker.amqp:  # one grant for the whole channel, which can be changed
            self._channel.basic_qos(0, limit + sum(consumer.unacknowledged for consumer in self._all), False)
            if not extra:
                self._check_exists(queue.name)
                extra.append(self._open(queue, limit))
            return
        granted = self._granted(queue)
        if extra and self._standing[queue.name].waiting:
            self._detect_single(queue)
        if queue.name in self._single or (granted and limit < 2 * granted):
            return
        if (last := extra[-1] if extra else self._standing[queue.name]).waiting >= last.granted:
            self._grant_steps[queue.name] = min(
                _MAX_GRANT_STEP, 2 * max(last.granted, self._grant_steps.get(queue.name, 0))
            )
        for consumer in list(extra):
            # For a quorum queue, a message in transit to a cancelled consumer counts as a crash.
            if not consumer.free or not self.counts_returns(queue.name):
                extra.remove(consumer)
                self._cancel(consumer)
        if (more := limit - self._granted(queue)) > 0:
            extra.append(self._open(queue, max(more, self._grant_steps.get(queue.name, 0))))

    def _detect_single(self, queue: kombu.Queue) -> None:
        name = queue.name
        idle = not self._standing[name].free and not any(consumer.unacknowledged for consumer in self._extra[name])
        if self._single.check(name, idle, lambda: self._broker.queue_counts(name)[0]):
            self._cancel_extra(queue)

    def _check_exists(self, name: str) -> None:
        """Raise TransportNotReady for a missing queue. It is then not checked for a while, to serve the others."""
        try:
            self._broker.ensure_queue(name, "receive")
        except TransportNotReady:
            self._check_missing_at[name] = time.monotonic() + _MISSING_INTERVAL
            raise

    def _granted(self, queue: kombu.Queue) -> int:
        """Return how many more messages of a queue may arrive, with those in the buffer."""
        waiting = sum(incoming.queue == queue.name for incoming in self.buffer) if self.buffer else 0
        return self._standing[queue.name].free + sum(consumer.free for consumer in self._extra[queue.name]) + waiting

    def _open(self, queue: kombu.Queue, limit: int) -> QueueConsumer:
        consumer = QueueConsumer(queue, f"unstract-wire-{uuid.uuid4()}", limit, self._returned)

        def receive(raw: Any) -> None:
            consumer.unacknowledged += 1
            incoming = Incoming(self._channel.message_to_python(raw), queue.name, consumer)
            if COUNT_HEADER in incoming.message.headers:
                self._counting.add(queue.name)
            self.buffer.append(incoming)

        if self._broker.amqp:
            self._channel.basic_qos(0, limit, False)
        else:
            self._all = [
                consumer,
                *(other for other in self._all if other.unacknowledged or self._is_registered(other)),
            ]
        queue.consume(consumer.tag, receive, no_ack=False, on_cancel=lambda tag: self._note_deleted(consumer))
        return consumer

    def _is_registered(self, consumer: QueueConsumer) -> bool:
        name = consumer.queue.name
        return self._standing.get(name) is consumer or consumer in self._extra[name]

    def _note_deleted(self, consumer: QueueConsumer) -> None:
        """Record that the broker has cancelled a consumer: when a queue is deleted, it cancels them one by one."""
        if self._is_registered(consumer):
            name = consumer.queue.name
            self._broker.connection.declared_entities.clear()
            self._standing.pop(name, None)
            self._extra[name].clear()
            self._deleted.add(name)

    def _take_released(self, without_demand: Sequence[kombu.Queue]) -> list[Incoming]:
        """Remove and return the buffered messages that must be released now."""
        if not self.buffer:
            return []
        now = time.monotonic()
        buffered = {incoming.queue for incoming in self.buffer}
        released: list[Incoming] = []
        for queue in without_demand:
            if queue.name in buffered and self._releases.is_due(queue.name, now):
                released += self._released_of(queue)
                self._releases.postpone(queue.name)
        if released:
            self._queues.rotate(-1)  # another queue is the first to send next time
            taken = set(map(id, released))
            self.buffer = deque(incoming for incoming in self.buffer if id(incoming) not in taken)
        return released

    def _released_of(self, queue: kombu.Queue) -> list[Incoming]:
        """Return the messages of extra consumers, and of the standing one if another process may be idle."""
        if queue.name in self._single:
            return []
        self._cancel_extra(queue)
        standing = self._standing.get(queue.name)
        buffered = [incoming for incoming in self.buffer if incoming.queue == queue.name]
        of_extra = [incoming for incoming in buffered if incoming.consumer is not standing]
        if len(of_extra) == len(buffered) or self._others_may_be_idle(queue.name):
            return buffered
        return of_extra

    def _others_may_be_idle(self, queue: str) -> bool:
        with mapped("receive"):
            ready, consumers = self._broker.queue_counts(queue)
        # A quorum queue also counts our cancelled consumers until all of their messages are acknowledged.
        ours = 1 + sum(consumer.unacknowledged > 0 for consumer in self._cancelled.get(queue, ()))
        return consumers > ours and not ready

    def _cancel_extra(self, queue: kombu.Queue) -> None:
        extra = self._extra[queue.name]
        self._receive_in_transit(extra)
        while extra:
            self._cancel(extra.pop())

    def _cancel(self, consumer: QueueConsumer) -> None:
        consumer.queue.cancel(consumer.tag)
        if consumer.unacknowledged and self.counts_returns(consumer.queue.name):
            self._cancelled.setdefault(consumer.queue.name, []).append(consumer)

    def _receive_in_transit(self, consumers: Iterable[QueueConsumer]) -> None:
        """Receive the messages in transit to consumers of quorum queues before a cancel, which would count them."""
        for consumer in consumers:
            if not self.counts_returns(consumer.queue.name):
                continue
            silent = 0
            for _ in range(_MAX_PULSES):
                if (
                    not consumer.free
                    or silent >= _MAX_SILENT_PULSES
                    or not self._broker.queue_counts(consumer.queue.name)[0]
                ):
                    break
                before = len(self.buffer)
                with contextlib.suppress(TimeoutError):
                    self._broker.connection.drain_events(timeout=_PULSE)
                silent = silent + 1 if len(self.buffer) == before else 0
            self._channel.basic_qos(0, 1, False)  # the broker answers after the messages that it sent before
