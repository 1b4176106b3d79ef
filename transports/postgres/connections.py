"""Connections: how one is made, what it allows, and how a statement is run on it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.postgres import register_default_adapters, register_default_types
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg.types import TypesRegistry
from psycopg.types.json import set_json_loads

from transports.postgres.errors import DuplicateId, PlanOutdated, PreparedStatementLost, ReadOnly, mapped, translate
from unstract_core.errors import ConfigurationError, TransportRefused, TransportUnavailable
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.postgres")

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
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default_transaction_isolation": ("read committed", "read uncommitted"),
    "synchronous_commit": ("on", "local", "remote_write", "remote_apply"),
    "client_min_messages": ("notice", "warning", "info", "log"),
    "array_nulls": ("on",),
    "DateStyle": ("ISO, MDY", "ISO, DMY", "ISO, YMD"),
    "IntervalStyle": ("postgres",),
    "extra_float_digits": ("1", "2", "3"),
    "standard_conforming_strings": ("on",),
    "quote_all_identifiers": ("off",),
    "transform_null_equals": ("off",),
    "exit_on_error": ("off",),
    "debug_parallel_query": ("off",),
    "force_parallel_mode": ("off",),
    "plan_cache_mode": ("auto",),
    "enable_indexscan": ("on",),
    "enable_nestloop": ("on",),
    "jit": ("off",),
}
"""Settings that a role or database may carry and on which statements depend: the values that do, the first one is set.

A plan that counts much is so dear that the server would compile it, for longer than it runs. Where that is all that a
pooler's sessions lack, it is switched off for these statements alone (`uncompiled`), because settings cost each
statement round trips there.

Settings by which an administrator limits or closes access stay as they are: read-only transactions, timeouts, row
security. `search_path` does, too: the triggers of a table may depend on it. Tables in statements of ours are qualified;
their functions are those of pg_catalog unless an administrator puts another schema before it.
"""
_PROBE = "SELECT pg_backend_pid(), {}".format(", ".join(f"current_setting('{name}', true)" for name in _SETTINGS))
LARGEST_STATEMENT = 1_000_000_000
"""Bytes of parameters. The server closes the connection on a message of 1 GiB, and does not say why."""
_LARGE = 4_000_000
"""Bytes in one statement or its rows, above which a connection is not kept: libpq never gives a buffer back."""
_SKIPPED_IDS = (0, 1, 8, 64, 512, 4096, 32768, 262144)
"""Ids that are skipped before a statement is tried again because an id existed."""
CANCEL_TIMEOUT = 2.0
"""Seconds until a cancel, and then its answer, has to be there."""

Result = TypeVar("Result")

_SET = b"""
    SELECT set_config(s.name, s.value, %(local)s) FROM unnest(%(names)b::text[], %(values)b::text[]) AS s (name, value)
"""

_SKIP = b"""
    SELECT count(nextval(pg_get_serial_sequence(%(table)s, %(column)s))) FROM generate_series(1, %(number)s)
