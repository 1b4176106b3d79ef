"""`send(within=cursor)`: a message belongs to its caller's transaction, with any driver."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from typing import Any

import attrs
import psycopg
import psycopg2
import pytest
from core.signatures import as_object, fields_of
from pg_tables import Tables
from postgres.callers import CALLERS, Open
from postgres.support import AT_ONCE, LONG_POLL, in_background

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import (
    ConfigurationError,
    Dispatcher,
    ExecutorDispatcher,
    PayloadError,
    RoutingDispatcher,
    TransportClosed,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)


@pytest.fixture(params=list(CALLERS.values()), ids=list(CALLERS))
def caller(request: pytest.FixtureRequest) -> Open:
    opened: Open = request.param
    return opened


@pytest.mark.parametrize("number", [1, 5], ids=["one", "many"])
def test_messages_commit_with_the_caller(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open, number: int
) -> None:
    """No other session sees the messages before the caller's commit; after it they have their ids, in order."""
    with caller(tables.url) as open_:
        ids = postgres.send([message("t", queue, n) for n in range(number)], within=open_.cursor)
        assert tables.count(queue) == 0
        open_.commit()
    stored = tables.rows("SELECT msg_id, message -> 'args' -> 0 FROM {messages} WHERE queue_name = %s", queue)
    assert [(int(id), n) for n, id in enumerate(ids)] == sorted(stored)


@pytest.mark.parametrize("number", [1, 5], ids=["one", "many"])
def test_messages_vanish_with_the_callers_rollback(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open, number: int
) -> None:
    """After the caller's rollback, no message was sent."""
    with caller(tables.url) as open_:
        postgres.send([message("t", queue, n) for n in range(number)], within=open_.cursor)
        open_.rollback()
    assert tables.count(queue) == 0


@attrs.frozen
class Context:
    """An execution context as the product builds it."""

    executor_name: str
    organization_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


@pytest.mark.parametrize("routed", [False, True], ids=["alone", "behind a gate"])
def test_executor_methods_join_the_callers_transaction(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open, routed: bool
) -> None:
    """dispatch_async and dispatch_with_callback commit and vanish with the caller's work, also through a router."""
    executor = ExecutorDispatcher(Dispatcher(postgres))
    side = RoutingDispatcher(gate=lambda _: True, on=executor, off=executor) if routed else executor
    callback = as_object(fields_of(options={"queue": queue}))
    context = Context(queue)
    with caller(tables.url) as open_:
        sent = side.dispatch_async(context, within=open_.cursor)
        handle = side.dispatch_with_callback(context, on_success=callback, within=open_.cursor)
        assert tables.count(f"celery_executor_{queue}") == 0
        open_.commit()
        side.dispatch_async(context, within=open_.cursor)
        side.dispatch_with_callback(context, on_success=callback, within=open_.cursor)
        open_.rollback()
    stored = tables.rows("SELECT message ->> 'task_id' FROM {messages} ORDER BY msg_id")
    assert stored == [(sent,), (handle.id,)]


def test_callers_cursor_stays_unchanged(tables: Tables, postgres: PostgresTransport, queue: str, caller: Open) -> None:
    """The caller continues in the same transaction, and gets its rows with its own row factory."""
    with caller(tables.url) as open_:
        cursor = open_.cursor
        cursor.execute("SELECT 'Ada' AS name")
        before = cursor.fetchall()
        postgres.send([message("t", queue)], within=cursor)
        cursor.execute("SELECT 'Ada' AS name")
        assert cursor.fetchall() == before
        open_.commit()
    assert tables.count(queue) == 1


def test_callers_commit_wakes_a_waiting_consumer(make_postgres: Any, tables: Tables, queue: str, caller: Open) -> None:
    """A committed message reaches a waiting consumer at once, and never before the commit."""
    transport = make_postgres(poll_interval=LONG_POLL)
    subscription = transport.subscribe([queue], lease=60)
    waiting, received, came = threading.Event(), [], []

    def receive() -> None:
        waiting.set()
        received.extend(subscription.receive(limit=10, wait=10))
        came.append(time.monotonic())

    with in_background(receive):
        waiting.wait(5)
        with caller(tables.url) as open_:
            transport.send([message("t", queue)], within=open_.cursor)
            assert not received
            committed = time.monotonic()
            open_.commit()
    assert len(received) == 1
    assert 0 < came[0] - committed < AT_ONCE
    subscription.close()


