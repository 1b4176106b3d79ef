"""NOTIFY in a caller's transaction is a hint, and never fails the caller's work."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import servers
from pg_tables import Tables
from postgres.support import transport_on
from psycopg import errors

from contract_tests.messages import message
from transports.postgres import from_url


@pytest.fixture(scope="module")
def small_queue() -> Iterator[str]:
    """A server whose queue of notifications holds half a megabyte, and which prepares transactions."""
    options = "-c max_notify_queue_pages=64 -c max_prepared_transactions=5 -c fsync=off"
    with servers.private_server(options=options) as server:
        with transport_on(server.url, "unstract") as transport:
            transport.migrate()
        yield server.url


def fill(url: str) -> None:
    """Notify until the server's queue is full; some session must listen and be in a transaction."""
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            try:
                connection.execute("SELECT pg_notify('other', repeat('x', 7000) || n) FROM generate_series(1, 8) AS n")
            except errors.ProgramLimitExceeded:
                return


def test_full_notification_queue_fails_no_commit(small_queue: str, queue: str) -> None:
    """The message is sent without a notification, and the caller's transaction commits."""
    with psycopg.connect(small_queue, autocommit=True) as listener, transport_on(small_queue, "unstract") as transport:
        listener.execute("LISTEN other")
        listener.execute("BEGIN")
        fill(small_queue)
        with psycopg.connect(small_queue) as caller:
            transport.send([message("t", queue), message("t", queue)], within=caller.cursor())
            caller.commit()
        assert len(transport.send([message("t", queue)])) == 1
    assert Tables(small_queue, "unstract").count(queue) == 3


@pytest.mark.parametrize("option", ["listen=false", "notify_within=false", "notify_within=true", "listen=true"])
def test_transaction_without_notification_can_be_prepared(small_queue: str, queue: str, option: str) -> None:
    """With `listen=false` or `notify_within=false` a caller may prepare the transaction of its sends."""
    transport = from_url(f"{small_queue}?{option}")
    with psycopg.connect(small_queue) as caller:
        transport.send([message("t", queue), message("t", queue)], within=caller.cursor())
        prepare = psycopg.sql.SQL("PREPARE TRANSACTION {}").format(psycopg.sql.Literal(queue))
        if "true" in option:
            with pytest.raises(errors.FeatureNotSupported):
                caller.execute(prepare)
            return
        caller.execute(prepare)
        caller.commit()
    with psycopg.connect(small_queue, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("COMMIT PREPARED {}").format(psycopg.sql.Literal(queue)))
    assert Tables(small_queue, "unstract").count(queue) == 2
    transport.close()
