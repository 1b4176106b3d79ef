"""The connections that the threads of a process share.

psycopg_pool is not used because it connects in the background, with a growing pause after failures. After a restart of
the server, a caller waited 3 s for the end of this pause; tests/postgres/test_healing.py allows half a second. This
pool detects an idle connection that the server has closed, without a round trip, and replaces it.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from functools import partial
from queue import Empty, SimpleQueue

from transports.postgres.connection import Connection, Parameters, Rows
from transports.postgres.connector import Connector
from transports.postgres.errors import PlanOutdated, ReadOnly, SessionTimedOut
from transports.postgres.execution import run
from transports.postgres.statement import Statement
from unstract_core.errors import TransportClosed, TransportUnavailable

_SHORTEST_PAUSE = 0.05
_SHORTEST_LIMIT = 0.1


class ConnectionPermit:
    """The right to use one connection of a pool.

    It returns to the pool when it is garbage-collected. A signal handler may raise an exception between any two lines,
    and no permit is lost then.
    """

    __slots__ = ("_permits",)

    def __init__(self, permits: SimpleQueue[ConnectionPermit]) -> None:
        self._permits = weakref.ref(permits)

    def __del__(self) -> None:
        if (permits := self._permits()) is not None:
            permits.put(ConnectionPermit(permits))


class Pool:
    """Runs statements on the connections that a process shares. Thread-safe.

    A caller that needs a connection makes it in its own thread. So it gets the server's message at once, and uses a
    restarted server at once. The first connection of the pool is tried once, so that a wrong address fails at start.
    Later connections are tried again until the timeout, because nothing has been sent yet.

    Args:
        connector: makes the connections.
        size: the number of connections at most.
        timeout: seconds that a caller waits for a connection.
        limit: seconds that a statement may take.
    """

    def __init__(self, connector: Connector, *, size: int, timeout: float, limit: float) -> None:
        self._connector = connector
        self._size = size
        self._timeout = timeout
        self._limit = limit
        self._closed = False
        self.has_worked = False
        self.reset()

    def reset(self) -> None:
        """Start again in a forked child: the connections are the parent's, and its locks may be held for ever."""
        self._idle: deque[Connection] = deque()
        self._permits: SimpleQueue[ConnectionPermit] = SimpleQueue()
        for _ in range(self._size):
            self._permits.put(ConnectionPermit(self._permits))

    def execute(
        self,
        operation: str,
        statement: Statement,
        parameters: Parameters,
        *,
        idempotent: bool = False,
        durable: bool = False,
        timeout: float | None = None,
    ) -> Rows:
        """Run and commit a statement on a connection of the pool, and return its rows.

        If the first connection was unusable and nothing took effect, the statement runs again on a new connection.

        Args:
            operation: the purpose of the statement, for an error's text.
            statement: the statement.
            parameters: its parameters.
            idempotent: whether it may run again when its fate is unknown. Default False.
            durable: whether the caller promises that the commit survives a failover. Default False.
            timeout: seconds for the whole call, with connecting. None: the pool's timeout and limit.

        Raises:
            TransportError: the statement failed.
            TransportClosed: the pool was closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        attempt = partial(self._execute, operation, statement, parameters, durable, deadline)
        try:
            return attempt()
        except PlanOutdated as exc:
            self._connector.stop_preparing(exc)
        except (ReadOnly, SessionTimedOut):
            pass
        except TransportUnavailable as exc:
            if not (idempotent and exc.fate_unknown):
                raise
        self._drop_idle()
        return attempt()

    def close(self) -> None:
        self._closed = True
        self._drop_idle()

    def _execute(
        self, operation: str, statement: Statement, parameters: Parameters, durable: bool, deadline: float | None
    ) -> Rows:
        now = time.monotonic()
        seconds = self._timeout if deadline is None else max(0.0, min(deadline - now, self._timeout))
        permit = self._take_permit(operation, seconds)
        try:
            connection = self._connection(operation, now + seconds)
            try:
                if deadline is None:
                    return run(connection, operation, statement, parameters, durable=durable)
                with connection.within_limit(max(_SHORTEST_LIMIT, deadline - time.monotonic())):
                    return run(connection, operation, statement, parameters, durable=durable)
            except ReadOnly:
                self._connector.retire_connections(connection)
                raise
            except TransportUnavailable as exc:
                if not connection.usable and getattr(exc.__cause__, "sqlstate", None) is None:
                    self._drop_idle()  # the same failure may have broken all of them
                raise
            finally:
                self._return(connection)
        finally:
            self._permits.put(permit)

    def _take_permit(self, operation: str, seconds: float) -> ConnectionPermit:
        if self._closed:
            raise TransportClosed(f"{operation}: the transport was closed")
        try:
            return self._permits.get(timeout=seconds)
        except Empty:
            raise TransportUnavailable(
                f"{operation}: all {self._size} connections were in use for {seconds:g} s", effect="nothing was done"
            ) from None

    def _return(self, connection: Connection) -> None:
        """Keep a connection for the next caller. The connection used last is the first to be used again."""
        if connection.usable:
            self._connector.retire_if_read_only(connection)
        if self._closed or not connection.usable or connection.large or self._connector.is_outdated(connection):
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:
                self._drop_idle()

    def _alive(self) -> Connection | None:
        try:
            while (connection := self._idle.pop()).has_unread_data or self._connector.is_outdated(connection):
                connection.close()
        except IndexError:
            return None
        return connection

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _connection(self, operation: str, deadline: float) -> Connection:
        """Return an idle connection or a new one. If the server allows no more connections, wait for either."""
        pause = _SHORTEST_PAUSE
        while True:
            if (idle := self._alive()) is not None:
                return idle
            if self._closed:
                raise TransportClosed(f"{operation}: the transport was closed")
            try:
                connection = self._connector.connect(timeout=max(0.0, deadline - time.monotonic()), limit=self._limit)
                self.has_worked = True
                return connection
            except TransportUnavailable:
                if (idle := self._idle_within(_SHORTEST_PAUSE)) is not None:
                    return idle
                if not self.has_worked or time.monotonic() + pause >= deadline:
                    raise
            if (idle := self._idle_within(pause)) is not None:
                return idle
            pause = min(0.5, pause * 2)

    def _idle_within(self, seconds: float) -> Connection | None:
        """Return an idle connection that is alive; wait up to `seconds` for one."""
        deadline = time.monotonic() + seconds
        while True:
            if (idle := self._alive()) is not None:
                return idle
            if (remaining := deadline - time.monotonic()) <= 0:
                return None
            # A Python lock would remain locked after an exception in a signal handler.
            time.sleep(min(0.01, remaining))
