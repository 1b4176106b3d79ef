"""`CelerySubscription`: receiving and settling messages over the Celery transport.

AMQP has no leases: a message belongs to this subscription until the connection breaks, and is then delivered to another
consumer. So a settlement publishes first, waits for the confirms, and then acknowledges. A delivery whose connection
broke waits for the redelivery of its message. Its outcome is published in any case, because a doubled callback is
better than a lost one.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from transports.celery.broker_settings import BrokerSettings
from transports.celery.connection import BrokerConnection
from transports.celery.decode import Received
from transports.celery.delayed_messages import DelayedMessages
from transports.celery.errors import mapped
from transports.celery.full_queues import FullQueues
from transports.celery.in_flight import InFlightDeliveries, InFlightDelivery
from transports.celery.incoming import Incoming
from transports.celery.message_reader import MessageReader
from transports.celery.settlement_plan import SettlementPlanner, is_release
from transports.celery.settling import carry_out
from unstract_core.errors import TransportClosed, TransportError, TransportUnavailable
from unstract_core.transport import Delivery, Settlement

_REDELIVERY_WINDOW = 3.0
"""The time in seconds after a new connection in which the messages of the connection before may be redelivered."""
_CLOSE_TIMEOUT = 5.0
"""The time in seconds that a broker has to answer when messages are released at the end."""


class CelerySubscription:
    """Owned by one thread; only `wake` may be called from another thread, or from a signal handler.

    Args:
        settings: The settings of the broker.
        queues: The names of the queues.
        lease: The time in seconds within which the consumer renews its deliveries.
        default_queue: The queue of links that name none.
        time_limits: Whether tasks with time limits are accepted.
        transport_closed: Returns whether the transport was closed.
    """

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
        self._transport_closed = transport_closed
        self._closed = False
        self._numbers = itertools.count()
        self._in_flight = InFlightDeliveries(forget_after=lease + settings.confirm_timeout)
        self._planner = SettlementPlanner(self._in_flight, settings, default_queue)
        self._full_queues = FullQueues(self._in_flight)
        self._reader = MessageReader(default_queue, time_limits)
        self._connection = BrokerConnection(settings, self._queues)
        self._delayed = DelayedMessages(settings, self._connection, self._reader)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Receive up to `limit` messages (`unstract_core.Subscription.receive`).

        Args:
            limit: The highest number of messages; 0 only waits.
            wait: The time in seconds to wait for the first message.
        """
        self._check_open()
        deadline = time.monotonic() + wait
        with self._connected("receive"):
            while True:
                room, blocked = self._delayed.room(limit), self._connection.blocked
                paused = self._full_queues.paused()
                if not blocked:
                    self._request(room + self._expected_redeliveries(), paused)
                self._connection.read()
                self._in_flight.match_redelivered(self._connection.consumers.buffer)
                delayed = len(self._delayed)
                deliveries = self._take(limit, paused) if not self._connection.blocked else []
                if self._delayed and not self._connection.blocked:
                    self._delayed.limit(receiving=limit > 0)
                remaining = deadline - time.monotonic()
                if deliveries or remaining <= 0 or self._connection.woken():
                    return deliveries
                if len(self._delayed) > delayed and room:  # messages that are due may follow in the queue
                    continue
                if self._delayed and not blocked:
                    remaining = min(remaining, self._delayed.seconds_until_next())
                self._connection.wait(remaining)
                self._check_open()

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Return for each delivery whether it still belongs to this subscription: True until the connection breaks."""
        self._check_open()
        with contextlib.suppress(TransportError), self._connected("renew"):
            self._connection.keep_alive()
            self._connection.read()
            self._in_flight.match_redelivered(self._connection.consumers.buffer)
        may_return = self._connection.age < _REDELIVERY_WINDOW
        entries = [(delivery, self._in_flight.use(delivery)) for delivery in deliveries]
        return [
            self._in_flight.is_settled(delivery) if entry is None else entry.incoming is not None or may_return
            for delivery, entry in entries
        ]

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Publish, wait for the confirms, then acknowledge (`unstract_core.Subscription.settle`).

        Raises the error of the first settlement that failed. The others have taken effect; a second call for them only
        returns their answers.
        """
        self._check_open()
        try:
            with self._connected("settle", fate_unknown=True):
                self._read_redeliveries(settlements)
                plans = self._planner.plan(settlements, self._connection.consumers.counts_returns)
                carry_out(plans, self._connection.broker, self._full_queues, self._settings.declare)
                for plan in plans:
                    if plan.entry is not None and plan.error is None:
                        plan.settled = self._in_flight.remove(plan.settlement.delivery) is not None
                        if plan.entry.incoming is None and not plan.settlement.counted:
                            self._reader.note_unstarted(plan.entry.message_key, plan.entry.unstarted)
            if error := next((plan.error for plan in plans if plan.error is not None), None):
                for plan in plans:
                    if plan.entry is not None and plan.error is None:
                        self._in_flight.note_settled(plan.settlement.delivery, plan.settled)
                raise error
        except TransportError:
            releases = (
                self._in_flight.remove(settlement.delivery) for settlement in settlements if is_release(settlement)
            )
            self._delayed.return_unstarted(entry for entry in releases if entry is not None)
            raise
        for plan in plans:
            self._in_flight.forget_answer(plan.settlement.delivery)
        return [plan.settled for plan in plans]

    def wake(self) -> None:
        self._connection.wake()

    def close(self) -> None:
        """Return every message that is not settled, and close the connection. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):
                self._release_unstarted()
            running = [entry.incoming for entry in self._in_flight if entry.incoming is not None]
            self._connection.close([*running, *self._delayed])

    def _release_unstarted(self) -> None:
        """Send unstarted messages again to queues that count the end of a connection as a failed delivery."""
        if not self._connection.live or not self._connection.broker.amqp:
            return
        self._connection.broker.limit_waits(_CLOSE_TIMEOUT)
        consumers = self._connection.consumers
        self._connection.read()  # a message in transit may show that its queue counts
        if not any(map(consumers.counts_returns, self._queues)):
            return
        consumers.cancel()
        waiting = [*self._delayed, *consumers.buffer]
        self._delayed.clear()
        if counted := [incoming for incoming in waiting if consumers.counts_returns(incoming.queue)]:
            self._delayed.resend(counted)
        consumers.flush()

    def _request(self, number: int, paused: Collection[str] = ()) -> None:
        """Ask the broker for more messages, and release those for which no thread is free."""
        self._delayed.release(self._connection.consumers.set_demand(number, paused))

    def _take(self, limit: int, paused: Collection[str]) -> list[Delivery]:
        """Return messages that are due, first those that were delayed, then those in the buffer."""
        deliveries: list[Delivery] = []
        buffer = self._connection.consumers.buffer
        due = self._delayed.take_due()
        skipped: list[Incoming] = []
        while len(deliveries) < limit and (due or buffer):
            incoming = due.popleft() if due else buffer.popleft()
            if incoming.queue in paused:
                skipped.append(incoming)
            elif (delivery := self._open(incoming)) is not None:
                deliveries.append(delivery)
        buffer.extendleft(reversed([*skipped, *due]))
        return deliveries

    def _open(self, incoming: Incoming) -> Delivery | None:
        """Read a message and record it as in flight; None if it is delayed."""
        envelope = self._reader.read(incoming)
        if (seconds := incoming.due - time.time()) > 0:
            self._delayed.add(incoming, seconds)
            return None
        id = envelope.id or f"{incoming.queue}/{next(self._numbers)}"
        if (id, envelope.attempt) in self._in_flight:  # the same task was sent twice
            id = f"{id}/{next(self._numbers)}"
        incoming.stop_waiting()
        self._connection.consumers.note_started(incoming.queue)
        delivery = envelope.delivery(id, incoming.queue)
        received = Received(incoming.message, envelope, incoming.queue)
        self._in_flight.add(InFlightDelivery(delivery, received, incoming, incoming.key, incoming.unstarted))
        return delivery

    def _expected_redeliveries(self) -> int:
        """Return how many messages of the connection before this one may be redelivered."""
        return len(self._in_flight.awaiting_redelivery()) if self._connection.age < _REDELIVERY_WINDOW else 0

    def _read_redeliveries(self, settlements: Sequence[Settlement]) -> None:
        """Read redelivered messages. Raises TransportUnavailable while a message may still be redelivered."""
        entries = [self._in_flight.use(settlement.delivery) for settlement in settlements]
        lost = [entry for entry in entries if entry is not None and entry.incoming is None]
        if lost and (expected := self._expected_redeliveries()):
            if not self._connection.blocked:
                self._request(expected)
            self._connection.read()
            self._in_flight.match_redelivered(self._connection.consumers.buffer)
            if any(entry.incoming is None for entry in lost):
                raise TransportUnavailable("settle: the connection is new, and the message not delivered again yet")

    @contextlib.contextmanager
    def _connected(self, operation: str, *, fate_unknown: bool = False) -> Iterator[None]:
        """Map the errors of the block, and drop a connection that is not usable after it."""
        try:
            with mapped(operation, fate_unknown=fate_unknown):
                yield
        finally:
            if self._connection.drop_if_broken():
                self._note_connection_lost()

    def _note_connection_lost(self) -> None:
        """Forget the messages that were not started: the broker has them again."""
        for incoming in (*self._connection.unread, *self._delayed):
            self._reader.note_unstarted(incoming.key, incoming.unstarted)
        self._connection.unread.clear()
        self._delayed.clear()
        self._in_flight.note_connection_lost()

    def _check_open(self) -> None:
        if self._closed or self._transport_closed():
            raise TransportClosed("this subscription, or its transport, was closed")
