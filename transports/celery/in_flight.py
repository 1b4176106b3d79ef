"""The deliveries of a subscription that are not settled yet, with the state of each."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import attrs

from transports.celery.decode import Received
from transports.celery.fields import MessageKey
from transports.celery.incoming import Incoming
from unstract_core.transport import Delivery

DeliveryKey: TypeAlias = tuple[str, int]
"""The id and attempt of a delivery."""


class DeliveryState(enum.Enum):
    """The states of a delivery in flight."""

    RUNNING = "its message is unacknowledged on the present connection"
    UNCONFIRMED = "a message of its settlement was handed to a broker that has not confirmed it yet"
    NO_ROOM = "a message of its settlement was refused by a full queue"
    AWAITING_REDELIVERY = "its connection broke, and the broker has not delivered its message again yet"


@attrs.define(eq=False)
class InFlightDelivery:
    """A delivery in flight, and the parts of its settlement that are done."""

    delivery: Delivery
    received: Received
    #: Its message on the current connection; None while it waits for its redelivery.
    incoming: Incoming | None
    #: The key that only the redeliveries of its message share.
    message_key: MessageKey
    #: The number of deliveries that the broker has counted although the task was not started.
    unstarted: int = 0
    #: The names of the messages of its settlement that the broker has confirmed.
    published: set[str] = attrs.field(factory=set)
    #: The tags of the messages that a blocked broker has not confirmed yet, by name.
    unconfirmed: dict[str, int] = attrs.field(factory=dict)
    #: The full queue that refused a message of its settlement; "" for none.
    full_queue: str = ""
    #: When the consumer last renewed or settled it, on the monotonic clock.
    used_at: float = attrs.field(factory=time.monotonic)

    @property
    def state(self) -> DeliveryState:
        if self.incoming is None:
            return DeliveryState.AWAITING_REDELIVERY
        if self.unconfirmed:
            return DeliveryState.UNCONFIRMED
        return DeliveryState.NO_ROOM if self.full_queue else DeliveryState.RUNNING


class InFlightDeliveries:
    """The only owner of the deliveries in flight.

    Args:
        forget_after: The time in seconds after which a delivery that its consumer does not renew counts as forgotten:
            its redelivered message becomes a new delivery.
    """

    def __init__(self, forget_after: float) -> None:
        self._forget_after = forget_after
        self._deliveries: dict[DeliveryKey, InFlightDelivery] = {}
        self._settled: dict[DeliveryKey, bool] = {}

    def __iter__(self) -> Iterator[InFlightDelivery]:
        return iter(self._deliveries.values())

    def __len__(self) -> int:
        return len(self._deliveries)

    def __contains__(self, key: DeliveryKey) -> bool:
        return key in self._deliveries

    def add(self, entry: InFlightDelivery) -> None:
        self._deliveries[delivery_key(entry.delivery)] = entry

    def use(self, delivery: Delivery) -> InFlightDelivery | None:
        """Return a delivery, and record that its consumer still has it; None if it is not in flight."""
        entry = self._deliveries.get(delivery_key(delivery))
        if entry is not None:
            entry.used_at = time.monotonic()
        return entry

    def remove(self, delivery: Delivery) -> InFlightDelivery | None:
        return self._deliveries.pop(delivery_key(delivery), None)

    def note_settled(self, delivery: Delivery, answer: bool) -> None:
        """Keep the answer to a settlement whose batch failed: its consumer settles the batch again."""
        self._settled[delivery_key(delivery)] = answer

    def is_settled(self, delivery: Delivery) -> bool:
        """Whether an answer is kept for the next settlement of a delivery."""
        return delivery_key(delivery) in self._settled

    def settled_answer(self, delivery: Delivery) -> bool:
        """Return the kept answer to an earlier settlement; False if there is none."""
        return self._settled.get(delivery_key(delivery), False)

    def forget_answer(self, delivery: Delivery) -> None:
        self._settled.pop(delivery_key(delivery), None)

    def note_connection_lost(self) -> None:
        """Wait for the redelivery of every message, because the broker has its messages again."""
        for entry in self:
            entry.incoming = None
            entry.unconfirmed.clear()

    def awaiting_redelivery(self) -> dict[MessageKey, InFlightDelivery]:
        """Return the deliveries whose message may be redelivered, by the key of the message."""
        known = time.monotonic() - self._forget_after
        lost = {
            entry.message_key: entry
            for entry in self
            if entry.state is DeliveryState.AWAITING_REDELIVERY and entry.used_at >= known
        }
        return {key: entry for key, entry in lost.items() if key[0] is not None}

    def match_redelivered(self, buffer: deque[Incoming]) -> None:
        """Move redelivered messages from the buffer to the deliveries that wait for them."""
        if not buffer or not (awaiting := self.awaiting_redelivery()):
            return
        redelivered = [incoming for incoming in buffer if incoming.redelivered]
        for incoming in redelivered:
            if (entry := awaiting.pop(incoming.key, None)) is not None:
                entry.incoming = incoming
                entry.unstarted += 1
                buffer.remove(incoming)


def delivery_key(delivery: Delivery) -> DeliveryKey:
    return delivery.id, delivery.attempt
