"""`Connector`: makes connections to one address, with the settings that the statements need."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import IsolationLevel
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from transports.postgres.connection import Connection
from transports.postgres.errors import PlanOutdated, PreparedStatementLost
from unstract_core.errors import ConfigurationError, TransportUnavailable
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.postgres")

_DEFAULTS = {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "40000",
}
"""libpq leaves these to the operating system, which detects a silent network after minutes or hours."""
_CONNECT_TIMEOUT = 10
_SHORTEST_CONNECT_TIMEOUT = 2  # the minimum of libpq
_PREPARE_AFTER = 5
_REMEDIES = {
    "unsupported startup parameter": "leave it out of the conninfo and of libpq's environment (PGOPTIONS), or let "
    "ignore_startup_parameters of pgbouncer.ini name it, and it has no effect",
    "max_client_conn": "raise it in pgbouncer.ini, or use fewer connections (pool_size, workers)",
}
"""Remedies by words of a pooler's message."""
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
"""Settings of a role or database on which the statements depend, with the accepted values. The first value is set.

With `jit` on, the server compiles a plan that counts many rows, for longer than it runs. If that is all that a pooler's
sessions lack, only the statements with such plans switch it off (`UncompiledStatement`), because settings cost each
statement round trips there.

Settings by which an administrator limits access are not changed: read-only transactions, timeouts, row security.
`search_path` is not changed either, because the triggers of a table may depend on it. The statements qualify their
tables. Their functions are those of pg_catalog, unless an administrator puts another schema before it.
"""
_PROBE = "SELECT pg_backend_pid(), {}".format(", ".join(f"current_setting('{name}', true)" for name in _SETTINGS))


