"""Create what is missing: schema, tables, indexes. What is there already is left as it is, the product's too.

Two processes may do this at once: whoever comes second finds a name taken, starts over, and finds it all there.
"""

from __future__ import annotations

import re
from functools import partial

from psycopg import errors

from transports.postgres.connections import Connection, Connector, run
from transports.postgres.errors import mapped
from transports.postgres.look import look_at_tables
from transports.postgres.statements import Statements, definitions
from unstract_core.errors import TransportNotReady, TransportRefused

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


def migrate(connector: Connector, statements: Statements) -> list[str]:
    """Bring the schema up to date in one transaction; return what was created, in order, empty when nothing was.

    Looks at the tables afterwards: one that was there already may be another's.
    """
    with mapped("migrate", committed_by_us=False), connector.connect() as connection:
        obstacle = ""
        for _ in range(_TRIES):
            try:
                with connection.transaction():
                    created = _create_what_is_missing(connection, statements.schema)
                    look_at_tables(partial(run, connection), statements)
                    return created
            except _TAKEN as exc:
                obstacle = exc.diag.message_primary or type(exc).__name__
    raise TransportRefused(f"migrate: {obstacle}; nothing was done. Is the name taken by something else?")


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