"""

Parameters: TypeAlias = "dict[str, Any] | tuple[Any, ...]"
Rows: TypeAlias = "list[tuple[Any, ...]]"
How: TypeAlias = "Callable[[Connection, bytes, Any], Rows]"


class Connection(psycopg.Connection[TupleRow]):
    """A connection of ours.

    `pooled` tells that a pooler stands between us and the server, so that nothing may be prepared or listened to. A
    statement that takes longer than `limit` seconds is cancelled, and the connection given up where even that is not
    answered; `spoiled` tells that it must not be used for another one, which a late cancel could hit. `has_prepared`
    belongs to libpq_exec.py.

    Attributes:
        generation: the connector's generation when the connection was made.
        lacks: settings, and the values that statements need, which a pooler does not keep for a session: each
            transaction sets them. Empty on a direct connection.
        compiles: whether a pooler's sessions compile dear plans, and no transaction switches that off.
        large: whether libpq has grown a buffer for a large statement or row, which it never gives back.
    """

    pooled: bool = False
    limit: float | None = None
    has_prepared: bool = False
    spoiled: bool = False
    generation: int = 0
    missing_settings: Mapping[str, str] = {}
    jit_enabled: bool = False
    large: bool = False
    _was_read_only: bool = False

    @property
    def adapters(self) -> AdaptersMap:
        """The adapters of psycopg itself: those that an application registers for all connections are not ours."""
        if self._adapters is None:
            self._adapters = AdaptersMap(own_adapters())
        return self._adapters

    @cached_property
    def commits(self) -> Commits:
        """What the server says about its commits."""
        commits = Commits()
        self.add_notice_handler(commits.hear)
        return commits

    @property
    def is_read_only(self) -> bool:
        """Whether the server has said that it takes no writes: PostgreSQL 14 and newer say so without being asked."""
        status = self.pgconn.parameter_status
        return status(b"default_transaction_read_only") == b"on" or status(b"in_hot_standby") == b"on"

    @property
    def became_read_only(self) -> bool:
        """Whether the server has stopped taking writes since the connection was made, as an old primary does."""
        return not self._was_read_only and self.is_read_only

    def note_created(self, generation: int) -> None:
        """Note what is true of a new connection."""
        self.generation = generation
        self._was_read_only = self.is_read_only

    @contextlib.contextmanager
    def within_limit(self, seconds: float) -> Iterator[None]:
        """Give the statements in the block `seconds` at most, and never more than `limit`."""
        usual = self.limit
        self.limit = seconds if usual is None else min(usual, seconds)
        try:
            yield
        finally:
            self.limit = usual

    @contextlib.contextmanager
    def with_settings(self) -> Iterator[None]:
        """Run the block in a transaction that has the settings which the connection lacks."""
        begun = self.pgconn.transaction_status == TransactionStatus.INTRANS
        with contextlib.nullcontext() if begun else self.transaction():
            self.execute(
                _SET,
                {"names": list(self.missing_settings), "values": list(self.missing_settings.values()), "local": True},
            )
            yield

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
                    self.cancel_running()
                    deadline = time.monotonic() + CANCEL_TIMEOUT
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Result = end.value
            return result

    def cancel_running(self) -> None:
        """Cancel the statement that runs, on another connection; its end is still to be waited for."""
        self.spoiled = True
        with contextlib.suppress(psycopg.Error):
            self.cancel_safe(timeout=CANCEL_TIMEOUT)

    @property
    def usable(self) -> bool:
        """Whether the next statement can be run: not where the connection broke, or a statement did not end."""
        return not self.spoiled and self.pgconn.transaction_status == TransactionStatus.IDLE

    @property
    def has_unread_data(self) -> bool:
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


class Commits:
    """Notes where a commit of a connection was not replicated: the server says so in a warning."""

    unreplicated = False

    def hear(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.source_file == "syncrep.c":
            self.unreplicated = True


@cache
def own_adapters() -> AdaptersMap:
    """Return the adapters that psycopg has by default, without those that an application has registered."""
    types = TypesRegistry()
    register_default_types(types)
    adapters = AdaptersMap(types=types)
    register_default_adapters(adapters)
    for info in types:
        if info.array_oid:
            info.register(adapters)
    set_json_loads(json.loads, adapters)
    return adapters


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
        self._hosts = _hosts(given)
        if self._hosts > 1 and "target_session_attrs" not in given and "PGTARGETSESSIONATTRS" not in os.environ:
            defaults["target_session_attrs"] = "read-write"
        named = {} if "fallback_application_name" in given else {"fallback_application_name": "unstract-wire"}
        self.conninfo = make_conninfo(conninfo, **defaults, **named, client_encoding="UTF8")
        self._connect_timeout = None if by_service else _seconds(given.get("connect_timeout"))
        self._prepare = prepare
        self._pooler_logged = not prepare
        self._generation = 0

    def connect(self, *, timeout: float | None = None, limit: float | None = None) -> Connection:
        """Return a new connection, in autocommit, with the settings that our statements depend on.

        Args:
            timeout: seconds until it must be there, over all hosts of the conninfo; None for the connect timeout of
                each host.
            limit: seconds that a statement on it may take; None for no limit.

        Raises:
            TransportUnavailable: with what the server or the network said.
            ConfigurationError: for a conninfo that can never work.
        """
        per_host = self._connect_timeout
        if per_host is not None and timeout is not None and timeout / self._hosts < per_host:
            per_host = max(_SHORTEST_CONNECT_TIMEOUT, int(timeout / self._hosts))
        conninfo = self.conninfo if per_host is None else make_conninfo(self.conninfo, connect_timeout=per_host)
        generation = self._generation
        try:
            connection = Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
            connection.note_created(generation)
            self._look_for_a_pooler(connection, timeout, limit)
            connection.limit = limit
            return connection
        except psycopg.OperationalError as exc:
            said = " ".join(str(exc).split())
            remedy = ". ".join(remedy for words, remedy in _REMEDIES.items() if words in said)
            raise TransportUnavailable(
                f"cannot connect to PostgreSQL: {said}", effect="nothing was done", remedy=remedy
            ) from exc
        except (psycopg.Error, ValueError) as exc:
            said = " ".join(str(exc).split())
            raise ConfigurationError(f"the PostgreSQL conninfo cannot be used: {said}") from exc

    def _look_for_a_pooler(self, connection: Connection, timeout: float | None, limit: float | None) -> None:
        """Look whether a pooler stands before the server, and set what a role or database has set otherwise.

        Only the server itself keeps prepared statements and settings for a session; a pooler gives its clients process
        ids of its own making. A pooler takes connections long before it has one to the server: the answer is waited
        for as a connection is.
        """
        limits = [seconds for seconds in (timeout, limit) if seconds is not None]
        connection.limit = max(_SHORTEST_CONNECT_TIMEOUT, min(limits)) if limits else None
        try:
            ((pid, *values),) = connection.execute(_PROBE.encode())
            missing_settings = {
                name: wanted[0]
                for (name, wanted), value in zip(_SETTINGS.items(), values, strict=True)
                if value is not None and value not in wanted
            }
            connection.pooled = pid != connection.info.backend_pid
            if connection.pooled:
                connection.jit_enabled = set(missing_settings) == {"jit"}
                missing_settings = {} if connection.jit_enabled else missing_settings
                connection.missing_settings = missing_settings
                connection.isolation_level = IsolationLevel.READ_COMMITTED if missing_settings else None
            elif missing_settings:
                connection.execute(
                    _SET, {"names": list(missing_settings), "values": list(missing_settings.values()), "local": False}
                )
        except BaseException:
            connection.close()
            raise
        if not connection.pooled:
            connection.prepare_threshold = _PREPARE_AFTER if self._prepare else None
        elif not self._pooler_logged:
            self._pooler_logged = True
            emit(logger, logging.WARNING, "pooler_found")

    def retire_connections(self, connection: Connection) -> None:
        """Let no connection that was made so far be used again, because one of them leads to a read-only server.

        A connection that was read-only from the beginning says nothing new: a new one would be as well.
        """
        if connection.generation == self._generation and not connection._was_read_only:
            self._generation += 1

    def stop_preparing(self, failure: PlanOutdated) -> None:
        """Make connections that prepare nothing from now on, if something before the server does not bear it."""
        if isinstance(failure, PreparedStatementLost) and self._prepare:
            self._prepare = False
            emit(logger, logging.WARNING, "prepared_statements_lost")

    def is_outdated(self, connection: Connection) -> bool:
        """Whether a new connection is to be used in its place: it prepares nothing, or reaches another server."""
        outdated = connection.generation != self._generation
        return outdated or (not self._prepare and connection.prepare_threshold is not None)

    def retire_if_read_only(self, connection: Connection) -> None:
        """Leave the server of a connection that was just used, if that has stopped taking writes."""
        if connection.became_read_only:
            self.retire_connections(connection)


def by_cursor(connection: Connection, statement: bytes, parameters: Parameters) -> Rows:
    """Run a statement as psycopg's users do."""
    return connection.execute(statement, parameters).fetchall()


