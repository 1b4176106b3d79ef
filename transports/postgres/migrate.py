"""Create what is missing: schema, tables, indexes. What is there already is left as it is, the product's too.

Two processes may do this at once: whoever comes second finds a name taken, starts over, and finds it all there.

The version of what is created stands as the comment of our own table, pg_queue_dead_letter. It rises when something is
created, altered or dropped that an older version would undo or fail at: an older version then does nothing here.
Workers do not ask for it. They look at the tables, and work on newer ones that have what they need.
"""

from __future__ import annotations

import re
from functools import partial

from psycopg import errors

from transports.postgres.connections import Connection, Connector, run
from transports.postgres.errors import mapped
from transports.postgres.look import Execute, look_at_tables
from transports.postgres.statements import Statements, definitions
from unstract_core.errors import ConfigurationError, TransportNotReady, TransportRefused

SCHEMA_VERSION = 1
"""The version of what is created here."""

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
_TABLES = ("pg_queue_message", "pg_task_result", "pg_queue_dead_letter")
_VERSION = "SELECT obj_description(to_regclass(%(table)s), 'pg_class')"
_MARK = re.compile(r"unstract-wire schema ([0-9]{1,9})")


def migrate(connector: Connector, statements: Statements) -> list[str]:
    """Bring the schema up to date in one transaction; return what was created, in order, empty when nothing was.

    Looks at the tables afterwards: one that was there already may be another's. Raises ConfigurationError, and does
    nothing, where a newer version has been here.
    """
    with mapped("migrate", committed_by_us=False), connector.connect() as connection:
        obstacle = ""
        for _ in range(_TRIES):
            try:
                with connection.transaction():
                    execute = partial(run, connection)
                    version = _version_of_no_newer(execute, statements)
                    created = _create_what_is_missing(connection, statements.schema)
                    look_at_tables(execute, statements)
                    if version != SCHEMA_VERSION:
                        _mark(connection, execute, statements)
                    return created
            except _TAKEN as exc:
                obstacle = exc.diag.message_primary or type(exc).__name__
    raise TransportRefused(f"migrate: {obstacle}; nothing was done. Is the name taken by something else?")


def schema_version(execute: Execute, statements: Statements) -> int | None:
    """Return the version with which the schema is marked; None where there is no such mark, as before there was one."""
    table = {"table": statements.table("dead")}
    ((comment,),) = execute("look at the version of the schema", _VERSION.encode(), table)
    mark = _MARK.fullmatch(comment or "")
    return int(mark[1]) if mark else None


def _version_of_no_newer(execute: Execute, statements: Statements) -> int | None:
    version = schema_version(execute, statements)
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"migrate: the tables in schema {statements.schema} are of version {version}, and this unstract-wire knows "
            f"version {SCHEMA_VERSION}; nothing was done. Install a newer unstract-wire to migrate them"
        )
    return version


def _mark(connection: Connection, execute: Execute, statements: Statements) -> None:
    """Mark the schema with this version, unless another process has marked it with a newer one in the meantime."""
    table = statements.table("dead")
    connection.execute(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE".encode())
    _version_of_no_newer(execute, statements)
    connection.execute(f"COMMENT ON TABLE {table} IS 'unstract-wire schema {SCHEMA_VERSION}'".encode())


def _create_what_is_missing(connection: Connection, schema: str) -> list[str]:
    created: list[str] = []
    for name, statement in definitions(schema).items():
        if name == "schema":
            missing = _missing(connection, "SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,))
        elif name in _TABLES:
            missing = _missing(
                connection, "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = %s", (schema, name)
            )
        else:
            table = next(table for table in _TABLES if name.startswith(table))
            missing = (table, _shape(statement)) not in _indexes(connection, schema)
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
            f"migrate: the index {invalid[0]} in schema {schema} is not valid, as a failed CREATE INDEX CONCURRENTLY "
            "leaves it: drop it, and run this again"
        )
    return {(table, _shape(definition)) for table, _, definition, _ in rows}


def _shape(definition: str) -> str:
    """Reduce an index definition to what it indexes, so that one of another name counts as well."""
    return re.sub(r"::(text|character varying)|[()\s]", "", definition.rpartition(" USING ")[2])
