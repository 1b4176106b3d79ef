"""A subscription's connection: opened when it is needed, and opened again after it broke.

`wait` ends when the broker has sent data, when `wake` is called or was called before, or when a heartbeat is due. A
broker that kombu emulates has no socket to wait on; it is polled.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Sequence

from transports.celery.amqp_patches import TICK
from transports.celery.broker import Broker
from transports.celery.broker_settings import BrokerSettings
from transports.celery.consumers import QueueConsumers
from transports.celery.incoming import Incoming
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.celery")

_POLL_INTERVAL = 0.02
"""The time in seconds between two polls of a broker without a socket to wait on."""


class BrokerConnection:
    """Owned by one thread; only `wake` may be called from another thread, or from a signal handler.

    The constructor connects, and raises an error if that fails. After a lost connection `broker` and `consumers`
    connect again.

    Args:
        settings: The settings of the broker.
        queues: The names of the queues to receive from.

    Attributes:
        unread: The messages that had arrived over a connection that was dropped later; the owner takes them.
    """

    def __init__(self, settings: BrokerSettings, queues: Sequence[str]) -> None:
        self._settings = settings
        self._queues = queues
        self._tick_at = 0.0
        self._since = 0.0
        self._live: tuple[Broker, QueueConsumers] | None = None
        self._grants: dict[str, int] = {}
        self._counting: set[str] = set()
        self._logged_blocked = False
        self.unread: list[Incoming] = []
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        try:
            self._connected()[1].ensure_queues()
        except BaseException:
            self.close()
            raise

    @property
    def broker(self) -> Broker:
        return self._connected()[0]

    @property
    def consumers(self) -> QueueConsumers:
        return self._connected()[1]

    @property
    def blocked(self) -> bool:
        """Whether the broker has blocked this connection: it accepts no messages and reads nothing from it."""
        return self._live is not None and self._live[0].blocked is not None

    @property
    def live(self) -> bool:
        """Whether there is a usable connection; opens none."""
        return self._live is not None and self._live[0].usable and not self.blocked

    @property
    def age(self) -> float:
        """The age of the connection in seconds; 0 while there is none."""
        return time.monotonic() - self._since if self._live is not None else 0.0

    def read(self) -> None:
        """Read the messages that the broker has sent, without waiting for more."""
        broker, consumers = self._connected()
        while not consumers.full:
            try:
                broker.connection.drain_events(timeout=0)
            except TimeoutError:  # there was nothing, a heartbeat, or the beginning of something large
                return
            for queue in consumers.take_deleted():
                emit(logger, logging.WARNING, "queue_deleted", queue=queue)

    def wait(self, seconds: float) -> None:
        """Wait for the broker or for `wake`, for at most `seconds`, or until a release is due."""
        broker, consumers = self._connected()
        self.keep_alive()
        until_release = consumers.seconds_until_release if broker.blocked is None else TICK
        self._selector.select(min(seconds, TICK if broker.amqp else _POLL_INTERVAL, until_release))

    def keep_alive(self) -> None:
        """Send a heartbeat if one is due. Raises if the broker's heartbeats are missing."""
        broker, _ = self._connected()
        if time.monotonic() >= self._tick_at:
            self._tick_at = time.monotonic() + TICK
            broker.keep_alive()

    def wake(self) -> None:
        # Either the buffer is full and wakes the owner anyway, or the connection is closed and has no owner.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"!")

    def woken(self) -> bool:
        """Whether `wake` was called since the last call."""
        try:
            return bool(self._wake_r.recv(4096))
        except BlockingIOError:
            return False

    def drop_if_broken(self) -> bool:
        """Drop a connection that is not usable; return whether there is none now."""
        if self._live is not None and not self._live[0].usable:
            self._drop().abort()
        return self._live is None

    def close(self, unacknowledged: Sequence[Incoming] = ()) -> None:
        """Close the connection: unacknowledged messages return to their queues.

        Args:
            unacknowledged: The messages that are no longer in the buffer. They are returned one by one to a broker that
                kombu emulates.
        """
        if self._live is not None:
            broker, consumers = self._live
            for incoming in () if broker.amqp else broker.in_requeue_order((*unacknowledged, *consumers.buffer)):
                with contextlib.suppress(Exception):
                    incoming.requeue()
            self._drop().close(consumers.cancel)
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def _connected(self) -> tuple[Broker, QueueConsumers]:
        if self._live is None:
            broker = Broker(
                self._settings, heartbeat=self._settings.heartbeat, late_confirms=True, on_block=self._note_block
            )
            try:
                queues = [self._settings.queue(name) for name in self._queues]
                consumers = QueueConsumers(broker, queues, self._settings, self._grants, self._counting)
                if broker.amqp:
                    self._selector.register(broker.connection.connection.sock, selectors.EVENT_READ)
            except BaseException:
                broker.abort()
                raise
            self._live, self._since = (broker, consumers), time.monotonic()
        return self._live

    def _note_block(self, reason: str | None) -> None:
        if reason is not None and not self._logged_blocked:
            emit(logger, logging.WARNING, "broker_blocked", reason=reason)
        elif reason is None and self._logged_blocked:
            emit(logger, logging.INFO, "broker_unblocked")
        self._logged_blocked = reason is not None

    def _drop(self) -> Broker:
        (broker, consumers), self._live = self._connected(), None
        self.unread += consumers.buffer
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._wake_r:
                self._selector.unregister(key.fileobj)
        return broker
