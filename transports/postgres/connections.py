"""Connections: how one is made, what it allows, and how a statement is run on it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from transports.postgres.errors import PlanOutdated, PreparedStatementLost, ReadOnly, translate
from unstract_core.errors import ConfigurationError, TransportUnavailable
from unstract_core.events import emit

logger = logging.getLogger(__name__)

# What libpq would leave to the operating system: minutes to hours until a silent network is noticed.
_DEFAULTS = {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "40000",
}
_CONNECT_TIMEOUT = 10
_SHORTEST_CONNECT_TIMEOUT = 2  # libpq's own
_PREPARE_AFTER = 5
_REMEDIES = {
    "unsupported startup parameter": "leave it out of the conninfo and of libpq's environment (PGOPTIONS), or let "
    "ignore_startup_parameters of pgbouncer.ini name it, and it has no effect",
    "max_client_conn": "raise it in pgbouncer.ini, or use fewer connections (pool_size, workers)",
}
"""What to do where a pooler has said this."""
CANCEL_TIMEOUT = 2.0
"""Seconds until a cancel, and then its answer, has to be there."""

Result = TypeVar("Result")

Parameters: TypeAlias = "dict[str, Any] | tuple[Any, ...]"
Rows: TypeAlias = "list[tuple[Any, ...]]"
How: TypeAlias = "Callable[[Connection, bytes, Any], Rows]"


class Connection(psycopg.Connection[TupleRow]):
    """A connection of ours.

    `pooled` tells that a pooler stands between us and the server, so that nothing may be prepared or listened to. A
    statement that takes longer than `limit` seconds is cancelled, and the connection given up where even that is not
    answered; `spoiled` tells that it must not be used for another one, which a late cancel could hit. `has_prepared`
    belongs to straight.py.
    """

    pooled: bool = False
    limit: float | None = None
    has_prepared: bool = False
    spoiled: bool = False

    def wait(self, gen: PQGen[Result], *args: Any, **kwargs: Any) -> Result:
        """Wait for the server as psycopg does, within the limit."""
        return super().wait(gen if self.limit is None else self._limited(gen, self.limit), *args, **kwargs)

    def _limited(self, gen: PQGen[Result], limit: float) -> PQGen[Result]:
        deadline = time.monotonic() + limit
        cancelled = False
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= deadline:
                    if cancelled:
                        raise psycopg.OperationalError(f"no answer within {limit:g} s")
                    cancelled = True
                    self.give_up()
                    deadline = time.monotonic() + CANCEL_TIMEOUT
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Result = end.value
            return result

    def give_up(self) -> None:
        """Cancel the statement that runs, on another connection; its end is still to be waited for."""
        self.spoiled = True
        with contextlib.suppress(psycopg.Error):
            self.cancel_safe(timeout=CANCEL_TIMEOUT)

    @property
    def usable(self) -> bool:
        """Whether the next statement can be run: not where the connection broke, or a statement did not end."""
        return not self.spoiled and self.pgconn.transaction_status == TransactionStatus.IDLE

    @property
    def has_hung_up(self) -> bool:
        """Whether an idle connection has something to say, told without a round trip: a server speaks up to leave."""
        return self.poll(select.POLLIN, 0.0)

    def poll(self, events: int, seconds: float | None) -> bool:
        """Wait until the socket is ready for one of these events of select.poll; False when the time is up."""
        self._poll.modify(self.fileno(), events)
        return bool(self._poll.poll(None if seconds is None else seconds * 1000))

    @cached_property
    def _poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self.fileno())
        return poll


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
        if "@" in str(given.get("host") or ""):
            raise ConfigurationError("the PostgreSQL conninfo has '@' in its host; write it as %40 in the password")
        by_service = "service" in given or "PGSERVICE" in os.environ
        defaults = {name: value for name, value in _DEFAULTS.items() if name not in given and not by_service}
        named = {} if "fallback_application_name" in given else {"fallback_application_name": "unstract-wire"}
        self.conninfo = make_conninfo(conninfo, **defaults, **named, client_encoding="UTF8")
        self._connect_timeout = None if by_service else _seconds(given.get("connect_timeout"))
        self._prepare = self._probe = prepare
        self._told_pooled = False

    def connect(self, *, patience: float | None = None, limit: float | None = None) -> Connection:
        """Return a new connection, in autocommit, within `patience` seconds where they are less than usual.

        `limit` is how long (seconds) its statements may take.

        Raises TransportUnavailable with what the server or the network said, ConfigurationError for a conninfo that can
        never work.
        """
        timeout = self._connect_timeout
        if timeout is not None and patience is not None and patience < timeout:
            timeout = max(_SHORTEST_CONNECT_TIMEOUT, int(patience))
        conninfo = self.conninfo if timeout is None else make_conninfo(self.conninfo, connect_timeout=timeout)
        try:
            connection = Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
            if self._probe:
                self._look_for_a_pooler(connection, patience, limit)
            connection.limit = limit
            return connection
        except psycopg.OperationalError as exc:
            said = " ".join(str(exc).split())
            remedies = "".join(f". {remedy}" for words, remedy in _REMEDIES.items() if words in said)
            raise TransportUnavailable(f"cannot connect to PostgreSQL: {said}; nothing was done{remedies}") from exc
        except (psycopg.Error, ValueError) as exc:
            said = " ".join(str(exc).split())
            raise ConfigurationError(f"the PostgreSQL conninfo cannot be used: {said}") from exc

    def _look_for_a_pooler(self, connection: Connection, patience: float | None, limit: float | None) -> None:
        """Prepare only where the server itself answers: a pooler gives its clients process ids of its own making.

        A pooler takes connections long before it has one to the server: the answer is waited for as a connection is.
        """
        limits = [seconds for seconds in (patience, limit) if seconds is not None]
        connection.limit = max(_SHORTEST_CONNECT_TIMEOUT, min(limits)) if limits else None
        try:
            row = connection.execute("SELECT pg_backend_pid()").fetchone()
        except BaseException:
            connection.close()
            raise
        if row == (connection.info.backend_pid,):
            connection.prepare_threshold = _PREPARE_AFTER if self._prepare else None
            return
        connection.pooled = True
        if not self._told_pooled:
            self._told_pooled = True
            emit(logger, logging.WARNING, "pooler_found")

    def heed(self, failure: PlanOutdated) -> None:
        """Make connections that prepare nothing from now on, if something before the server does not bear it."""
        if isinstance(failure, PreparedStatementLost) and self._prepare:
            self._prepare = False
            emit(logger, logging.WARNING, "prepared_statements_lost")

    def has_outgrown(self, connection: Connection) -> bool:
        """Whether a connection still prepares statements, and new ones would not."""
        return not self._prepare and connection.prepare_threshold is not None


def by_cursor(connection: Connection, statement: bytes, parameters: Parameters) -> Rows:
    """Run a statement as psycopg's users do."""
    return connection.execute(statement, parameters).fetchall()


def run(connection: Connection, doing: str, statement: bytes, parameters: Parameters, how: How = by_cursor) -> Rows:
    """Run a statement in a commit of its own and return its rows. Every driver error is raised as ours."""
    try:
        return how(connection, statement, parameters)
    except Exception as exc:
        if (ours := translate(exc, doing)) is None:
            raise
        if isinstance(ours, PlanOutdated | ReadOnly):
            connection.close()
        raise ours from exc


def _seconds(given: object) -> int:
    """Return the connect timeout that was asked for in the conninfo or libpq's environment, else ours."""
    asked = os.environ.get("PGCONNECT_TIMEOUT") if given is None else given
    if asked is None:
        return _CONNECT_TIMEOUT
    try:
        return int(str(asked))
    except ValueError:
        raise ConfigurationError(f"connect_timeout must be a whole number of seconds, not {asked!r}") from None