class Connector:
    """Makes connections with one conninfo. They use UTF-8, also if the environment names another encoding.

    Args:
        conninfo: a libpq URL or key=value string.
        prepare: whether connections prepare statements on the server.

    Raises:
        ConfigurationError: the conninfo cannot be parsed.
    """

    def __init__(self, conninfo: str, *, prepare: bool) -> None:
        try:
            given = conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            raise ConfigurationError(
                "the PostgreSQL conninfo cannot be parsed; expected postgresql://user@host/database or key=value pairs"
            ) from None  # the driver's text quotes the conninfo, which may contain a password
        if "@" in str(given.get("host") or ""):
            raise ConfigurationError("the PostgreSQL conninfo has '@' in its host; write it as %40 in the password")
        by_service = "service" in given or "PGSERVICE" in os.environ
        defaults = {name: value for name, value in _DEFAULTS.items() if name not in given and not by_service}
        self._hosts = _number_of_hosts(given)
        if self._hosts > 1 and "target_session_attrs" not in given and "PGTARGETSESSIONATTRS" not in os.environ:
            defaults["target_session_attrs"] = "read-write"
        named = {} if "fallback_application_name" in given else {"fallback_application_name": "unstract-wire"}
        self.conninfo = make_conninfo(conninfo, **defaults, **named, client_encoding="UTF8")
        self._connect_timeout = None if by_service else _connect_timeout(given.get("connect_timeout"))
        self._prepare = prepare
        self._pooler_logged = not prepare
        self._generation = 0

    def connect(self, *, timeout: float | None = None, limit: float | None = None) -> Connection:
        """Return a new connection, in autocommit, with the settings that the statements depend on.

        Args:
            timeout: seconds for connecting, over all hosts of the conninfo. None: the connect timeout of each host.
            limit: seconds that a statement on it may take. None: no limit.

        Raises:
            TransportUnavailable: the server cannot be reached; the text has the message of the server or the network.
            ConfigurationError: the conninfo can never work.
        """
        per_host = self._connect_timeout
        if per_host is not None and timeout is not None and timeout / self._hosts < per_host:
            per_host = max(_SHORTEST_CONNECT_TIMEOUT, int(timeout / self._hosts))
        conninfo = self.conninfo if per_host is None else make_conninfo(self.conninfo, connect_timeout=per_host)
        generation = self._generation
        try:
            connection = Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
            connection.note_created(generation)
            self._probe(connection, timeout, limit)
            connection.limit = limit
            return connection
        except psycopg.OperationalError as exc:
            message = " ".join(str(exc).split())
            remedy = ". ".join(remedy for words, remedy in _REMEDIES.items() if words in message)
            raise TransportUnavailable(
                f"cannot connect to PostgreSQL: {message}", effect="nothing was done", remedy=remedy
            ) from exc
        except (psycopg.Error, ValueError) as exc:
            message = " ".join(str(exc).split())
            raise ConfigurationError(f"the PostgreSQL conninfo cannot be used: {message}") from exc

    def _probe(self, connection: Connection, timeout: float | None, limit: float | None) -> None:
        """Detect a pooler, and set the settings that the role or database has set otherwise.

        A pooler reports a process id that differs from the server's. Behind a pooler, prepared statements and settings
        last only for a transaction. A pooler may accept a connection long before it has one to the server, so this
        answer has the time limit of connecting.
        """
        limits = [seconds for seconds in (timeout, limit) if seconds is not None]
        connection.limit = max(_SHORTEST_CONNECT_TIMEOUT, min(limits)) if limits else None
        try:
            ((pid, *values),) = connection.execute(_PROBE.encode())
            missing = {
                name: wanted[0]
                for (name, wanted), value in zip(_SETTINGS.items(), values, strict=True)
                if value is not None and value not in wanted
            }
            connection.pooled = pid != connection.info.backend_pid
            if connection.pooled:
                connection.jit_enabled = set(missing) == {"jit"}
                missing = {} if connection.jit_enabled else missing
                connection.missing_settings = missing
                connection.isolation_level = IsolationLevel.READ_COMMITTED if missing else None
            elif missing:
                connection.set_config(missing, local=False)
        except BaseException:
            connection.close()
            raise
        if not connection.pooled:
            connection.prepare_threshold = _PREPARE_AFTER if self._prepare else None
        elif not self._pooler_logged:
            self._pooler_logged = True
            emit(logger, logging.WARNING, "pooler_found")

    def retire_connections(self, connection: Connection) -> None:
        """Retire all connections made so far, because the server of this one became read-only.

        If a connection was read-only from the beginning, this has no effect: a new one would be read-only too.
        """
        if connection.generation == self._generation and not connection.was_read_only:
            self._generation += 1

    def retire_if_read_only(self, connection: Connection) -> None:
        """Retire all connections if the server of this one, which was just used, became read-only."""
        if connection.became_read_only:
            self.retire_connections(connection)

    def stop_preparing(self, failure: PlanOutdated) -> None:
        """Make connections without prepared statements from now on, if the failure shows that a pooler loses them."""
        if isinstance(failure, PreparedStatementLost) and self._prepare:
            self._prepare = False
            emit(logger, logging.WARNING, "prepared_statements_lost")

    def is_outdated(self, connection: Connection) -> bool:
        """Whether a new connection must replace this one: it is retired, or it prepares statements and must not."""
        retired = connection.generation != self._generation
        return retired or (not self._prepare and connection.prepare_threshold is not None)


def _number_of_hosts(given: Mapping[str, Any]) -> int:
    """Return the number of hosts that libpq tries in turn."""
    names = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or os.environ.get("PGHOSTADDR") or ""
    return str(names).count(",") + 1


def _connect_timeout(given: object) -> int:
    """Return the connect timeout of the conninfo or of libpq's environment, else the default of this package."""
    wanted = os.environ.get("PGCONNECT_TIMEOUT") if given is None else given
    if wanted is None:
        return _CONNECT_TIMEOUT
    try:
        return int(str(wanted))
    except ValueError:
        raise ConfigurationError(f"connect_timeout must be a whole number of seconds, not {wanted!r}") from None
