"""Checks before the first message whether a consumer's statements can work on the tables.

The statements are planned and not run. That detects a missing column, a missing unique key under ON CONFLICT and a
missing right. Planning does not check sequences, so their rights are queried. If a right is missing, the catalog is
queried for all missing rights, so that the administrator can grant them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from transports.postgres.connection import Rows
from transports.postgres.expiry_planner import ExpiryPlanner
from transports.postgres.privileges import CONSUMER
from transports.postgres.rows import settle_parameters
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements
from unstract_core.errors import TransportError, TransportNotReady, TransportRefused

_PLANNED: dict[str, dict[str, Any]] = {
    "claim_one_queue": {"queue_0": "", "limit": 1, "lease": 1.0},
    "requeue_expired": {"queues": [], "limit": 1, "ahead": 1.0, **ExpiryPlanner([""]).next_part()},
    "settle": {**settle_parameters([]), "channel": "", "wake": [], "reply_channel": "", "wake_callers": False},
}
_LACKING = Statement(b"""
    SELECT NULL, 'USAGE', NULL FROM pg_namespace
    WHERE nspname = %(schema)s AND NOT has_schema_privilege(oid, 'USAGE')
    UNION ALL
    SELECT t.relname::text, need.right, array_agg(c.name ORDER BY need.place)
    FROM unnest(%(tables)s::text[], %(rights)s::text[], %(columns)s::text[]) WITH ORDINALITY
             AS need ("table", "right", "column", place)
    JOIN pg_class AS t ON t.relname = need.table AND t.relkind IN ('r', 'p')
    JOIN pg_namespace AS n ON n.oid = t.relnamespace AND n.nspname = %(schema)s
    LEFT JOIN LATERAL (
        SELECT a.attname::text AS name, a.attnum AS number FROM pg_attribute AS a
        WHERE a.attrelid = t.oid AND a.attname = need.column AND NOT a.attisdropped
    ) AS c ON true
    WHERE CASE WHEN need.column IS NULL THEN NOT has_table_privilege(t.oid, need.right)
               ELSE NOT has_column_privilege(t.oid, c.number, need.right) END
    GROUP BY t.relname, need.right
""")


Execute: TypeAlias = Callable[[str, Statement, dict[str, Any]], Rows]
"""Runs a statement (its purpose, the statement, its parameters) and returns its rows. Raises TransportError."""


def check_tables(execute: Execute, statements: Statements) -> None:
    """Check everything that a consumer requires of the tables.

    Raises:
        TransportNotReady: a table, a column, a key or a right is missing, or row-level security is active for the role.
    """
    check_row_security(execute, statements)
    try:
        execute("look at the tables", statements["check_tables"], {})
        _plan(execute, statements)
    except TransportNotReady as exc:
        if not (lacking := _lacking(execute, statements.schema)):
            raise
        raise TransportNotReady(
            f"{exc.problem}: this role lacks {lacking}", remedy="grant this role the right"
        ) from exc
    names = {"messages": statements.table("messages"), "dead": statements.table("dead")}
    if closed := execute("look at sequences", statements["closed_sequences"], names):
        sequences = ", ".join(str(sequence) for (sequence,) in closed)
        raise TransportNotReady(f"this role lacks USAGE on {sequences}", remedy="grant this role the right")


def check_row_security(execute: Execute, statements: Statements) -> None:
    """Check that row-level security hides no rows from this role.

    Raises:
        TransportNotReady: it is active for this role.
    """
    asked = {"schema": statements.schema, "tables": list(CONSUMER)}
    if tables := [table for (table,) in execute("look at row security", statements["row_security"], asked)]:
        raise TransportNotReady(
            f"row-level security is active for this role on {', '.join(tables)}: rows can be hidden from it, or stay"
            " when it deletes them",
            remedy="let the role bypass it (ALTER ROLE ... BYPASSRLS), or ALTER TABLE ... DISABLE ROW LEVEL SECURITY",
        )


def _plan(execute: Execute, statements: Statements) -> None:
    for name, parameters in _PLANNED.items():
        try:
            execute(f"plan the statement {name}", statements[name].explained(), parameters)
        except TransportRefused as exc:
            remedy = "compare the tables with transports/postgres/sql/schema.sql"
            if exc.remedy:
                remedy = f"{exc.remedy}; {remedy}"
            raise TransportNotReady(exc.problem, effect=exc.effect, remedy=remedy) from exc


def _lacking(execute: Execute, schema: str) -> str:
    """Return the names of all rights on the tables that a consumer needs and this role lacks."""
    needs = [
        (table, right, column)
        for table, rights in CONSUMER.items()
        for right, columns in rights.items()
        for column in columns or (None,)
    ]
    tables, rights, columns = map(list, zip(*needs, strict=True))
    asked = {"schema": schema, "tables": tables, "rights": rights, "columns": columns}
    try:
        rows = execute("look at this role's rights", _LACKING, asked)
    except TransportError:  # a failed transaction: the error then names only the first missing right
        return ""
    return ", ".join(_named(table, right, columns) for table, right, columns in rows)


def _named(table: str | None, right: str, columns: Sequence[str] | None) -> str:
    if table is None:
        return f"{right} on the schema"
    all_of_it = right != "UPDATE" and set(columns or ()) >= set(CONSUMER[table][right])
    return f"{right} on {table}" if all_of_it else f"{right} ({', '.join(columns or ())}) on {table}"
