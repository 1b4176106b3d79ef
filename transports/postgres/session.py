"""A connection of one's own that can be waited on: for a subscription, and for the callers that wait for replies.

It is made when it is needed, made again after it broke, and listens on its channel from the first moment. `wait`
returns early for a notification, for `wake`, and for a connection that broke; polling is the truth, and whoever waits
looks again afterwards.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from typing import Any

import psycopg
from psycopg import sql

from transports.postgres.connections import Connection, Connector
from transports.postgres.errors import mapped
from unstract_core.errors import TransportUnavailable


class Session:
    """Owned by one thread; only `wake` may be called from another, or from a signal handler."""

    def __init__(self, connector: Connector, channel: str | None) -> None:
        self._connector = connector
        self._channel = channel
        self._connection: Connection | None = None
        self._selector = selectors.DefaultSelector()
        self._bell, self._clapper = socket.socketpair()
        self._bell.setblocking(False)
        self._clapper.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._heard: list[str] = []

    def execute(self, doing: str, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Run one statement in a commit of its own and return its rows; a broken connection is replaced before."""
        connection = self._connected()
        try:
            with mapped(doing):
                cursor = connection.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []
        except TransportUnavailable:
            self._drop()
            raise

    def wait(self, seconds: float) -> bool:
        """Wait until something was heard or the time is up (False), or until `wake` is or was called (True)."""
        deadline = time.monotonic() + seconds
        while True:
            if self._rung():
                return True
            remaining = deadline - time.monotonic()
            if self._heard or remaining <= 0:
                return False
            ready = self._selector.select(remaining)
            if any(key.fileobj is not self._bell for key, _ in ready):
                self._listen()
                if self._connection is None:
                    return self._rung()

    def heard(self) -> list[str]:
        """Return the payloads of the notifications since the last call."""
        heard, self._heard = self._heard, []
        return heard

    def wake(self) -> None:
        # Full, so the owner wakes anyway; or closed, and there is no owner.
        with contextlib.suppress(OSError):
            self._clapper.send(b"!")

    def close(self) -> None:
        self._drop()
        self._selector.close()
        self._bell.close()
        self._clapper.close()

    def _connected(self) -> Connection:
        if self._connection is not None:
            return self._connection
        connection = self._connector.connect()
        connection.add_notify_handler(lambda notification: self._heard.append(notification.payload))
        if self._channel is not None:
            with mapped("listen for notifications"):
                connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
        self._selector.register(connection.fileno(), selectors.EVENT_READ)
        self._connection = connection
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._bell:
                self._selector.unregister(key.fileobj)
        connection.close()

    def _listen(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.pgconn.consume_input()
            while (notification := connection.pgconn.notifies()) is not None:
                self._heard.append(notification.extra.decode())
        except psycopg.Error:
            self._drop()

    def _rung(self) -> bool:
        try:
            return bool(self._bell.recv(4096))
        except BlockingIOError:
            return False