def without_jit(connection: Connection, statement: bytes, parameters: Parameters) -> Rows:
    """Run a statement whose plan is so dear that a server would compile it."""
    if not connection.jit_enabled:
        return by_cursor(connection, statement, parameters)
    with connection.transaction():
        connection.execute(b"SET LOCAL jit = off")
        return by_cursor(connection, statement, parameters)


def run(
    connection: Connection,
    operation: str,
    statement: bytes,
    parameters: Parameters,
    how: How = by_cursor,
    *,
    durable: bool = False,
) -> Rows:
    """Run a statement in a commit of its own and return its rows. Every driver error is raised as ours.

    Args:
        connection: the connection to run it on; it is closed where a new one would do better.
        doing: the purpose of the statement, for the error's text.
        statement: the statement.
        parameters: its parameters.
        how: runs the statement on the connection.
        durable: whether the caller promises that the commit outlasts a failover.
    """
    size = check_size(operation, parameters)
    if type(connection) is psycopg.Connection:  # an application's own: nothing is known of it, and nothing kept
        with mapped(operation):
            return how(connection, statement, parameters)
    connection.large = connection.large or size > _LARGE
    commits = connection.commits
    commits.unreplicated = False
    for skipped in _SKIPPED_IDS:
        try:
            if connection.missing_settings:
                with connection.with_settings():
                    rows = how(connection, statement, parameters)
            else:
                rows = how(connection, statement, parameters)
            break
        except Exception as exc:
            if (ours := translate(exc, operation)) is None:
                raise
            if isinstance(ours, PlanOutdated | ReadOnly):
                connection.close()
            if not (isinstance(ours, DuplicateId) and connection.usable and skipped != _SKIPPED_IDS[-1]):
                raise ours from exc
            _skip_ids(connection, ours, skipped)
    connection.large = connection.large or _row_size(rows) > _LARGE
    if durable and commits.unreplicated:
        raise TransportUnavailable(
            f"{operation}: the statement took effect and was not replicated in time, because the synchronous standby "
            "did not answer; a failover may lose it, so its fate is unknown",
            fate_unknown=True,
        )
    return rows


