"""Reads incoming messages, and does not count deliveries that were not started.

A broker that counts deliveries also counts those that a worker released, or lost before it started them. A process
remembers the messages that it returned unstarted, so that such deliveries do not count as attempts.
"""

from __future__ import annotations

import time
from collections import OrderedDict

import attrs

from transports.celery.decode import Envelope, read_message
from transports.celery.fields import MessageKey
from transports.celery.incoming import Incoming

_MAX_UNSTARTED = 20_000
_UNSTARTED_TTL = 3600.0
"""The number of unstarted messages that are remembered, and the time in seconds."""


class MessageReader:
    """Reads the messages of one subscription.

    Args:
        default_queue: The queue of links that name none.
        time_limits: Whether tasks with time limits are accepted.
    """

    def __init__(self, default_queue: str, time_limits: bool) -> None:
        self._default_queue = default_queue
        self._time_limits = time_limits
        self._unstarted: OrderedDict[MessageKey, tuple[int, float]] = OrderedDict()

    def read(self, incoming: Incoming, *, to_run: bool = True) -> Envelope:
        """Read a message, and record in it when it is due and how many of its deliveries were not started.

        If a message arrives before it is due, no delivery since its time was set has been started.

        Args:
            incoming: The message.
            to_run: Whether it is read to be run (default). If False, time limits are ignored.
        """
        time_limits = self._time_limits or not to_run
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
            if time.monotonic() - since < _UNSTARTED_TTL:
                incoming.unstarted = max(incoming.unstarted, known)
        incoming.unstarted = min(incoming.unstarted, counted)
        return attrs.evolve(envelope, attempt=envelope.attempt - incoming.unstarted) if incoming.unstarted else envelope

    def note_unstarted(self, key: MessageKey, already: int = 0) -> None:
        """Remember that a message returns to its queue without having been started.

        Args:
            key: The key of the message.
            already: How many earlier deliveries of it were not started.
        """
        now = time.monotonic()
        self._unstarted[key] = (already + 1, now)
        self._unstarted.move_to_end(key)
        while len(self._unstarted) > _MAX_UNSTARTED or now - next(iter(self._unstarted.values()))[1] > _UNSTARTED_TTL:
            self._unstarted.popitem(last=False)
