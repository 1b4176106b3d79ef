"""A caller's own transaction, joined through one of its cursors: psycopg 3's, psycopg2's or Django's.

We work on a cursor of our own beside the caller's, so that rows which it has not read yet stay to be read, and what
kind of rows it makes does not matter. A connection in autocommit with no transaction open is refused: nothing could
belong to the caller's transaction, and nobody could say whether a message was sent when the connection breaks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from unstract_core.errors import ConfigurationError


@contextlib.contextmanager
def cursor_beside(cursor: Any) -> Iterator[Any]:
    """Lend a new cursor in the caller's transaction. Raises ConfigurationError for what is no such cursor."""
    if not callable(getattr(cursor, "execute", None)) or not callable(getattr(cursor, "fetchall", None)):
        raise ConfigurationError(f"within= takes an open DB-API cursor, not a {type(cursor).__name__}")
    if inspect.iscoroutinefunction(cursor.execute):
        raise ConfigurationError("within= takes a synchronous cursor; this one is asynchronous")
    connection = getattr(cursor, "connection", None)
    if connection is None or getattr(cursor, "closed", False) is True:
        raise ConfigurationError("within= takes an open cursor; this one is closed, or has no connection")
    if _outside_a_transaction(connection):
        raise ConfigurationError(
            "within= takes a cursor inside a transaction, and this connection is in autocommit with none open: "
            "use transaction.atomic() or connection.transaction(), or send without within="
        )
    with contextlib.closing(_beside(cursor, connection)) as ours:
        yield ours


def _beside(cursor: Any, connection: Any) -> Any:
    if _is_djangos(cursor):
        return cursor.db.cursor()
    if isinstance(connection, psycopg.Connection):
        return psycopg.Cursor(connection, row_factory=tuple_row)
    return connection.cursor()


def _is_djangos(cursor: Any) -> bool:
    return callable(getattr(getattr(cursor, "db", None), "cursor", None))


def _outside_a_transaction(connection: Any) -> bool:
    """psycopg 3 and psycopg2 agree in these names, and in the number of an idle connection."""
    idle = getattr(getattr(connection, "info", None), "transaction_status", None) == TransactionStatus.IDLE
    return bool(getattr(connection, "autocommit", False)) and idle
