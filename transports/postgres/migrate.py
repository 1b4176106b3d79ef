"""Creates the missing schema, tables and indexes. Existing objects, also the product's, are not changed.

Two processes may do this at once. The second one finds a name in use, starts again, and finds all objects.

The version of the schema is the comment of the table pg_queue_dead_letter. It is raised by a change that an older
version would undo or fail on; an older version then does nothing. Workers do not read the version. They check the
tables, and also work on newer tables that have everything they need.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial

from psycopg import errors, sql

from transports.postgres.connection import Connection
from transports.postgres.connector import Connector
from transports.postgres.error_mapping import mapped
from transports.postgres.execution import run
from transports.postgres.preflight import Execute, check_tables
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements, definitions
from unstract_core.errors import ConfigurationError, TransportNotReady, TransportRefused, TransportUnavailable

SCHEMA_VERSION = 1
"""The version of the schema that this package creates."""

LOCK_TIMEOUT = 5.0

_TAKEN = (
    errors.UniqueViolation,
    errors.DuplicateTable,
    errors.DuplicateSchema,
    errors.DuplicateObject,
    errors.DeadlockDetected,
    errors.SerializationFailure,
)
_TRIES = 20
_INDEXES = """
    SELECT t.relname, x.relname, pg_get_indexdef(i.indexrelid), i.indisvalid
    FROM pg_index AS i JOIN pg_class AS x ON x.oid = i.indexrelid JOIN pg_class AS t ON t.oid = i.indrelid
    JOIN pg_namespace AS n ON n.oid = t.relnamespace
    WHERE n.nspname = %s AND t.relname = ANY (%s)
"""
_TABLE = "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = %s"
_SAME_INDEX = (
    "SELECT FROM pg_index WHERE indrelid = {table}::regclass AND indisvalid AND regexp_replace(regexp_replace("
    "pg_get_indexdef(indexrelid), '^.* USING ', ''), '::(text|character varying)|[()[:space:]]', '', 'g') = {shape}"
)
_HOLDERS = """
    SELECT t.relname::text, l.pid, a.usename::text, a.application_name, a.state,
           extract(epoch FROM clock_timestamp() - a.xact_start)::float8
    FROM pg_locks AS l
    JOIN pg_class AS t ON t.oid = l.relation
    JOIN pg_namespace AS n ON n.oid = t.relnamespace
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE n.nspname = %s AND t.relname = ANY (%s) AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
    ORDER BY a.xact_start NULLS FIRST
    LIMIT 3
