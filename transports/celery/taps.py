"""How many messages the broker may send ahead, and what has arrived.

The broker sends to a consumer until as many of its messages are unacknowledged as the consumer was granted. A grant
cannot be changed (quorum queues know no other kind), so a consumer that has too little is replaced by one with a new
grant, or joined by it; what the old one holds does not count against it. What arrived and is not wanted for a while,
because every thread is busy for longer, is given back to the queue for others.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import attrs
import kombu

from transports.celery.broker import Broker, Settings
from transports.celery.envelope import key_of
from transports.celery.errors import mapped
from unstract_core.errors import TransportNotReady

_WINDOW = 0.05
"""Seconds after which what nobody wants is given back."""
_LARGEST_BUFFER = 2000
_LARGEST_GRANT = 65535
_ABSENCE = 2.0
"""Seconds between two looks for a queue that is not there."""


@attrs.define(eq=False)
class Tap:
    """A consumer of one queue, with its grant and how many of its messages are unacknowledged."""

    queue: kombu.Queue
    tag: str
    granted: int
    unacknowledged: int = 0


@attrs.define(eq=False)
class Arrived:
    """A message that the broker sent, through one tap."""

    message: kombu.Message
    queue: str
    tap: Tap

    @property
    def redelivered(self) -> bool:
        return bool((self.message.delivery_info or {}).get("redelivered"))

    @property
    def key(self) -> tuple[str | None, int]:
        return key_of(self.message)

    def ack(self) -> None:
        self.message.ack()  # which is asked again where it fails, and counts once
        self.tap.unacknowledged -= 1

    def requeue(self) -> None:
        self.message.requeue()
        self.tap.unacknowledged -= 1

    def is_later_than(self, moment: float) -> bool:
        """Whether its `eta` is after this moment, in seconds since the epoch."""
        with contextlib.suppress(TypeError, ValueError):
            eta = datetime.datetime.fromisoformat(self.message.headers.get("eta"))
            return (eta if eta.tzinfo else eta.replace(tzinfo=datetime.UTC)).timestamp() > moment
        return False


class Taps:
    """The consumers of a subscription, one for each queue, on a channel of their own."""

    def __init__(self, broker: Broker, queues: Sequence[kombu.Queue], settings: Settings) -> None:
        self.arrived: deque[Arrived] = deque()
        self._broker = broker
        self._settings = settings
        self._unwanted_since: float | None = None
        self._taps: dict[str, Tap] = {}
        self._beside: list[Tap] = []
        self._every: list[Tap] = []
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
        return len(self.arrived) >= _LARGEST_BUFFER

    @property
    def patience(self) -> float:
        """Seconds until what nobody wants is to be given back."""
        if self._unwanted_since is None:
            return math.inf
        return max(0.0, self._unwanted_since + _WINDOW - time.monotonic())

    def want(self, limit: int) -> list[Arrived]:
        """Say how many more messages there is room for now; returns what is to be given back to its queue.

        Raises TransportNotReady for a queue that is not there any more.
        """
        limit = min(limit, _LARGEST_GRANT)
        if limit:
            self._unwanted_since = None
            for queue in self._queues:
                if self._missing.get(queue.name, 0.0) <= time.monotonic():
                    self._grant(queue, limit)
        elif not self.arrived:
            self._unwanted_since = None
        elif self._unwanted_since is None:
            self._unwanted_since = time.monotonic()
        elif not self.patience:
            return self._close()
        return []

    def cancel(self) -> None:
        """Let nothing more be sent. When this returns the queues have taken in what was acknowledged before."""
        for tap in (*self._taps.values(), *self._beside):
            tap.queue.cancel(tap.tag)
        self._taps.clear()
        self._beside.clear()

    def deleted(self) -> list[str]:
        """Return the queues that were deleted since this was last asked; they are declared and consumed anew."""
        deleted = sorted(self._deleted)
        self._deleted.clear()
        return deleted

    def _grant(self, queue: kombu.Queue, limit: int) -> None:
        tap = self._taps.get(queue.name)
        if not self._broker.amqp:  # one grant for the whole channel, which can be changed
            self._channel.basic_qos(0, limit + sum(one.unacknowledged for one in self._every), False)
            if tap is not None:
                return
        elif tap is not None:
            if limit < 2 * self._granted(tap):
                return
            if self._settings.is_quorum(queue.name):  # which counts what was on its way to a cancelled one as a crash
                self._beside.append(tap)
            else:
                queue.cancel(tap.tag)
        if tap is None:
            self._find(queue.name)
        self._taps[queue.name] = self._open(queue, limit)

    def _find(self, name: str) -> None:
        """See that a queue is there. One that cannot be had is told, and left alone for a while: there are others."""
        try:
            self._broker.find(name, "receive")
        except TransportNotReady:
            self._missing[name] = time.monotonic() + _ABSENCE
            raise

    def _granted(self, tap: Tap) -> int:
        """Return how many more messages of the tap's queue may come, with those that have come and wait."""
        taps = [tap, *(one for one in self._beside if one.queue is tap.queue)]
        waiting = sum(one.tap in taps for one in self.arrived) if self.arrived else 0
        return sum(one.granted - one.unacknowledged for one in taps) + waiting

    def _open(self, queue: kombu.Queue, limit: int) -> Tap:
        tap = Tap(queue, f"unstract-wire-{uuid.uuid4()}", limit)

        def receive(raw: Any) -> None:
            tap.unacknowledged += 1
            self.arrived.append(Arrived(self._channel.message_to_python(raw), queue.name, tap))

        if self._broker.amqp:
            self._channel.basic_qos(0, limit, False)
        self._every = [tap, *(one for one in self._every if one.unacknowledged or one in self._taps.values())]
        queue.consume(tap.tag, receive, no_ack=False, on_cancel=lambda tag: self._note_deleted(queue.name))
        return tap

    def _note_deleted(self, name: str) -> None:
        self._broker.connection.declared_entities.clear()
        self._taps.pop(name, None)
        self._beside = [tap for tap in self._beside if tap.queue.name != name]
        self._deleted.add(name)

    def _close(self) -> list[Arrived]:
        self.cancel()
        self._queues.rotate(-1)  # so that none is always the first to send, and the others given back
        self._unwanted_since = None
        unwanted = list(self.arrived)
        self.arrived.clear()
        return unwanted
