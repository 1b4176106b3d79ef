"""Connections: how one is made, and the pool that a process shares.

A pool belongs to one process. A worker forked after the first use gets a pool of its own; the parent's is left to the
parent. A connection that the server has dropped while it lay idle is noticed without a round trip and replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from transports.postgres.errors import mapped
from unstract_core.errors import ConfigurationError, TransportUnavailable

Connection: TypeAlias = "psycopg.Connection[TupleRow]"

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
        except psycopg.ProgrammingError as exc:
            raise ConfigurationError(
                "the PostgreSQL conninfo cannot be parsed; expected postgresql://user@host/database or key=value pairs"
            ) from exc
        self.conninfo = make_conninfo(
            conninfo, **{name: value for name, value in _DEFAULTS.items() if name not in given}
        )
        self.options: dict[str, Any] = {"autocommit": True, "prepare_threshold": 5 if prepare else None}

    def connect(self) -> Connection:
        """Return a new connection. Raises TransportUnavailable with what the server or the network said."""
        try:
            return psycopg.connect(self.conninfo, **self.options)
        except psycopg.OperationalError as exc:
            raise cannot_connect(exc) from exc


def cannot_connect(exc: psycopg.Error) -> TransportUnavailable:
    said = " ".join(str(exc).split())
    return TransportUnavailable(f"cannot connect to PostgreSQL: {said}; nothing was sent")


class Pool:
    """The connections that this process shares. `timeout` (seconds) is how long a caller waits for one."""

    def __init__(self, connector: Connector, *, size: int, timeout: float) -> None:
        self._connector = connector
        self._size = size
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pool: ConnectionPool[Connection] | None = None
        self._process = 0
        self._at_hand: deque[Connection] = deque()
        self._waiting = 0

    @contextlib.contextmanager
    def connection(self, doing: str) -> Iterator[Connection]:
        """Lend a connection, in autocommit. Every driver error inside the block is raised as ours."""
        with mapped(doing):
            connection = self.take()
            try:
                yield connection
            finally:
                self.give_back(connection)

    def take(self) -> Connection:
        """Lend a connection, in autocommit, until `give_back`; the one used last is kept at hand, past the locks."""
        pool = self._opened()
        try:
            connection = self._at_hand.pop()
        except IndexError:
            return self._lend(pool)
        if not _has_hung_up(connection):
            return connection
        connection.close()
        pool.putconn(connection)
        return self._lend(pool)

    def give_back(self, connection: Connection) -> None:
        idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
        pool = self._pool
        if idle and not self._waiting and not self._at_hand and pool is not None:
            self._at_hand.append(connection)
        elif pool is not None:
            pool.putconn(connection)
        else:
            connection.close()

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
            at_hand, self._at_hand = self._at_hand, deque()
        if pool is not None and self._process == os.getpid():
            for connection in at_hand:
                pool.putconn(connection)
            pool.close()

    def _opened(self) -> ConnectionPool[Connection]:
        pool = self._pool
        if pool is not None and self._process == os.getpid():
            return pool
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                self._connector.connect().close()  # so that a wrong address is told at once, in the server's words
                self._at_hand = deque()
                self._pool = self._make()
                self._process = os.getpid()
            return self._pool

    def _make(self) -> ConnectionPool[Connection]:
        return ConnectionPool(
            self._connector.conninfo,
            kwargs=self._connector.options,
            min_size=1,
            max_size=self._size,
            timeout=self._timeout,
            reconnect_timeout=1.0,
            check=_check,
            name="unstract-wire",
            open=True,
        )

    def _lend(self, pool: ConnectionPool[Connection]) -> Connection:
        """Ask again every second: a pool gives up reconnecting meanwhile, and a new request makes it try anew."""
        deadline = time.monotonic() + self._timeout
        with self._lock:
            self._waiting += 1
        try:
            while True:
                remaining = deadline - time.monotonic()
                try:
                    return pool.getconn(timeout=max(0.01, min(1.0, remaining)))
                except PoolTimeout:
                    if self._at_hand:
                        pool.putconn(self._at_hand.pop())
                    elif remaining <= 1.0:
                        raise
        finally:
            with self._lock:
                self._waiting -= 1


def _check(connection: Connection) -> None:
    if _has_hung_up(connection):
        raise psycopg.OperationalError("the server closed an idle connection")


def _has_hung_up(connection: Connection) -> bool:
    """Tell, without a round trip, whether an idle connection has something to say: a server only speaks up to leave."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