"""
_TABLES = ("pg_queue_message", "pg_task_result", "pg_queue_dead_letter")
_PRODUCTS = _TABLES[:2]
_VERSION = Statement(b"SELECT obj_description(to_regclass(%(table)s), 'pg_class')")
_MARK = re.compile(r"unstract-wire schema ([0-9]{1,9})")


def migrate(
    connector: Connector,
    statements: Statements,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    create_tables: bool | None = None,
) -> list[str]:
    """Bring the schema up to date in one transaction.

    It checks the tables afterwards, because an existing one may belong to another program.

    Args:
        connector: makes the connection.
        statements: the statements of the schema.
        lock_timeout: seconds to wait for a lock on a table; senders wait too in this time. Default 5.
        create_tables: whether to create the tables that the product's own migrations create too. None (default): create
            them, unless Django has its migrations in the schema.

    Returns:
        The names of the created objects, in order.

    Raises:
        ConfigurationError: a newer version has migrated the schema; nothing was done.
        TransportNotReady: a table is missing that Django must create first; nothing was done.
        TransportUnavailable: a lock was not free in time; nothing was done. The text names the session that holds it.
    """
    with mapped("migrate", committed_by_us=False), connector.connect() as connection:
        obstacle = ""
        for _ in range(_TRIES):
            try:
                with _naming_lock_holders(connection, statements.schema, lock_timeout), connection.transaction():
                    connection.execute("SELECT set_config('lock_timeout', %s, true)", (f"{lock_timeout * 1000:.0f}ms",))
                    execute = partial(run, connection)
                    version = _version_not_newer(execute, statements)
                    created = _create_missing(connection, statements.schema, create_tables)
                    check_tables(execute, statements)
                    if version != SCHEMA_VERSION:
                        _mark(connection, execute, statements)
                    return created
            except _TAKEN as exc:
                obstacle = exc.diag.message_primary or type(exc).__name__
    raise TransportRefused(
        f"migrate: {obstacle}", effect="nothing was done", remedy="Is the name taken by something else?"
    )


def migration_sql(statements: Statements, *, create_tables: bool | None = None) -> str:
    """Return the work of `migrate` as SQL, for another migration tool. It can run several times.

    Args:
        statements: the statements of the schema.
        create_tables: False omits the two tables that the product's migrations create too.
    """
    parts = [
        f"-- unstract-wire schema {SCHEMA_VERSION}: creates what is missing, and leaves what is there as it is.",
        "-- On a large live table, run each CREATE INDEX with CONCURRENTLY first, outside a transaction.",
    ]
    for name, statement in definitions(statements.schema).items():
        if name == "schema":
            there = f"SELECT FROM pg_namespace WHERE nspname = {_literal(statements.schema)}"
        elif name in _TABLES:
            if create_tables is False and name in _PRODUCTS:
                continue
            there = f"SELECT FROM pg_tables WHERE schemaname = {_literal(statements.schema)} AND tablename = '{name}'"
        else:
            table = next(table for table in _TABLES if name.startswith(table))
            qualified = sql.Identifier(statements.schema, table).as_string(None)
            there = _SAME_INDEX.format(table=_literal(qualified), shape=_literal(index_shape(statement)))
        parts.append(_unless(f"EXISTS ({there})", statement))
    dead = statements.table("dead")
    version = f"substring(obj_description({_literal(dead)}::regclass, 'pg_class') FROM 'unstract-wire schema ([0-9]+)')"
    mark = f"COMMENT ON TABLE {dead} IS 'unstract-wire schema {SCHEMA_VERSION}'"
    parts.append(_unless(f"coalesce({version}::int, 0) >= {SCHEMA_VERSION}", mark))
    return "\n".join(parts)


def _unless(condition: str, statement: str) -> str:
    body = f"BEGIN\nIF NOT ({condition}) THEN\n{statement};\nEND IF;\nEND"
    tag = "$migrate$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"DO {tag} {body} {tag};"


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None)


@contextlib.contextmanager
def _naming_lock_holders(connection: Connection, schema: str, seconds: float) -> Iterator[None]:
    """Name the sessions that hold the tables if a lock was not free in time."""
    try:
        yield
    except Exception as exc:
        if not isinstance(exc, errors.LockNotAvailable) and not isinstance(exc.__cause__, errors.LockNotAvailable):
            raise
        rows = connection.execute(_HOLDERS.encode(), (schema, list(_TABLES))).fetchall()
        holders = "; ".join(_holder(*row) for row in rows) or "the session that held it has ended it"
        raise TransportUnavailable(
            f"migrate: a lock on a table in schema {schema} was not free within {seconds:g} s",
            effect="nothing was done",
            remedy=f"{holders}. End what holds it, and run this again",
        ) from exc


def _holder(table: str, pid: int | None, user: str | None, name: str | None, state: str | None, age: float) -> str:
    if pid is None:
        return f"{table} is held by a prepared transaction (see pg_prepared_xacts)"
    since = "" if age is None else f", in its transaction for {age:.0f} s"
    return (
        f"{table} is held by session {pid} (user {user}, application {name or 'unnamed'}, {state or 'unknown'}{since})"
    )


def schema_version(execute: Execute, statements: Statements) -> int | None:
    """Return the version of the schema; None if it has no version mark."""
    table = {"table": statements.table("dead")}
    ((comment,),) = execute("look at the version of the schema", _VERSION, table)
    mark = _MARK.fullmatch(comment or "")
    return int(mark[1]) if mark else None


def _version_not_newer(execute: Execute, statements: Statements) -> int | None:
    version = schema_version(execute, statements)
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"migrate: the tables in schema {statements.schema} are of version {version}, and this unstract-wire knows "
            f"version {SCHEMA_VERSION}; nothing was done. Install a newer unstract-wire to migrate them"
        )
    return version


def _mark(connection: Connection, execute: Execute, statements: Statements) -> None:
    """Mark the schema with this version, unless another process has marked it with a newer one."""
    table = statements.table("dead")
    connection.execute(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE".encode())
    _version_not_newer(execute, statements)
    connection.execute(f"COMMENT ON TABLE {table} IS 'unstract-wire schema {SCHEMA_VERSION}'".encode())


def _create_missing(connection: Connection, schema: str, create_tables: bool | None) -> list[str]:
    created: list[str] = []
    if create_tables is None:
        create_tables = _missing(connection, _TABLE, (schema, "django_migrations"))
    for name, statement in definitions(schema).items():
        if name == "schema":
            missing = _missing(connection, "SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,))
        elif name in _TABLES:
            missing = _missing(connection, _TABLE, (schema, name))
            if missing and not create_tables and name != "pg_queue_dead_letter":
                raise TransportNotReady(
                    f"migrate: there is no table {name} in schema {schema}, where Django keeps its migrations",
                    effect="nothing was done",
                    remedy="If a Django migration creates the table, run it first; else run this with --create-tables",
                )
        else:
            table = next(table for table in _TABLES if name.startswith(table))
            missing = (table, index_shape(statement)) not in _indexes(connection, schema)
        if missing:
            connection.execute(statement.encode())
            created.append(name if name != "schema" else f"schema {schema}")
    return created


def _missing(connection: Connection, question: str, parameters: tuple[str, ...]) -> bool:
    return connection.execute(question.encode(), parameters).fetchone() is None


def _indexes(connection: Connection, schema: str) -> set[tuple[str, str]]:
    rows = connection.execute(_INDEXES, (schema, list(_TABLES))).fetchall()
    if invalid := [name for _, name, _, valid in rows if not valid]:
        raise TransportNotReady(
            f"migrate: the index {invalid[0]} in schema {schema} is not valid; a failed CREATE INDEX "
            "CONCURRENTLY leaves such an index",
            remedy="drop the index, and run this again",
        )
    return {(table, index_shape(definition)) for table, _, definition, _ in rows}


def index_shape(definition: str) -> str:
    """Reduce an index definition to the indexed columns and conditions, so that an index of another name counts too."""
    return re.sub(r"::(text|character varying)|[()\s]", "", definition.rpartition(" USING ")[2])
