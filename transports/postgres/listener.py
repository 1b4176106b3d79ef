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
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql

from transports.postgres.connections import Connection, Connector, run
from transports.postgres.errors import PlanOutdated, ReadOnly, SessionTimedOut, mapped


class Listener:
    """Owned by one thread; only `wake` may be called from another, or from a signal handler.

    It listens on `channel`, if there is one, and heeds the notifications with these payloads alone. A statement may
    take `limit` seconds.
    """

    def __init__(self, connector: Connector, channel: str | None, payloads: Iterable[str], *, limit: float) -> None:
        self._connector = connector
        self._limit = limit
        self._channel = channel
        self._payloads = frozenset(payloads)
        self._connection: Connection | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._notified = False

    @property
    def prepares(self) -> bool:
        """Whether the connection prepares statements, so that a plan is made once; False while there is none."""
        return self._connection is not None and self._connection.prepare_threshold is not None

    def execute(self, operation: str, statement: bytes, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Run one statement in a commit of its own and return its rows; a broken connection is replaced before.

        A statement that took no effect, because its connection was of no use, is run once more on a new one.
        """
        try:
            return self._execute(operation, statement, parameters)
        except PlanOutdated as exc:
            self._connector.stop_preparing(exc)
        except (ReadOnly, SessionTimedOut):
            pass
        return self._execute(operation, statement, parameters)

    def wait(self, seconds: float) -> bool:
        """Wait until something was heard or the time is up (False), or until `wake` is or was called (True)."""
        deadline = time.monotonic() + seconds
        while True:
            if self._was_woken():
                return True
            remaining = deadline - time.monotonic()
            if self._notified or remaining <= 0:
                return False
            ready = self._selector.select(remaining)
            if any(key.fileobj is not self._wake_r for key, _ in ready):
                self._read_notifications()
                if self._connection is None:
                    return self._was_woken()

    def forget_notifications(self) -> None:
        """Wait for what comes from now on; what was heard so far is about to be looked at."""
        self._notified = False

    def wake(self) -> None:
        # Full, so the owner wakes anyway; or closed, and there is no owner.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"!")

    def close(self) -> None:
        self._drop()
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def _execute(self, operation: str, statement: bytes, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        connection = self._connected()
        try:
            return run(connection, operation, statement, parameters)
        except ReadOnly:
            self._connector.retire_connections(connection)
            raise
        finally:
            if not connection.usable:
                self._drop()

    def _connected(self) -> Connection:
        if self._connection is not None:
            self._connector.retire_if_read_only(self._connection)
            if not self._connector.is_outdated(self._connection):
                return self._connection
            self._drop()
        connection = self._connector.connect(timeout=self._limit, limit=self._limit)
        connection.add_notify_handler(lambda notification: self._note_notification(notification.payload))
        try:
            with mapped("set up a connection"):
                self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        self._selector.register(connection.fileno(), selectors.EVENT_READ)
        self._connection = connection
        return connection

    def _set_up(self, connection: Connection) -> None:
        if self._channel is not None and not connection.pooled:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
        use_indexes(connection)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._wake_r:
                self._selector.unregister(key.fileobj)
        connection.close()

    def _read_notifications(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.pgconn.consume_input()
            while (notification := connection.pgconn.notifies()) is not None:
                self._note_notification(notification.extra.decode())
        except psycopg.Error:
            self._drop()

    def _note_notification(self, payload: str) -> None:
        self._notified = self._notified or payload in self._payloads

    def _was_woken(self) -> bool:
        try:
            return bool(self._wake_r.recv(4096))
        except BlockingIOError:
            return False


def use_indexes(connection: Connection) -> None:
    """Let a connection that prepares statements reach rows by an index in its order, and in no other way.

    The plan that it keeps may have been made while the table was empty, or while its statistics said so because all
    in it was dead: then every way looks as cheap, and it may be kept to read, and sort, all of a table or an index.
    """
    if connection.prepare_threshold is not None:
        connection.execute(b"SET enable_seqscan = off; SET enable_bitmapscan = off", prepare=False)
