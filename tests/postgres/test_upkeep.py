"""Background work (notifications, purging) and its failures never stop other work."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.support import LONG_POLL, ShiftedClock, in_background, on_one_server, transport_on

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, TransportNotReady

Make = Callable[..., PostgresTransport]


@pytest.fixture(scope="module")
def narrow() -> Iterator[str]:
    """A server whose queue of notifications is as short as can be."""
    with servers.private_server(options="-c fsync=off -c max_notify_queue_pages=64") as server:
        yield server.url


@contextlib.contextmanager
def full_notify_queue(url: str) -> Iterator[None]:
    """Let a session listen and never read, idle in its transaction, until nothing more can be announced."""
    with psycopg.connect(url, autocommit=True) as listener, psycopg.connect(url, autocommit=True) as notifier:
        listener.execute("LISTEN forgotten")
        listener.execute("BEGIN")
        listener.execute("SELECT 1")
        with contextlib.suppress(psycopg.errors.ProgramLimitExceeded):
            while True:
                notifier.execute("SELECT pg_notify('x', repeat('x', 7000) || n) FROM generate_series(1, 20) AS n")
        yield
        listener.execute("ROLLBACK")


def test_full_notify_queue_stops_only_notifications(narrow: str, queue: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sends, settlements and replays succeed without notifications; no result is refused."""
    transport = PostgresTransport(narrow)
    transport.migrate()
    with contextlib.closing(transport), full_notify_queue(narrow), caplog.at_level(logging.WARNING):
        ids = transport.send([message("t", queue, reply_key=queue), message("t", queue, on_success=then("t", queue))])
        assert len(ids) == 2
        transport._notifier._paused_until = 0.0
        consumer = Consumer(transport, {"t": lambda *_: "paid", "bad": lambda: 1 / 0}, [queue], max_attempts=1)
        assert consumer.drain(timeout=20) == 3
        reply = transport.reply(queue)
        assert reply is not None
        assert reply.result == "paid"
        transport.send([message("bad", queue)])
        assert consumer.drain(timeout=20) == 1
        transport._notifier._paused_until = 0.0
        assert len(transport.dead.replay(queue=queue)) == 1
        transport.send([message("t", queue)])
        transport.send([message("t", queue)])
    assert consumer.counters["refused"] == 0
    assert any("notify_queue_full" in text for text in caplog.messages)


