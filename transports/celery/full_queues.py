"""Full queues that refuse messages of settlements, and the queues whose deliveries wait for them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable

from transports.celery.errors import Nacked
from transports.celery.in_flight import InFlightDeliveries, InFlightDelivery
from unstract_core.errors import TransportError
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.celery")

_MAX_WAITING = 3
"""The number of deliveries of one queue that may wait for another, full queue before the queue is paused."""
_MAX_WAITING_FOR_ITSELF = 1000
"""The same for a queue that is full itself: it shrinks only when more of its messages are received."""
_PROBE_INTERVAL = 0.5
"""The time in seconds between two receives from a paused queue."""


class FullQueues:
    """Pauses the queues whose deliveries wait until a full queue accepts messages.

    Args:
        in_flight: The deliveries in flight.
    """

    def __init__(self, in_flight: InFlightDeliveries) -> None:
        self._in_flight = in_flight
        self._full: set[str] = set()
        self._probe_at: dict[str, float] = {}

    def note(self, outcomes: Iterable[tuple[InFlightDelivery, str, TransportError | None]]) -> None:
        """Record the answers of the queues, and log those that are full and those that accept messages again.

        Args:
            outcomes: A delivery, the queue of a message of its settlement, and the error of that message; None if the
                queue accepted it.
        """
        accepting: set[str] = set()
        for entry, queue, error in outcomes:
            if isinstance(error, Nacked):
                entry.full_queue = queue
                if queue not in self._full:
                    self._full.add(queue)
                    emit(logger, logging.WARNING, "queue_full", queue=queue, waiting_in=entry.delivery.queue)
                continue
            if entry.full_queue == queue:
                entry.full_queue = ""
            if error is None:
                accepting.add(queue)
        for queue in self._full & accepting:
            if not any(entry.full_queue == queue for entry in self._in_flight):
                self._full.discard(queue)
                emit(logger, logging.INFO, "queue_has_room", queue=queue)

    def paused(self) -> Collection[str]:
        """Return the queues from which nothing is received now."""
        if not self._full:
            return frozenset()
        waiting = Counter(entry.delivery.queue for entry in self._in_flight if entry.full_queue)
        return frozenset(queue for queue, count in waiting.items() if self._is_paused(queue, count))

    def _is_paused(self, queue: str, waiting: int) -> bool:
        """Whether a queue is paused; at intervals it is not, for one try.

        A received message makes space in its own queue, and the worker of the full queue may wait for that space.
        """
        if waiting <= (_MAX_WAITING_FOR_ITSELF if queue in self._full else _MAX_WAITING):
            self._probe_at.pop(queue, None)
            return False
        now = time.monotonic()
        if waiting > _MAX_WAITING_FOR_ITSELF or now < self._probe_at.setdefault(queue, now + _PROBE_INTERVAL):
            return True
        self._probe_at[queue] = now + _PROBE_INTERVAL
        return False
