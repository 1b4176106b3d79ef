"""Connections: how one is made, and the pool that a process shares.

Why not psycopg_pool: it connects in the background and backs off, so that after an outage a caller waits for its
schedule (3 s after a restart in tests/postgres/test_healing.py, where half a second is allowed). A connection that
the server has dropped while it lay idle is noticed without a round trip and replaced.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Callable
from functools import cached_property
from queue import Empty, SimpleQueue
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

    @property
    def has_hung_up(self) -> bool:
        """Whether an idle connection has something to say, told without a round trip: a server speaks up to leave."""
        return bool(self._poll(0))

    @cached_property
    def _poll(self) -> Callable[[int], list[tuple[int, int]]]:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return poll.poll

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
    connection: Connection, doing: str, statement: bytes, parameters: Parameters, *, kept: bool = False
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
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(self._size):
            self._slots.put(None)

    def execute(
        self,
        doing: str,
        statement: bytes,
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
        self, doing: str, statement: bytes, parameters: Parameters, kept: bool, patience: float | None
    ) -> list[tuple[Any, ...]]:
        connection = self._take(doing, self._timeout if patience is None else patience)
        usable = False
        try:
            rows = run(connection, doing, statement, parameters, kept=kept)
            usable = True
            return rows
        finally:
            self._give_back(connection, usable=usable or connection.usable)

    def _take(self, doing: str, patience: float) -> Connection:
        """Lend a connection until `_give_back`; the one that was used last, if it is still alive."""
        if self._closed:
            raise TransportClosed(f"{doing}: the transport was closed")
        deadline = time.monotonic() + patience
        try:
            self._slots.get(timeout=patience)
        except Empty:
            raise TransportUnavailable(
                f"{doing}: all {self._size} connections were in use for {patience:g} s; nothing was done"
            ) from None
        try:
            return self._alive() or self._connect(deadline)
        except BaseException:
            self._slots.put(None)
            raise

    def _give_back(self, connection: Connection, *, usable: bool) -> None:
        if self._closed or not usable or self._connector.has_outgrown(connection):
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:
                self._drop_idle()
        self._slots.put(None)

    def _alive(self) -> Connection | None:
        try:
            while (connection := self._idle.pop()).has_hung_up:
                connection.close()
        except IndexError:
            return None
        return connection

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

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
