"""Connections: how one is made, and the pool that a process shares.

Why not psycopg_pool: it connects in the background and backs off, so that after an outage a caller waits for its
schedule (3 s after a restart in tests/postgres/test_healing.py, where half a second is allowed). A connection that
the server has dropped while it lay idle is noticed without a round trip and replaced.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from transports.postgres.errors import mapped
from unstract_core.errors import ConfigurationError, TransportClosed, TransportUnavailable


class Connection(psycopg.Connection[TupleRow]):
    """A connection of ours. `kept` is a cursor for one statement that is run again and again.

    A new cursor works out anew how to adapt parameters and rows: 35 us of the 250 us of an insert.
    """

    @cached_property
    def kept(self) -> psycopg.Cursor[TupleRow]:
        return self.cursor()


# What libpq would leave to the operating system: minutes to hours until a silent network is noticed.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "40000",
    "application_name": "unstract-wire",
}


class Connector:
    """Makes connections with one conninfo. `prepare` allows server-side prepared statements."""

    def __init__(self, conninfo: str, *, prepare: bool) -> None:
        try:
            given = conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            raise ConfigurationError(
                "the PostgreSQL conninfo cannot be parsed; expected postgresql://user@host/database or key=value pairs"
            ) from None  # the driver's text quotes the conninfo, and so perhaps a password
        self.conninfo = make_conninfo(
            conninfo, **{name: value for name, value in _DEFAULTS.items() if name not in given}
        )
        self.options: dict[str, Any] = {"autocommit": True, "prepare_threshold": 5 if prepare else None}

    def connect(self) -> Connection:
        """Return a new connection. Raises TransportUnavailable with what the server or the network said."""
        try:
            return Connection.connect(self.conninfo, **self.options)
        except psycopg.OperationalError as exc:
            said = " ".join(str(exc).split())
            raise TransportUnavailable(f"cannot connect to PostgreSQL: {said}; nothing was sent") from exc


class Pool:
    """The connections that this process shares, `size` at most; a caller waits up to `timeout` seconds for one.

    A connection is made by the caller that needs it, in its own thread: it hears at once what the server said, and a
    server that is back is used at once. The first connection of all is tried once, so that a wrong address fails
    at start; later ones are tried anew until the time is up, because nothing has been sent yet.
    """

    def __init__(self, connector: Connector, *, size: int, timeout: float) -> None:
        self._connector = connector
        self._size = size
        self._timeout = timeout
        self._closed = False
        self._worked = False
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a forked child: the connections are the parent's, and its locks may be held for ever."""
        self._idle: deque[Connection] = deque()
        self._slots = threading.BoundedSemaphore(self._size)

    @contextlib.contextmanager
    def connection(self, doing: str) -> Iterator[Connection]:
        """Lend a connection, in autocommit. Every driver error inside the block is raised as ours."""
        connection = self.take(doing)
        try:
            with mapped(doing):
                yield connection
        except TransportUnavailable:
            connection.close()
            raise
        finally:
            self.give_back(connection)

    def take(self, doing: str) -> Connection:
        """Lend a connection until `give_back`; the one that was used last, if it is still alive."""
        deadline = time.monotonic() + self._timeout
        if self._closed:
            raise TransportClosed(f"{doing}: the transport was closed")
        if not self._slots.acquire(timeout=self._timeout):
            raise TransportUnavailable(
                f"{doing}: all {self._size} connections were in use for {self._timeout:g} s; nothing was sent"
            )
        try:
            return self._alive() or self._connect(deadline)
        except BaseException:
            self._slots.release()
            raise

    def give_back(self, connection: Connection) -> None:
        if self._closed or connection.pgconn.transaction_status != TransactionStatus.IDLE:
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:
                self.close()
        self._slots.release()

    def close(self) -> None:
        self._closed = True
        for connection in self._taken_out():
            connection.close()

    def _alive(self) -> Connection | None:
        for connection in self._taken_out():
            if not _has_hung_up(connection):
                return connection
            connection.close()
        return None

    def _taken_out(self) -> Iterator[Connection]:
        with contextlib.suppress(IndexError):
            while True:
                yield self._idle.pop()

    def _connect(self, deadline: float) -> Connection:
        pause = 0.05
        while True:
            try:
                connection = self._connector.connect()
                self._worked = True
                return connection
            except TransportUnavailable:
                if not self._worked or time.monotonic() + pause >= deadline or self._closed:
                    raise
                time.sleep(pause)
                pause = min(0.5, pause * 2)


def _has_hung_up(connection: Connection) -> bool:
    """Tell, without a round trip, whether an idle connection has something to say: a server only speaks up to leave."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
