"""A small thread-safe pool of connections for publishing, opened when needed; the one used last is used first.

Idle connections have no heartbeats. A connection that the broker has ended meanwhile is detected before it is used.
After a fork, the child does not use inherited connections, because they belong to the parent process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from transports.celery.broker import Broker
from transports.celery.broker_settings import BrokerSettings
from transports.celery.encode import Outgoing
from unstract_core.errors import TransportClosed, TransportError, TransportUnavailable

_inherited: list[Broker] = []
"""The connections of a parent process: to close one here, or to collect it as garbage, would end the parent's."""


def leave_to_parent(broker: Broker) -> None:
    """Never close a connection that was opened before a fork."""
    _inherited.append(broker)


class PublisherPool:
    """A pool of connections; a caller waits for a free one for up to `confirm_timeout` seconds.

    Args:
        settings: The settings of the broker.
        size: The highest number of connections.
    """

    def __init__(self, settings: BrokerSettings, size: int) -> None:
        self._settings = settings
        self._size = size
        self._closed = False
        self._begin()

    def publish(self, operation: str, messages: Sequence[Outgoing]) -> list[TransportError | None]:
        """Publish, and return the error of each message; none is sent if a queue cannot be declared (`Broker.publish`).

        Raises:
            TransportUnavailable: There is no connection; nothing was sent.
        """
        with self.broker(operation) as broker:
            return broker.publish(operation, messages, all_or_none=True)

    @contextlib.contextmanager
    def broker(self, operation: str) -> Iterator[Broker]:
        """Lend a connection to the calling thread; a broken one does not return to the pool."""
        self._reset_after_fork()
        self.check_open(operation)
        slots = self._slots
        if not slots.acquire(timeout=self._settings.confirm_timeout):
            raise TransportUnavailable(
                f"{operation}: all {self._size} connections were in use", effect="nothing was done"
            )
        try:
            broker = self._take_idle() or Broker(self._settings)
            try:
                yield broker
            finally:
                self._take_back(broker)
        finally:
            slots.release()

    def check_open(self, operation: str) -> None:
        if self._closed:
            raise TransportClosed(f"{operation}: the transport was closed")

    def close(self) -> None:
        self._closed = True
        self._reset_after_fork()
        while (broker := self._take_idle()) is not None:
            broker.close()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: list[Broker] = []
        self._slots = threading.BoundedSemaphore(self._size)

    def _reset_after_fork(self) -> None:
        if self._pid != os.getpid():
            _inherited.extend(self._idle)
            self._begin()

    def _take_idle(self) -> Broker | None:
        """Return an idle connection, or None. A blocked one is the first choice, because it fails at once.

        A send on another one would be blocked too, after a wait.
        """
        for blocked in [broker for broker in self._idle if broker.blocked is not None]:
            with contextlib.suppress(ValueError):  # another thread has it
                self._idle.remove(blocked)
                self._idle.append(blocked)
        try:
            while (broker := self._idle.pop()).is_disconnected:
                broker.abort()
        except IndexError:
            return None
        return broker

    def _take_back(self, broker: Broker) -> None:
        if not broker.usable:
            broker.abort()
        elif self._closed:
            broker.close()
        else:
            self._idle.append(broker)
