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
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from transports.postgres.errors import PlanOutdated, PreparedStatementLost, translate
from unstract_core.errors import ConfigurationError, TransportClosed, TransportUnavailable


class Connection(psycopg.Connection[TupleRow]):
    """A connection of ours. `kept` is a cursor for one statement that is run again and again.

    A new cursor works out anew how to adapt parameters and rows: 35 us of the 250 us of an insert.
    """

    @property
    def usable(self) -> bool:
        """Whether the next statement can be run: not where the connection broke, or a statement did not end."""
        return self.pgconn.transaction_status == TransactionStatus.IDLE

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
_PREPARE_AFTER = 5

Parameters: TypeAlias = "dict[str, Any] | tuple[Any, ...]"


class Connector:
    """Makes connections with one conninfo. `prepare` allows server-side prepared statements.

    They speak UTF-8, whatever the environment says: another encoding could not carry what the wire allows.
    """

    def __init__(self, conninfo: str, *, prepare: bool) -> None:
        try:
            given = conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            raise ConfigurationError(
                "the PostgreSQL conninfo cannot be parsed; expected postgresql://user@host/database or key=value pairs"
            ) from None  # the driver's text quotes the conninfo, and so perhaps a password
        defaults = {name: value for name, value in _DEFAULTS.items() if name not in given}
        self.conninfo = make_conninfo(conninfo, **defaults, client_encoding="UTF8")
        self._prepare = prepare

    def connect(self) -> Connection:
        """Return a new connection, in autocommit. Raises TransportUnavailable with what the server or the network said,
        ConfigurationError for a conninfo that can never work."""
        threshold = _PREPARE_AFTER if self._prepare else None
        try:
            return Connection.connect(self.conninfo, autocommit=True, prepare_threshold=threshold)
        except psycopg.OperationalError as exc:
            said = " ".join(str(exc).split())
            raise TransportUnavailable(f"cannot connect to PostgreSQL: {said}; nothing was done") from exc
        except (psycopg.Error, ValueError) as exc:
            said = " ".join(str(exc).split())
            raise ConfigurationError(f"the PostgreSQL conninfo cannot be used: {said}") from exc

    def stop_preparing(self) -> None:
        """Make connections from now on that prepare nothing: something between us and the server does not bear it."""
        self._prepare = False

    def has_outgrown(self, connection: Connection) -> bool:
        """Whether a connection still prepares statements, and new ones would not."""
        return not self._prepare and connection.prepare_threshold is not None


def run(
    connection: Connection, doing: str, statement: str, parameters: Parameters, *, kept: bool = False
) -> list[tuple[Any, ...]]:
    """Run a statement in a commit of its own and return its rows. Every driver error is raised as ours."""
    try:
        cursor = connection.kept if kept else connection.cursor()
        return cursor.execute(statement, parameters).fetchall()
    except Exception as exc:
        if (ours := translate(exc, doing)) is None:
            raise
        if isinstance(ours, PreparedStatementLost | PlanOutdated):
            connection.close()
        raise ours from exc


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
        self.has_worked = False
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a forked child: the connections are the parent's, and its locks may be held for ever."""
        self._idle: deque[Connection] = deque()
        self._slots = threading.BoundedSemaphore(self._size)

    def execute(
        self,
        doing: str,
        statement: str,
        parameters: Parameters,
        *,
        kept: bool = False,
        harmless: bool = False,
        patience: float | None = None,
    ) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of the pool, in a commit of its own, and return its rows.

        `kept` keeps the cursor, for a statement that is run most often; `harmless` says that the statement may be run
        again where its fate is unknown; `patience` (seconds) replaces the pool's timeout.
        """
        try:
            return self._execute(doing, statement, parameters, kept, patience)
        except PreparedStatementLost:
            self._connector.stop_preparing()
        except PlanOutdated:
            pass
        except TransportUnavailable as exc:
            if not (harmless and exc.fate_unknown):
                raise
        self._drop_idle()
        return self._execute(doing, statement, parameters, kept, patience)

    def close(self) -> None:
        self._closed = True
        self._drop_idle()

    def _execute(
        self, doing: str, statement: str, parameters: Parameters, kept: bool, patience: float | None
    ) -> list[tuple[Any, ...]]:
        connection = self._take(doing, self._timeout if patience is None else patience)
        try:
            return run(connection, doing, statement, parameters, kept=kept)
        finally:
            self._give_back(connection)

    def _take(self, doing: str, patience: float) -> Connection:
        """Lend a connection until `_give_back`; the one that was used last, if it is still alive."""
        deadline = time.monotonic() + patience
        if self._closed:
            raise TransportClosed(f"{doing}: the transport was closed")
        if not self._slots.acquire(timeout=patience):
            raise TransportUnavailable(
                f"{doing}: all {self._size} connections were in use for {patience:g} s; nothing was done"
            )
        try:
            return self._alive() or self._connect(deadline)
        except BaseException:
            self._slots.release()
            raise

    def _give_back(self, connection: Connection) -> None:
        if self._closed or not connection.usable or self._connector.has_outgrown(connection):
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:
                self._drop_idle()
        self._slots.release()

    def _drop_idle(self) -> None:
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
                self.has_worked = True
                return connection
            except TransportUnavailable:
                if not self.has_worked or time.monotonic() + pause >= deadline or self._closed:
                    raise
                time.sleep(pause)
                pause = min(0.5, pause * 2)


def _has_hung_up(connection: Connection) -> bool:
    """Tell, without a round trip, whether an idle connection has something to say: a server only speaks up to leave."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