@on_one_server
def test_failed_purge_stops_no_work(
    limited: tuple[str, str], tables: Tables, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A role that may not delete expired replies works on; each try logs one WARNING with the missing right."""
    conninfo, role = limited
    tables.execute(f"REVOKE DELETE ON {{results}} FROM {role}")
    clock = ShiftedClock()
    with transport_on(conninfo, tables.schema, clock=clock) as transport:
        subscription = transport.subscribe([queue], lease=60)
        for _ in range(3):
            clock.ahead += 61.0
            transport.send([message("t", queue)])
            assert len(subscription.receive(limit=1, wait=2)) == 1
        assert subscription.purger.due_at > clock()
        subscription.close()
    logged = [record for record in caplog.records if "sweep_failed" in record.getMessage()]
    assert len(logged) == 3
    assert "42501" in vars(logged[0])["wire.error"]


@on_one_server
@pytest.mark.parametrize(
    ("right", "table"), [("INSERT", "messages"), ("UPDATE", "messages"), ("DELETE", "messages"), ("INSERT", "dead")]
)
def test_worker_without_a_right_does_not_start(
    limited: tuple[str, str], tables: Tables, queue: str, right: str, table: str
) -> None:
    """Subscribe names the right and the table, before the first task runs."""
    conninfo, role = limited
    tables.execute(f"REVOKE {right} ON {{{table}}} FROM {role}")
    lacking = pytest.raises(TransportNotReady, match=r"denied for table pg_queue_.*grant this role the right")
    with transport_on(conninfo, tables.schema) as transport, lacking:
        transport.subscribe([queue], lease=60)


@on_one_server
@pytest.mark.parametrize("sequence", ["pg_queue_message_msg_id_seq", "pg_queue_dead_letter_dead_id_seq"])
def test_worker_without_sequence_rights_does_not_start(
    limited: tuple[str, str], tables: Tables, queue: str, sequence: str
) -> None:
    """Rights on the tables without their sequences are detected at start."""
    conninfo, role = limited
    tables.execute(f"REVOKE USAGE ON SEQUENCE {{schema}}.{sequence} FROM {role}")
    lacking = pytest.raises(TransportNotReady, match=f"lacks USAGE on .*{sequence}")
    with transport_on(conninfo, tables.schema) as transport, lacking:
        transport.subscribe([queue], lease=60)


@on_one_server
def test_column_rights_are_enough(limited: tuple[str, str], tables: Tables, queue: str) -> None:
    """The rights are checked with the statements themselves, so any way to grant them counts."""
    conninfo, role = limited
    columns = "queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state"
    tables.execute(f"REVOKE INSERT ON {{messages}} FROM {role}")
    tables.execute(f"GRANT INSERT ({columns}) ON {{messages}} TO {role}")
    with transport_on(conninfo, tables.schema) as transport:
        transport.send([message("t", queue)])
        assert Consumer(transport, {"t": print}, [queue]).drain(timeout=30) == 1


def test_other_queues_traffic_wakes_no_worker(make_postgres: Make, queue: str, asked: list[str]) -> None:
    """Notifications for other queues of the schema cost an idle worker no statement."""
    producer, transport = make_postgres(), make_postgres(poll_interval=LONG_POLL)
    subscription = transport.subscribe([queue], lease=60)
    received: list[Any] = []
    asked.clear()
    with in_background(lambda: received.extend(subscription.receive(limit=1, wait=LONG_POLL))):
        for _ in range(30):
            producer.send([message("t", queue + "-other")])
            time.sleep(0.02)
        assert len(asked) <= 4
        producer.send([message("t", queue)])
    assert len(received) == 1
    subscription.close()


def test_dead_reply_waiter_is_replaced(make_postgres: Make, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers look again and start another thread; none waits to the end of its timeout."""
    transport, worker = make_postgres(poll_interval=LONG_POLL), make_postgres()
    died: list[int] = []
    tell = transport._waiter._wake_callers

    def die_once(answered: Any) -> None:
        if not died:
            died.append(1)
            raise ValueError
        tell(answered)

    monkeypatch.setattr(transport._waiter, "_wake_callers", die_once)
    replies: list[Any] = []
    with in_background(lambda: replies.append(transport.reply(queue, timeout=LONG_POLL))):
        wait_until(lambda: bool(died), what="the thread to die")
        worker.send([message("t", queue, reply_key=queue)])
        with running(Consumer(worker, {"t": lambda: "paid"}, [queue])):
            wait_until(lambda: bool(replies), what="the reply")
    assert replies[0].result == "paid"


@on_one_server
def test_queue_age_is_its_longest_wait(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The age of a message counts from the moment at which it could be claimed, without delays and leases."""
    first, second = postgres.send([message("t", queue), message("t", queue)])
    tables.execute("UPDATE {messages} SET enqueued_at = now() - interval '2 hours', vt = now()")
    assert (postgres.queues([queue])[0].oldest or -1) < 60
    tables.execute("UPDATE {messages} SET vt = now() - interval '1 hour' WHERE msg_id = %s", int(first))
    tables.execute("UPDATE {messages} SET vt = now() + interval '1 hour' WHERE msg_id = %s", int(second))
    assert 3600 <= (postgres.queues([queue])[0].oldest or -1) < 3660
    tables.execute("DELETE FROM {messages} WHERE msg_id = %s", int(first))
    assert postgres.queues([queue])[0].oldest == 0


@on_one_server
def test_many_expired_replies_are_purged_quickly(make_postgres: Make, tables: Tables, queue: str) -> None:
    """An idle worker with many expired replies goes on at once, and claims messages meanwhile."""
    clock = ShiftedClock()
    postgres = make_postgres(clock=clock)
    tables.execute(
        "INSERT INTO {results} (task_id, status, result, error, created_at, expires_at)"
        " SELECT 'k' || n, 'completed', NULL, '', now(), now() - n * interval '1 millisecond'"
        " FROM generate_series(1, 20000) AS n"
    )
    subscription = postgres.subscribe([queue], lease=60)
    clock.ahead += 61.0
    began = time.monotonic()
    while tables.rows("SELECT count(*) FROM {results}") != [(0,)]:
        assert time.monotonic() - began < 12, "20 statements that come once a second take longer"
        subscription.receive(limit=1, wait=0.5)
    postgres.send([message("t", queue)])
    assert len(subscription.receive(limit=1, wait=5)) == 1
    subscription.close()
