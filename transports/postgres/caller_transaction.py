"""Joins a caller's own transaction through one of its cursors: of psycopg 3, psycopg2 or Django.

The statements run on a new cursor of the caller's connection. So the caller can still read its unread rows, and its row
factory has no effect. A cursor without a transaction is refused (autocommit without an open transaction, a closed
connection): each statement would commit at once, and its fate would be unknown if the connection broke.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import TupleRow, tuple_row

from transports.postgres.connection import own_adapters
from unstract_core.errors import ConfigurationError

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


class _Unprepared(psycopg.Cursor[TupleRow]):
    """Prepares no statement, because the caller's connection may go through a pooler.

    It has psycopg's default adapters, without those that the application has registered.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._adapters = AdaptersMap(own_adapters())

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        return super().execute(query, params, **{**options, "prepare": False})


class _Quoted:
    """A cursor of psycopg2 that writes lists without the application's adapters."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self.fetchall, self.close = cursor.fetchall, cursor.close

    def execute(self, statement: str, parameters: Mapping[str, Any]) -> None:
        self._cursor.execute(statement, {name: _Literal(value) for name, value in parameters.items()})


class _Literal:
    """A text, or a list as the text of an array, quoted by psycopg2 itself."""

    def __init__(self, value: Any) -> None:
        quoted = sys.modules["psycopg2.extensions"].QuotedString  # the caller has imported it
        self._quoted = quoted(_array(value) if isinstance(value, list) else value)

    def __conform__(self, protocol: object) -> Self:
        return self

    def prepare(self, connection: Any) -> None:
        self._quoted.prepare(connection)

    def getquoted(self) -> bytes:
        quoted: bytes = self._quoted.getquoted()
        return quoted


def _array(values: Sequence[Any]) -> str:
    escaped = (str(value).replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return "{" + ",".join(f'"{text}"' for text in escaped) + "}"


def ascii_json(text: str) -> str:
    """Return JSON in ASCII, because the encoding of the caller's connection may lack other characters."""
    return text if text.isascii() else _NOT_ASCII.sub(_escaped, text)


def _escaped(character: re.Match[str]) -> str:
    units = character[0].encode("utf-16-be")
    return "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))


@contextlib.contextmanager
def cursor_beside(cursor: Any) -> Iterator[Any]:
    """Yield a new cursor in the caller's transaction.

    Raises:
        ConfigurationError: the argument is not an open, synchronous cursor inside a transaction.
    """
    if not callable(getattr(cursor, "execute", None)) or not callable(getattr(cursor, "fetchall", None)):
        raise ConfigurationError(f"within= takes an open DB-API cursor, not a {type(cursor).__name__}")
    if inspect.iscoroutinefunction(cursor.execute):
        raise ConfigurationError("within= takes a synchronous cursor; this one is asynchronous")
    connection = getattr(cursor, "connection", None)
    if connection is None or getattr(cursor, "closed", False) is True or getattr(connection, "closed", False):
        raise ConfigurationError("within= takes an open cursor; this one, or its connection, is closed")
    if _is_djangos(cursor) and cursor.db.connection is not connection:
        raise ConfigurationError(
            "within= takes a cursor of Django's current connection, not of an earlier one; open a new cursor"
        )
    _refuse_outside_a_transaction(connection)
    with contextlib.closing(_beside(cursor, connection)) as beside:
        yield beside


def _beside(cursor: Any, connection: Any) -> Any:
    if isinstance(connection, psycopg.Connection):
        if not _is_djangos(cursor):
            return _Unprepared(connection)
        beside = cursor.db.cursor()
        if isinstance(inner := getattr(beside, "cursor", None), psycopg.Cursor):
            inner._adapters = AdaptersMap(own_adapters())
        return beside
    beside = cursor.db.cursor() if _is_djangos(cursor) else connection.cursor()
    psycopg2 = sys.modules.get("psycopg2.extensions")
    return _Quoted(beside) if psycopg2 is not None and isinstance(connection, psycopg2.connection) else beside


def _is_djangos(cursor: Any) -> bool:
    return callable(getattr(getattr(cursor, "db", None), "cursor", None))


def _refuse_outside_a_transaction(connection: Any) -> None:
    """Refuse a connection without a transaction. psycopg 3 and psycopg2 use the same names and numbers of states."""
    if _is_in_a_pipeline(connection):
        with connection.pipeline():
            pass  # its exit waits for the pending statements; after that the state is known
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
