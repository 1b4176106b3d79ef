"""The connections that a process shares.

Why not psycopg_pool: it connects in the background and backs off, so that after an outage a caller waits for its
schedule (3 s after a restart in tests/postgres/test_healing.py, where half a second is allowed). A connection that
the server has dropped while it lay idle is noticed without a round trip and replaced.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from functools import partial
from queue import Empty, SimpleQueue

from transports.postgres.connections import Connection, Connector, How, Parameters, Rows, by_cursor, run
from transports.postgres.errors import PlanOutdated, ReadOnly, SessionTimedOut
from unstract_core.errors import TransportClosed, TransportUnavailable

_SHORTEST_PAUSE = 0.05
_SHORTEST_LIMIT = 0.1


class ConnectionPermit:
    """Room for one connection of a pool.

    It returns to the pool when nobody holds it any more, so that none is lost to an exception between two lines (a
    signal handler may raise anywhere).
    """

    __slots__ = ("_permits",)

    def __init__(self, permits: SimpleQueue[ConnectionPermit]) -> None:
        self._permits = weakref.ref(permits)

    def __del__(self) -> None:
        if (permits := self._permits()) is not None:
            permits.put(ConnectionPermit(permits))


class Pool:
    """The connections that this process shares, `size` at most; a caller waits up to `timeout` seconds for one, and
    `limit` seconds for an answer.

    A connection is made by the caller that needs it, in its own thread: it hears at once what the server said, and a
    server that is back is used at once. The first connection of all is tried once, so that a wrong address fails
    at start; later ones are tried anew until the time is up, because nothing has been sent yet.
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
        """Begin anew, in a forked child: the connections are the parent's, and its locks may be held for ever."""
        self._idle: deque[Connection] = deque()
        self._permits: SimpleQueue[ConnectionPermit] = SimpleQueue()
        for _ in range(self._size):
            self._permits.put(ConnectionPermit(self._permits))

    def execute(
        self,
        operation: str,
        statement: bytes,
        parameters: Parameters,
        *,
        how: How = by_cursor,
        idempotent: bool = False,
        durable: bool = False,
        timeout: float | None = None,
    ) -> Rows:
        """Run a statement on a connection of the pool, in a commit of its own, and return its rows.

        It is run once more, on a new connection, where the first one was of no use and nothing took effect.

        Args:
            doing: the purpose of the statement, for an error's text.
            statement: the statement.
            parameters: its parameters.
            how: runs the statement on the connection.
            harmless: whether it may be run again where its fate is unknown.
            durable: whether the caller promises that the commit outlasts a failover.
            patience: seconds for everything, connecting and the answer included; None for the pool's timeout and limit.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        attempt = partial(self._execute, operation, statement, parameters, how, durable, deadline)
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
        self,
        operation: str,
        statement: bytes,
        parameters: Parameters,
        how: How,
        durable: bool,
        deadline: float | None,
    ) -> Rows:
        now = time.monotonic()
        seconds = self._timeout if deadline is None else max(0.0, min(deadline - now, self._timeout))
        permit = self._take_permit(operation, seconds)
        try:
            connection = self._connection(operation, now + seconds)
            try:
                if deadline is None:
                    return run(connection, operation, statement, parameters, how, durable=durable)
                with connection.within_limit(max(_SHORTEST_LIMIT, deadline - time.monotonic())):
                    return run(connection, operation, statement, parameters, how, durable=durable)
            except ReadOnly:
                self._connector.retire_connections(connection)
                raise
            except TransportUnavailable as exc:
                if not connection.usable and getattr(exc.__cause__, "sqlstate", None) is None:
                    self._drop_idle()  # what broke or silenced this connection may have done so to all of them
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
                f"{operation}: all {self._size} connections were in use for {seconds:g} s; nothing was done"
            ) from None

    def _return(self, connection: Connection) -> None:
        """Keep a connection for the next caller, the one that was used last first."""
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
        """Return an idle connection, or a new one: whichever is there first, where the server has no room for more."""
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
        """Return an idle connection that lives, for which it waits up to `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            if (idle := self._alive()) is not None:
                return idle
            if (remaining := deadline - time.monotonic()) <= 0:
                return None
            time.sleep(
                min(0.01, remaining)
            )  # no lock of Python's that an exception in a signal handler would leave held
