"""One statement straight through libpq, prepared once on each connection: the most frequent one, which sends a message.

psycopg's cursor adapts any parameters to any statement; where both are always the same it costs 60 us of an insert's
250 (measured in benchmarks/). This is libpq's own way to run a prepared statement without blocking, on `psycopg.pq`.
Parameters and results are text.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from transports.postgres.connections import Connection

_NAME = b"unstract_wire_straight"


def straight(connection: Connection, statement: bytes, parameters: Sequence[str]) -> list[tuple[Any, ...]]:
    """Run a statement whose parameters are `$1` and so on, and return the first column of its rows.

    A connection runs one and the same statement this way, or leaves it to a cursor where nothing may be prepared.
    Raises psycopg's errors, as a cursor would; a connection that was left in the middle of it is not usable any more.
    """
    if connection.prepare_threshold is None:
        return psycopg.RawCursor(connection, row_factory=tuple_row).execute(statement, parameters).fetchall()
    if not connection.has_prepared:
        connection.pgconn.send_prepare(_NAME, statement)
        _check(_result(connection), ExecStatus.COMMAND_OK)
        connection.has_prepared = True
    connection.pgconn.send_query_prepared(_NAME, [text.encode() for text in parameters])
    result = _result(connection)
    _check(result, ExecStatus.TUPLES_OK)
    return [((result.get_value(row, 0) or b"").decode(),) for row in range(result.ntuples)]


def _result(connection: Connection) -> PGresult:
    pgconn = connection.pgconn
    while pgconn.flush():
        _wait(connection, select.POLLIN | select.POLLOUT)
        pgconn.consume_input()
    found = None
    while True:
        while pgconn.is_busy():
            _wait(connection, select.POLLIN)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        found = found or result
    if found is None:
        raise psycopg.OperationalError("no result")
    return found


def _wait(connection: Connection, events: int) -> None:
    if not connection.poll(events, connection.limit):
        raise psycopg.OperationalError(f"no answer within {connection.limit} s")


def _check(result: PGresult, expected: ExecStatus) -> None:
    if result.status != expected:
        raise psycopg.errors.error_from_result(result, "utf-8")
