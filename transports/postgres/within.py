"""A caller's own transaction, joined through one of its cursors: psycopg 3's, psycopg2's or Django's.

We work on a cursor of our own beside the caller's, so that rows which it has not read yet stay to be read, and what
kind of rows it makes does not matter. Where there is no transaction to belong to (autocommit with none open, a
connection that was closed) the cursor is refused: the message would be committed at once, and nobody could say whether
it was sent when the connection breaks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Self

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import TupleRow, tuple_row

from unstract_core.errors import ConfigurationError


class _Unprepared(psycopg.Cursor[TupleRow]):
    """Prepares nothing on the caller's connection, which may lead through a pooler that we know nothing of."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        return super().execute(query, params, **{**options, "prepare": False})


@contextlib.contextmanager
def cursor_beside(cursor: Any) -> Iterator[Any]:
    """Lend a new cursor in the caller's transaction. Raises ConfigurationError for what is no such cursor."""
    if not callable(getattr(cursor, "execute", None)) or not callable(getattr(cursor, "fetchall", None)):
        raise ConfigurationError(f"within= takes an open DB-API cursor, not a {type(cursor).__name__}")
    if inspect.iscoroutinefunction(cursor.execute):
        raise ConfigurationError("within= takes a synchronous cursor; this one is asynchronous")
    connection = getattr(cursor, "connection", None)
    if connection is None or getattr(cursor, "closed", False) is True or getattr(connection, "closed", False):
        raise ConfigurationError("within= takes an open cursor; this one, or its connection, is closed")
    if _is_djangos(cursor) and cursor.db.connection is not connection:
        raise ConfigurationError("within= takes a cursor of Django's present connection; this one is of an earlier one")
    _refuse_outside_a_transaction(connection)
    with contextlib.closing(_beside(cursor, connection)) as ours:
        yield ours


def _beside(cursor: Any, connection: Any) -> Any:
    if _is_djangos(cursor):
        return cursor.db.cursor()
    if isinstance(connection, psycopg.Connection):
        return _Unprepared(connection, row_factory=tuple_row)
    return connection.cursor()


def _is_djangos(cursor: Any) -> bool:
    return callable(getattr(getattr(cursor, "db", None), "cursor", None))


def _refuse_outside_a_transaction(connection: Any) -> None:
    """psycopg 3 and psycopg2 agree in these names, and in the numbers of the states."""
    if _is_in_a_pipeline(connection):
        with connection.pipeline():
            pass  # leaving it waits for what was asked before: only then the state is known
    state = getattr(getattr(connection, "info", None), "transaction_status", None)
    if state == TransactionStatus.ACTIVE:
        raise ConfigurationError("within= takes a connection that is free; this one is streaming or copying")
    if state == TransactionStatus.IDLE and getattr(connection, "autocommit", False):
        raise ConfigurationError(
            "within= takes a cursor inside a transaction, and this connection is in autocommit with none open: "
            "use transaction.atomic() or connection.transaction(), or send without within="
        )


def _is_in_a_pipeline(connection: Any) -> bool:
    return isinstance(connection, psycopg.Connection) and connection.pgconn.pipeline_status != PipelineStatus.OFF
