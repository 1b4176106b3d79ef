"""`Listener`: a connection with one owner, which runs statements and waits for notifications.

Each subscription has one, and all callers that wait for replies share one. The connection is made at first use, and
again after it broke. `wait` returns early for a notification, for `wake`, and if the connection breaks. A notification
only shortens the wait: the owner polls after each wait, and polling finds everything.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Iterable

import psycopg
from psycopg import sql

from transports.postgres.connection import Connection, Parameters, Rows
from transports.postgres.connector import Connector
from transports.postgres.error_mapping import mapped
from transports.postgres.errors import PlanOutdated, ReadOnly, SessionTimedOut
from transports.postgres.execution import run
from transports.postgres.statement import Statement


class Listener:
    """A connection owned by one thread. Only `wake` may be called from another thread or a signal handler.

    Args:
        connector: makes the connection.
        channel: the channel to listen on; None to listen on none.
        payloads: the notifications that end a wait; others are ignored.
        limit: seconds that a statement may take.
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
        """Whether the connection prepares statements, so that a plan is made once; False without a connection."""
        return self._connection is not None and self._connection.prepare_threshold is not None

    @property
    def backend_pid(self) -> int | None:
        """The process id of the server's session; None without a connection."""
        return None if self._connection is None else self._connection.info.backend_pid

    def execute(self, operation: str, statement: Statement, parameters: Parameters) -> Rows:
        """Run and commit one statement, and return its rows.

        A broken connection is replaced first. If the connection was unusable and nothing took effect, the statement
        runs again on a new one.

        Args:
            operation: the purpose of the statement, for an error's text.
            statement: the statement.
            parameters: its parameters.

        Raises:
            TransportError: the statement failed.
        """
        try:
            return self._execute(operation, statement, parameters)
        except PlanOutdated as exc:
            self._connector.stop_preparing(exc)
        except (ReadOnly, SessionTimedOut):
            pass
        return self._execute(operation, statement, parameters)

    def wait(self, seconds: float) -> bool:
        """Wait for a notification, for at most `seconds`. Return whether `wake` was called."""
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
        """Ignore the notifications so far, because the owner is about to poll."""
        self._notified = False

    def wake(self) -> None:
        """End the owner's current or next `wait`."""
        # Either the buffer is full and wakes the owner anyway, or the listener is closed and has no owner.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"!")

    def connect(self) -> Connection:
        """Return the connection of the next statement; a broken or outdated one is replaced first."""
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

    def close(self) -> None:
        self._drop()
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def _execute(self, operation: str, statement: Statement, parameters: Parameters) -> Rows:
        connection = self.connect()
        try:
            return run(connection, operation, statement, parameters)
        except ReadOnly:
            self._connector.retire_connections(connection)
            raise
        finally:
            if not connection.usable:
                self._drop()

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
    """Make the plans of a connection that prepares statements use only indexes, in the order of the index.

    The server keeps a plan. It may have made the plan while the table was empty, or while the statistics said so
    because all rows were dead. At such a time all plans seem equally cheap, and the kept plan could read and sort a
    whole table.
    """
    if connection.prepare_threshold is not None:
        connection.execute(b"SET enable_seqscan = off; SET enable_bitmapscan = off", prepare=False)
