"""Publishing from any thread: a small pool of connections, opened when needed, the one used last first.

Idle connections need no care (they ask for no heartbeats): one that the broker has ended meanwhile is found out before
it is used. What a fork inherited is left alone, because it is the parent's.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from transports.celery.broker import Broker, BrokerSettings
from transports.celery.encode import Outgoing
from unstract_core.errors import TransportClosed, TransportError, TransportUnavailable

_inherited: list[Broker] = []
"""Connections of a parent process: closing one here, or letting it be collected, would end the parent's."""


def leave_to_parent(broker: Broker) -> None:
    """Keep a connection from ever being closed here: it was opened before a fork."""
    _inherited.append(broker)


class Publishers:
    """At most `size` connections; a caller waits for a free one for as long as for a confirm."""

    def __init__(self, settings: BrokerSettings, size: int) -> None:
        self._settings = settings
        self._size = size
        self._closed = False
        self._begin()

    def publish(self, doing: str, messages: Sequence[Outgoing]) -> list[TransportError | None]:
        """Publish, and return what kept each message from being accepted (`Broker.publish`, together).

        Raises TransportUnavailable where no connection can be had: then nothing was sent.
        """
        with self.broker(doing) as broker:
            return broker.publish(doing, messages, together=True)

    @contextlib.contextmanager
    def broker(self, doing: str) -> Iterator[Broker]:
        """Lend a connection to the calling thread; a broken one is not taken back."""
        self._mind_fork()
        self.check_open(doing)
        slots = self._slots
        if not slots.acquire(timeout=self._settings.confirm_timeout):
            raise TransportUnavailable(f"{doing}: all {self._size} connections were in use", effect="nothing was done")
        try:
            broker = self._alive() or Broker(self._settings)
            try:
                yield broker
            finally:
                self._take_back(broker)
        finally:
            slots.release()

    def check_open(self, doing: str) -> None:
        if self._closed:
            raise TransportClosed(f"{doing}: the transport was closed")

    def close(self) -> None:
        self._closed = True
        self._mind_fork()
        while (broker := self._alive()) is not None:
            broker.close()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: list[Broker] = []
        self._slots = threading.BoundedSemaphore(self._size)

    def _mind_fork(self) -> None:
        if self._pid != os.getpid():
            _inherited.extend(self._idle)
            self._begin()

    def _alive(self) -> Broker | None:
        """Take an idle connection: one that the broker blocks before others, over which a send would get stuck."""
        for blocked in [broker for broker in self._idle if broker.blocked is not None]:
            with contextlib.suppress(ValueError):  # another thread has it
                self._idle.remove(blocked)
                self._idle.append(blocked)
        try:
            while (broker := self._idle.pop()).has_hung_up:
                broker.hang_up()
        except IndexError:
            return None
        return broker

    def _take_back(self, broker: Broker) -> None:
        if not broker.usable:
            broker.hang_up()
        elif self._closed:
            broker.close()
        else:
            self._idle.append(broker)