def test_error_within_has_the_drivers_as_cause(postgres_url: str, tables: Tables, queue: str, caller: Open) -> None:
    """Missing tables raise TransportNotReady with the remedy, caused by the error of the caller's driver."""
    transport = PostgresTransport(postgres_url, tables.schema)
    with caller(tables.url) as open_, pytest.raises(TransportNotReady, match="unstract-wire migrate") as caught:
        transport.send([message("t", queue)], within=open_.cursor)
    assert isinstance(caught.value.__cause__, psycopg.Error | psycopg2.Error)


def test_rejected_message_within_is_refused(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open
) -> None:
    """A message that the database rejects raises TransportRefused, and the caller's transaction fails."""
    tables.execute("ALTER TABLE {messages} ADD CHECK (org_id <> 'blocked')")
    with caller(tables.url) as open_, pytest.raises(TransportRefused) as caught:
        postgres.send([message("t", queue, org_id="blocked")], within=open_.cursor)
    assert isinstance(caught.value.__cause__, psycopg.Error | psycopg2.Error)
    assert tables.count(queue) == 0


def test_connection_lost_within_commits_nothing(
    postgres: PostgresTransport, tables: Tables, queue: str, caller: Open
) -> None:
    """The caller's transaction was not committed, so the fate is known: nothing was sent."""
    with caller(tables.url) as open_:
        tables.rows("SELECT pg_terminate_backend(%s, 5000)", open_.pid)
        with pytest.raises(TransportUnavailable, match="nothing was committed") as caught:
            postgres.send([message("t", queue)], within=open_.cursor)
    assert not caught.value.fate_unknown
    assert isinstance(caught.value.__cause__, psycopg.Error | psycopg2.Error)
    assert tables.count(queue) == 0


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_django_messages_follow_their_atomic_block(
    postgres: PostgresTransport, tables: Tables, queue: str, driver: str
) -> None:
    """`transaction.atomic()` commits, rolls back and rolls back to a savepoint, on either driver of Django."""
    command = [sys.executable, "-m", "postgres.django_caller", driver, tables.url, tables.schema, queue]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    sent = json.loads(ended.stdout)
    stored = tables.rows(
        "SELECT msg_id::text, message -> 'args' FROM {messages} WHERE queue_name = %s ORDER BY msg_id", queue
    )
    assert sent["seen before the commit"] == 0
    assert stored == [
        (sent["one"][0], ["one"]),
        *[(sent["many"][n], ["many", n]) for n in range(3)],
        (sent["outer"][0], ["outer"]),
    ]
    assert "autocommit" in sent["autocommit"][0]
    assert "closed" in sent["stale"][0]
    assert sent["not ready"][:2] == ["ProgrammingError", "django.db.utils"]
    assert "unstract-wire migrate" in sent["not ready"][2]
    assert sent["lost"] == ["TransportUnavailable", False, "django.db.utils"]


def test_foreign_cursor_is_refused(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """An argument that is no open cursor of a PostgreSQL driver raises ConfigurationError."""
    with psycopg.connect(tables.url) as connection, sqlite3.connect(":memory:") as other:
        for thing in (object(), "cursor", connection, other.cursor(), tables):
            with pytest.raises(ConfigurationError, match="cursor"):
                postgres.send([message("t", queue)], within=thing)
        connection.commit()
    assert tables.count(queue) == 0


def test_closed_cursor_is_refused(postgres: PostgresTransport, tables: Tables, queue: str, caller: Open) -> None:
    """A closed cursor raises an error of this package."""
    with caller(tables.url) as open_:
        open_.cursor.close()
        with pytest.raises(ConfigurationError, match="closed"):
            postgres.send([message("t", queue)], within=open_.cursor)


def test_invalid_message_keeps_the_callers_transaction(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A message that the wire refuses is refused before the caller's cursor is used."""
    with psycopg.connect(tables.url) as connection, connection.cursor() as cursor:
        with pytest.raises(PayloadError):
            postgres.send([message("t", queue), message("t", queue, float("nan"))], within=cursor)
        postgres.send([message("t", queue, "fine")], within=cursor)
    assert tables.count(queue) == 1


def test_closed_transport_refuses_send_within(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A closed transport raises TransportClosed for a caller's cursor as well."""
    postgres.close()
    with psycopg.connect(tables.url) as connection, pytest.raises(TransportClosed):
        postgres.send([message("t", queue)], within=connection.cursor())


def test_delay_within_counts_from_the_send(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A transaction that is open for longer than the delay does not make the message ready at its commit."""
    with psycopg.connect(tables.url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.3)")
        postgres.send([message("t", queue, delay=0.2)], within=cursor)
        (row,) = cursor.execute(
            tables.sql("SELECT vt > clock_timestamp() FROM {messages} WHERE queue_name = %s"), (queue,)
        ).fetchall()
    assert row[0] is True