def _skip_ids(connection: Connection, duplicate: DuplicateId, number: int) -> None:
    """Let the sequence of an id hand out `number` ids that nothing gets; a failure leaves that to the next try."""
    if number:
        parameters = {"table": duplicate.table, "column": duplicate.column, "number": number}
        with contextlib.suppress(psycopg.Error):
            connection.execute(_SKIP, parameters)


def check_size(operation: str, parameters: Parameters) -> int:
    """Return how large a statement's texts are, in characters. Raises TransportRefused above what a server takes."""
    if isinstance(parameters, Mapping):
        texts: Sequence[str] = [text for value in parameters.values() for text in _texts(value)]
    else:
        texts = [text for text in parameters if isinstance(text, str)]
    size = sum(map(len, texts))
    if 4 * size > LARGEST_STATEMENT and (octets := sum(len(text.encode()) for text in texts)) > LARGEST_STATEMENT:
        raise TransportRefused(
            f"{operation}: {octets} bytes are more than PostgreSQL takes in one statement (1 GiB); nothing was sent. "
            "Send fewer or smaller messages at once"
        )
    return size


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return [text for text in value if isinstance(text, str)]
    return ()


def _row_size(rows: Rows) -> int:
    return sum(len(cell) for row in rows for cell in row if isinstance(cell, str))


def _hosts(given: Mapping[str, Any]) -> int:
    """Return how many hosts are tried one after the other."""
    names = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or os.environ.get("PGHOSTADDR") or ""
    return str(names).count(",") + 1


def _seconds(given: object) -> int:
    """Return the connect timeout that was asked for in the conninfo or libpq's environment, else ours."""
    asked = os.environ.get("PGCONNECT_TIMEOUT") if given is None else given
    if asked is None:
        return _CONNECT_TIMEOUT
    try:
        return int(str(asked))
    except ValueError:
        raise ConfigurationError(f"connect_timeout must be a whole number of seconds, not {asked!r}") from None
