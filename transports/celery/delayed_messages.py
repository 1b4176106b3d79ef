"""Messages that a subscription keeps until they are due, and those that it sends again to their queues.

AMQP has no delayed delivery: a consumer receives a delayed message at once and keeps it unacknowledged. If a message is
kept for too long, or there are too many, a copy is sent to the end of its queue. The message is acknowledged after the
broker has confirmed the copy.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from transports.celery.amqp_patches import TICK
from transports.celery.broker_settings import BrokerSettings
from transports.celery.connection import BrokerConnection
from transports.celery.copies import retry_copy
from transports.celery.decode import Received
from transports.celery.encode import Outgoing
from transports.celery.errors import InDoubt
from transports.celery.in_flight import InFlightDelivery
from transports.celery.incoming import Incoming
from transports.celery.message_reader import MessageReader
from transports.celery.settlement_messages import RELEASE
from unstract_core.errors import TransportError
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.celery")

_Entry: TypeAlias = tuple[float, int, Incoming]

_MAX_DELAYED = 10_000
"""The highest number of messages that wait here. If there are more, those that are due last are sent again."""
_RESEND_BATCH = 500
"""The number of messages that are sent again together."""
_ROUND = 5.0
"""The time in seconds without receiving more after the first message that was sent again has returned: by then every
message of the queue was looked at."""


class DelayedMessages:
    """The delayed messages of one subscription, by the time at which they are checked again."""

    def __init__(self, settings: BrokerSettings, connection: BrokerConnection, reader: MessageReader) -> None:
        self._settings = settings
        self._connection = connection
        self._reader = reader
        self._heap: list[_Entry] = []
        self._numbers = itertools.count()
        self._resent: set[str | None] = set()
        self._receive_at = 0.0
        self._logged_too_many = False

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Incoming]:
        """Iterate over the messages, in the order in which they are checked again."""
        return (incoming for _, _, incoming in sorted(self._heap))

    def clear(self) -> None:
        self._heap.clear()

    def room(self, limit: int) -> int:
        """Return how many more messages may be received: none for a while after too many were sent again."""
        return limit if len(self._heap) < _MAX_DELAYED or self._receive_at <= time.monotonic() else 0

    def seconds_until_next(self) -> float:
        """Return the time in seconds until the next of the messages is checked again; there must be one."""
        return max(0.0, self._heap[0][0] - time.monotonic())

    def add(self, incoming: Incoming, seconds: float) -> None:
        """Keep a message until it is due.

        Args:
            incoming: The message.
            seconds: The time in seconds until it is due.
        """
        if self._resent and incoming.key[0] in self._resent:
            self._resent.clear()
            self._receive_at = time.monotonic() + _ROUND
        incoming.start_waiting()
        self._push(incoming, min(seconds, self._settings.longest_local_delay))

    def add_unconfirmed(self, incoming: Incoming) -> None:
        """Keep a message whose copy is not confirmed, or not sent yet."""
        self._push(incoming, TICK)

    def take_due(self) -> deque[Incoming]:
        """Remove and return the messages that are due. Messages that were kept too long are sent again."""
        due: deque[Incoming] = deque()
        kept_too_long: list[Incoming] = []
        while self._heap and self._heap[0][0] <= time.monotonic():
            _, _, incoming = heapq.heappop(self._heap)
            later = incoming.due > time.time() or incoming.copy_tag is not None
            (kept_too_long if later else due).append(incoming)
        if kept_too_long:
            self.resend(kept_too_long)
        return due

    def limit(self, receiving: bool) -> None:
        """Send messages again if they are too many for this process, or for the consumers that received them.

        Args:
            receiving: Whether the subscription can receive more messages now.
        """
        if excess := self._connection.consumers.excess_cancelled():
            scattered = [entry for entry in self._heap if entry[2].consumer in excess]
            self._remove(scattered)
            self.resend([incoming for _, _, incoming in sorted(scattered)])
        if len(self._heap) < _MAX_DELAYED - 2 * _RESEND_BATCH:
            self._logged_too_many = False
        if receiving and self._receive_at <= time.monotonic():
            self._resend_last_due()

    def release(self, messages: Sequence[Incoming]) -> None:
        """Return unstarted messages to their queues; a queue that counts requeued messages gets copies instead."""
        counted = [incoming for incoming in messages if self._connection.consumers.counts_returns(incoming.queue)]
        for incoming in messages:
            if incoming not in counted:
                incoming.requeue()
        if counted:
            self.resend(counted)

    def return_unstarted(self, entries: Iterable[InFlightDelivery]) -> None:
        """Return the messages of deliveries whose release failed: their consumer does not settle them again."""
        for entry in entries:
            incoming = entry.incoming
            if incoming is not None and self._keeps_release(entry, incoming):
                continue
            self._reader.note_unstarted(entry.message_key, entry.unstarted)
            if incoming is not None:
                with contextlib.suppress(Exception):
                    incoming.requeue()

    def resend(self, messages: Sequence[Incoming]) -> None:
        """Send messages again to the end of their queues and acknowledge them; those that cannot be sent are kept."""
        try:
            messages = [incoming for incoming in messages if not self._is_resent(incoming)]
        except TransportError:
            for incoming in messages:
                self.add_unconfirmed(incoming)
            raise
        for start in range(0, len(messages), _RESEND_BATCH):
            batch = messages[start : start + _RESEND_BATCH]
            copies: list[Outgoing] = []
            for incoming in batch:
                envelope = self._reader.read(incoming, to_run=False)
                copies.append(
                    retry_copy(Received(incoming.message, envelope, incoming.queue), retries=envelope.attempt - 1)
                )
            for incoming, error in zip(batch, self._connection.broker.publish("postpone", copies), strict=True):
                if error is None:
                    incoming.ack()
                else:
                    incoming.copy_tag = error.tag if isinstance(error, InDoubt) else None
                    self.add_unconfirmed(incoming)

    def _resend_last_due(self) -> None:
        """Send those again that are due last, if the messages here keep others from being received."""
        consumers = self._connection.consumers
        crowd = [entry for entry in self._heap if consumers.is_used_up(entry[2].queue)] if consumers.has_single else []
        number = 1
        if len(self._heap) > _MAX_DELAYED:
            crowd, number = self._heap, _RESEND_BATCH
            if not self._logged_too_many:
                self._logged_too_many = True
                emit(logger, logging.WARNING, "too_many_delayed", waiting=len(self._heap), limit=_MAX_DELAYED)
        if not crowd:
            return
        last_due = heapq.nlargest(number, crowd, key=lambda entry: entry[2].due)
        self._remove(last_due)
        if len(self._resent) > 10 * _MAX_DELAYED:
            self._resent.clear()
        self._resent.update(entry[2].key[0] for entry in last_due)
        self.resend([entry[2] for entry in sorted(last_due, key=lambda entry: entry[1])])

    def _keeps_release(self, entry: InFlightDelivery, incoming: Incoming) -> bool:
        """Keep a message whose copy may be confirmed or sent later: a requeue would double it."""
        tag = next((tag for name, tag in entry.unconfirmed.items() if name.startswith(RELEASE)), None)
        if tag is None and not (self._connection.blocked and self._connection.consumers.counts_returns(incoming.queue)):
            return False
        incoming.copy_tag = tag
        incoming.unstarted = entry.unstarted
        self.add_unconfirmed(incoming)
        return True

    def _is_resent(self, incoming: Incoming) -> bool:
        """Whether a copy of a message is confirmed, or may be confirmed later; the message is acknowledged or kept."""
        if incoming.copy_tag is None:
            return False
        confirmed = self._connection.broker.confirmation_of(incoming.copy_tag)
        if confirmed is None:
            self.add_unconfirmed(incoming)
            return True
        incoming.copy_tag = None
        if confirmed:
            incoming.ack()
        return confirmed

    def _push(self, incoming: Incoming, seconds: float) -> None:
        heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._numbers), incoming))

    def _remove(self, entries: Sequence[_Entry]) -> None:
        numbers = {number for _, number, _ in entries}
        self._heap = [entry for entry in self._heap if entry[1] not in numbers]
        heapq.heapify(self._heap)
