"""`run`: executes and commits one statement, and raises every driver error as an error of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psycopg

from transports.postgres.connection import Connection, Parameters, Rows
from transports.postgres.error_mapping import mapped, translate
from transports.postgres.errors import DuplicateId, PlanOutdated, ReadOnly
from transports.postgres.statement import Statement
from unstract_core.errors import TransportRefused, TransportUnavailable

LARGEST_STATEMENT = 1_000_000_000
"""Bytes of parameters. Above 1 GiB the server closes the connection without an error."""
_LARGE = 4_000_000
"""Bytes in one statement or its rows above which a connection is not kept: libpq never releases a buffer."""
_SKIPPED_IDS = (0, 1, 8, 64, 512, 4096, 32768, 262144)
"""The number of ids to skip before each further attempt of a statement that failed because an id existed."""
_SKIP = b"""
    SELECT count(nextval(pg_get_serial_sequence(%(table)s, %(column)s))) FROM generate_series(1, %(number)s)
"""


def run(
    connection: Connection, operation: str, statement: Statement, parameters: Parameters, *, durable: bool = False
) -> Rows:
    """Run and commit one statement, and return its rows.

    Args:
        connection: the connection. It is closed if the statement may succeed on a new one.
        operation: the purpose of the statement, for the error's text.
        statement: the statement.
        parameters: its parameters.
        durable: whether the caller promises that the commit survives a failover. Default False.

    Raises:
        TransportError: every driver error, as `error_mapping` translates it.
        TransportUnavailable: also, with `fate_unknown`, if a durable commit was not replicated in time.
        TransportRefused: also if the parameters exceed the size that the server accepts.
    """
    size = check_size(operation, parameters)
    if type(connection) is psycopg.Connection:  # an application's own: its state is unknown, and it is not kept
        with mapped(operation):
            return statement.execute(connection, parameters)
    connection.large = connection.large or size > _LARGE
    commits = connection.commits
    commits.unreplicated = False
    for skipped in _SKIPPED_IDS:
        try:
            with connection.with_settings() if connection.missing_settings else contextlib.nullcontext():
                rows = statement.execute(connection, parameters)
            break
        except Exception as exc:
            if (ours := translate(exc, operation)) is None:
                raise
            if isinstance(ours, PlanOutdated | ReadOnly):
                connection.close()
            if not (isinstance(ours, DuplicateId) and connection.usable and skipped != _SKIPPED_IDS[-1]):
                raise ours from exc
            _skip_ids(connection, ours, skipped)
    connection.large = connection.large or _row_size(rows) > _LARGE
    if durable and commits.unreplicated:
        raise TransportUnavailable(
            f"{operation}: the statement took effect and was not replicated in time, because the synchronous standby "
            "did not answer",
            effect="a failover may lose it, so its fate is unknown",
            fate_unknown=True,
        )
    return rows


def check_size(operation: str, parameters: Parameters) -> int:
    """Return the number of characters in a statement's texts.

    Raises:
        TransportRefused: the server does not accept a statement of that size.
    """
    if isinstance(parameters, Mapping):
        texts: Sequence[str] = [text for value in parameters.values() for text in _texts(value)]
    else:
        texts = [text for text in parameters if isinstance(text, str)]
    size = sum(map(len, texts))
    if 4 * size > LARGEST_STATEMENT and (octets := sum(len(text.encode()) for text in texts)) > LARGEST_STATEMENT:
        raise TransportRefused(
            f"{operation}: {octets} bytes are more than PostgreSQL takes in one statement (1 GiB)",
            effect="nothing was sent",
            remedy="Send fewer or smaller messages at once",
        )
    return size


def _skip_ids(connection: Connection, duplicate: DuplicateId, number: int) -> None:
    """Advance the sequence of an id by `number`. If that fails, the next attempt does it."""
    if number:
        parameters = {"table": duplicate.table, "column": duplicate.column, "number": number}
        with contextlib.suppress(psycopg.Error):
            connection.execute(_SKIP, parameters)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return [text for text in value if isinstance(text, str)]
    return ()


def _row_size(rows: Rows) -> int:
    return sum(len(cell) for row in rows for cell in row if isinstance(cell, str))
