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


def test_unread_rows_of_the_caller_remain(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open
) -> None:
    """A caller that sends a message for each row of its own cursor reads all of its rows."""
    with caller(tables.url) as open_:
        open_.cursor.execute("SELECT 'Ada' AS name FROM generate_series(1, 5)")
        for _ in iter(open_.cursor.fetchone, None):
            postgres.send([message("t", queue)], within=open_.cursor)
        open_.commit()
    assert tables.count(queue) == 5


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_server_side_cursor_is_accepted(postgres: PostgresTransport, tables: Tables, queue: str, driver: str) -> None:
    """A named cursor identifies the transaction as any other does, and continues where it was."""
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
def test_autocommit_without_transaction_is_refused(
    postgres: PostgresTransport, tables: Tables, queue: str, driver: str
) -> None:
    """Without a caller's transaction, the send is refused before a message is written."""
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


def test_transaction_block_in_autocommit_is_joined(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """psycopg's connection.transaction() opens a transaction, also in autocommit."""
    with psycopg.connect(tables.url, autocommit=True) as connection, connection.cursor() as cursor:
        with connection.transaction(force_rollback=True):
            postgres.send([message("t", queue)], within=cursor)
        assert tables.count(queue) == 0
        with connection.transaction():
            postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 1


def test_asynchronous_cursor_is_refused(postgres: PostgresTransport) -> None:
    """The error says that the cursor must be synchronous."""

    class Cursor:
        async def execute(self, *_: object) -> None:
            """Would send."""

        async def fetchall(self) -> list[Any]:
            return []

    with pytest.raises(ConfigurationError, match="asynchronous"):
        postgres.send([message("t", "q")], within=Cursor())


def test_autocommit_pipeline_without_transaction_is_refused(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """A pipeline hides whether a transaction is open, so the pending statements are awaited first."""
    with psycopg.connect(tables.url, autocommit=True) as connection, connection.pipeline():
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        with pytest.raises(ConfigurationError, match="autocommit"):
            postgres.send([message("t", queue)], within=cursor)
        with connection.transaction():
            cursor.execute("SELECT 1")
            postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 1


def test_streaming_connection_is_refused(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A connection in the middle of a stream cannot run another statement; waiting for it would never end."""
    with psycopg.connect(tables.url) as connection:
        cursor = connection.cursor()
        for _ in cursor.stream("SELECT * FROM generate_series(1, 3)"):
            with pytest.raises(ConfigurationError, match="streaming"):
                postgres.send([message("t", queue)], within=cursor)
    assert tables.count(queue) == 0
