"""A caller's own transaction, joined through one of its cursors: psycopg 3's, psycopg2's or Django's.

We work on a cursor of our own beside the caller's, so that rows which it has not read yet stay to be read, and what
kind of rows it makes does not matter. Where there is no transaction to belong to (autocommit with none open, a
connection that was closed) the cursor is refused: the message would be committed at once, and nobody could say whether
it was sent when the connection breaks.
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
    """Prepares nothing on the caller's connection, which may lead through a pooler that we know nothing of.

    It has psycopg's own adapters, whatever the application has registered for its statements.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._adapters = AdaptersMap(own_adapters())

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        return super().execute(query, params, **{**options, "prepare": False})


class _Quoted:
    """A cursor of psycopg2 that writes lists without the adapters that the application has registered."""

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
    """Write JSON in ASCII, so that it does not matter in which encoding the caller's connection speaks."""
    return text if text.isascii() else _NOT_ASCII.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be")
    return "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))


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
    if isinstance(connection, psycopg.Connection):
        if not _is_djangos(cursor):
            return _Unprepared(connection)
        ours = cursor.db.cursor()
        if isinstance(inner := getattr(ours, "cursor", None), psycopg.Cursor):
            inner._adapters = AdaptersMap(own_adapters())
        return ours
    ours = cursor.db.cursor() if _is_djangos(cursor) else connection.cursor()
    psycopg2 = sys.modules.get("psycopg2.extensions")
    return _Quoted(ours) if psycopg2 is not None and isinstance(connection, psycopg2.connection) else ours


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
