"""Run one prepared statement through `psycopg.pq`, without a psycopg cursor.

It runs the most frequent statement, which sends one message. A psycopg cursor adapts any parameters to any statement.
Here both are always the same, and a cursor takes 60 of an insert's 250 microseconds (measured in benchmarks/).
Parameters and results are text.
"""

from __future__ import annotations

import hashlib
import select
from collections.abc import Sequence
from functools import cache
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from transports.postgres.connection import CANCEL_TIMEOUT, Connection
from unstract_core.errors import TransportUnavailable


@cache
def _name(statement: bytes) -> bytes:
    """Return a name that is unique to the statement, so that no other statement runs under it."""
    return b"unstract_wire_" + hashlib.blake2b(statement, digest_size=8).hexdigest().encode()


def execute_prepared(connection: Connection, statement: bytes, parameters: Sequence[str]) -> list[tuple[Any, ...]]:
    """Run a statement with the parameters `$1`, `$2` and so on, and return the first column of its rows.

    A connection runs only one statement this way. If the connection must not prepare statements, a cursor runs it.
    After an error in the middle of the exchange, the connection is no longer usable.

    Raises:
        psycopg.Error: as a cursor would.
        TransportUnavailable: the connection was lost while the statement was prepared.
    """
    if connection.prepare_threshold is None:
        return psycopg.RawCursor(connection, row_factory=tuple_row).execute(statement, parameters).fetchall()
    name = _name(statement)
    if not connection.has_prepared:
        _prepare(connection, name, statement)
    connection.pgconn.send_query_prepared(name, [text.encode() for text in parameters])
    result = _result(connection)
    _check(result, ExecStatus.TUPLES_OK)
    return [((result.get_value(row, 0) or b"").decode(),) for row in range(result.ntuples)]


def _prepare(connection: Connection, name: bytes, statement: bytes) -> None:
    connection.spoiled = True  # until the server's answer shows whether it has prepared the statement
    try:
        connection.pgconn.send_prepare(name, statement)
        _check(_result(connection), ExecStatus.COMMAND_OK)
    except psycopg.Error as exc:
        if exc.sqlstate is not None:
            raise
        raise TransportUnavailable("the connection to PostgreSQL was lost", effect="nothing was sent") from exc
    connection.spoiled = False
    connection.has_prepared = True


def _result(connection: Connection) -> PGresult:
    pgconn = connection.pgconn
    while pgconn.flush():
        _wait(connection, select.POLLIN | select.POLLOUT)
        pgconn.consume_input()
    first = None
    while True:
        while pgconn.is_busy():
            _wait(connection, select.POLLIN)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        # An error of the commit comes after the rows: a deferred constraint, a full queue of notifications.
        if first is None or result.status == ExecStatus.FATAL_ERROR:
            first = result
    if first is None:
        raise psycopg.OperationalError("no result")
    return first


def _wait(connection: Connection, events: int) -> None:
    if connection.poll(events, connection.limit):
        return
    connection.cancel_running()
    if not connection.poll(events, CANCEL_TIMEOUT):
        raise psycopg.OperationalError(f"no answer within {connection.limit} s")


def _check(result: PGresult, expected: ExecStatus) -> None:
    if result.status != expected:
        raise psycopg.errors.error_from_result(result, "utf-8")
