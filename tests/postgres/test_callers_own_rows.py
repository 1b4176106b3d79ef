"""send(within=...) beside a caller's own work: its unread rows, its kind of cursor, its transaction or lack of one."""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg
import psycopg2
import pytest
from pg_tables import Tables
from postgres.callers import CALLERS, Open

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import ConfigurationError


@pytest.fixture(params=list(CALLERS.values()), ids=list(CALLERS))
def caller(request: pytest.FixtureRequest) -> Open:
    opened: Open = request.param
    return opened


def test_rows_that_the_caller_has_not_read_yet_stay_to_be_read(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open
) -> None:
    """A message sent for each row of the caller's own cursor is sent for each, and not for the first alone."""
    with caller(tables.url) as open_:
        open_.cursor.execute("SELECT 'Ada' AS name FROM generate_series(1, 5)")
        for _ in iter(open_.cursor.fetchone, None):
            postgres.send([message("t", queue)], within=open_.cursor)
        open_.commit()
    assert tables.count(queue) == 5


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_server_side_cursor_will_do(postgres: PostgresTransport, tables: Tables, queue: str, driver: str) -> None:
    """A named cursor tells which transaction is meant, as any other does, and goes on where it was."""
    connect: Any = psycopg.connect if driver == "psycopg" else psycopg2.connect
    with contextlib.closing(connect(tables.url)) as connection:
        cursor = connection.cursor(name="mine")
        cursor.execute("SELECT * FROM generate_series(1, 5)")
        for _ in range(5):
            assert cursor.fetchone() is not None
            postgres.send([message("t", queue)], within=cursor)
        connection.commit()
    assert tables.count(queue) == 5


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connection_in_autocommit_is_refused_unless_a_transaction_is_open(
    postgres: PostgresTransport, tables: Tables, queue: str, driver: str
) -> None:
    """Nothing could belong to the caller's transaction where there is none: refused before anything is sent."""
    connect: Any = psycopg.connect if driver == "psycopg" else psycopg2.connect
    with contextlib.closing(connect(tables.url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        with pytest.raises(ConfigurationError, match="autocommit"):
            postgres.send([message("t", queue)], within=cursor)
        assert tables.count(queue) == 0
        cursor.execute("BEGIN")
        postgres.send([message("t", queue)], within=cursor)
        assert tables.count(queue) == 0
        cursor.execute("COMMIT")
    assert tables.count(queue) == 1


def test_a_transaction_block_in_autocommit_is_joined(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """psycopg's connection.transaction() opens one, whatever autocommit says."""
    with psycopg.connect(tables.url, autocommit=True) as connection, connection.cursor() as cursor:
        with connection.transaction(force_rollback=True):
            postgres.send([message("t", queue)], within=cursor)
        assert tables.count(queue) == 0
        with connection.transaction():
            postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 1


def test_an_asynchronous_cursor_is_refused(postgres: PostgresTransport) -> None:
    """It could not be waited for here; the error says so."""

    class Cursor:
        async def execute(self, *_: object) -> None:
            """Would send."""

        async def fetchall(self) -> list[Any]:
            return []

    with pytest.raises(ConfigurationError, match="asynchronous"):
        postgres.send([message("t", "q")], within=Cursor())


def test_a_pipeline_in_autocommit_is_refused_unless_a_transaction_is_open(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """A pipeline hides whether there is a transaction; what was asked before is waited for, and then it shows."""
    with psycopg.connect(tables.url, autocommit=True) as connection, connection.pipeline():
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        with pytest.raises(ConfigurationError, match="autocommit"):
            postgres.send([message("t", queue)], within=cursor)
        with connection.transaction():
            cursor.execute("SELECT 1")
            postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 1


def test_a_connection_that_is_streaming_is_refused(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """It could not be used before the stream is over; waiting for that would be for ever."""
    with psycopg.connect(tables.url) as connection:
        cursor = connection.cursor()
        for _ in cursor.stream("SELECT * FROM generate_series(1, 3)"):
            with pytest.raises(ConfigurationError, match="streaming"):
                postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 0
