"""Lost connections and unavailable servers: automatic recovery, errors, and effects that happen once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, in_background, named, on_one_server, transport_on
from queues import answer, queue_name
from servers import PrivateServer

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Dispatcher, Reply, TransportUnavailable

Make = Callable[..., PostgresTransport]


def test_killed_idle_connections_fail_no_send(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """The next send works at once, and sends once."""
    transport = make_named()
    transport.send([message("t", queue)])
    for sent in (2, 3, 4):
        assert tables.terminate(name) >= 1
        transport.send([message("t", queue)])
        assert tables.count(queue) == sent
    tables.terminate(name)
    assert transport.reply("nobody") is None


def test_dead_pool_connections_cause_no_wait(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """After the server has closed twenty idle connections, the next send does not try each of them."""
    transport = make_named(pool_size=20)
    sends = [lambda: transport.send([message("t", queue)])] * 20
    with tables.locked("LOCK TABLE {messages}") as lock, in_background(*sends):
        wait_until(lambda: sum(event == "Lock" for _, event, _ in tables.backends(name)) == 20, what="twenty sends")
        lock.rollback()
    assert tables.terminate(name) >= 20
    started = time.monotonic()
    transport.send([message("t", queue)])
    assert time.monotonic() - started < AT_ONCE


def test_send_on_killed_connection_has_unknown_fate(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """The statement was sent, so it is not repeated; the next send works."""
    transport = make_named()
    caught: list[TransportUnavailable] = []

    def send() -> None:
        with pytest.raises(TransportUnavailable, match="unknown") as error:
            transport.send([message("t", queue)])
        caught.append(error.value)

    for _ in range(2):
        with tables.locked("LOCK TABLE {messages}") as lock, in_background(send):
            tables.rows("SELECT pg_terminate_backend(%s, 5000)", tables.wait_for_lock(name))
            lock.rollback()
    assert [error.fate_unknown for error in caught] == [True, True]
    assert all(error.__cause__ is not None for error in caught)
    assert tables.count(queue) == 0
    transport.send([message("t", queue)])
    assert tables.count(queue) == 1


@on_one_server
@pytest.mark.parametrize("listen", [True, False])
def test_waiting_caller_survives_killed_connections(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, listen: bool
) -> None:
    """A blocked `reply` survives the loss of its waiting connection and of every pool connection."""
    waiter, worker = make_named(listen=listen, poll_interval=0.3), make_postgres()
    key = queue_name()
    replies: list[Reply | None] = []
    with in_background(lambda: replies.append(waiter.reply(key, timeout=10))):
        wait_until(lambda: len(tables.backends(name)) >= 2, what="the caller to wait")
        time.sleep(0.05)
        assert tables.terminate(name) >= 2
        answer(worker, Reply(key, "completed", result="here"))
    assert replies == [Reply(key, "completed", result="here")]


@on_one_server
def test_idle_consumer_reconnects_and_listens(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, queue: str
) -> None:
    """After each kill of its connection the next dispatch runs at once; polling would be too slow here."""
    consumer_side, producer = make_named(poll_interval=LONG_POLL), make_postgres()
    ran = threading.Semaphore(0)
    with running(Consumer(consumer_side, {"t": lambda: ran.release()}, [queue])):
        for _ in range(3):
            time.sleep(0.1)
            tables.terminate(name)
            sent = time.monotonic()
            producer.send([message("t", queue)])
            assert ran.acquire(timeout=30)
            assert time.monotonic() - sent < AT_ONCE


def test_task_runs_once_despite_lost_connection(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, queue: str
) -> None:
    """The task is settled, with its follow-up, over the next connection."""
    consumer_side, producer = make_named(), make_postgres()
    ran: list[int] = []
    started, finish = threading.Event(), threading.Event()

    def task() -> None:
        ran.append(1)
        started.set()
        finish.wait(60)

    producer.send([message("t", queue, on_success=then("done", queue + "-cb"))])
    with running(Consumer(consumer_side, {"t": task}, [queue], lease=3)):
        assert started.wait(30)
        tables.terminate(name)
        finish.set()
        wait_until(lambda: tables.count(queue) == 0, what="the settlement")
    assert tables.count(queue + "-cb") == 1
    assert ran == [1]


def test_settlement_on_killed_connection_takes_effect_once(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, queue: str
) -> None:
    """The consumer settles again, behind the fence: one follow-up, one run, no lost lease."""
    consumer_side, producer = make_named(), make_postgres()
    ran: list[int] = []
    consumer = Consumer(consumer_side, {"t": lambda: ran.append(1)}, [queue], lease=5)
    with running(consumer), tables.locked("LOCK TABLE {results} IN EXCLUSIVE MODE") as lock:
        producer.send([message("t", queue, task_id=queue, on_success=then("done", queue + "-cb"))])
        tables.rows("SELECT pg_terminate_backend(%s, 5000)", tables.wait_for_lock(name))
        lock.rollback()
        wait_until(lambda: tables.count(queue) == 0, what="the settlement")
    assert (ran, tables.count(queue + "-cb")) == ([1], 1)
    assert consumer.counters["lost"] == 0


@on_one_server
def test_repeated_kills_lose_and_double_nothing(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, queue: str
) -> None:
    """After twenty kills at random moments, every message has exactly one follow-up."""
    consumer_side, producer = make_named(), make_postgres()
    over = threading.Event()
    producer.send([message("t", queue, n, on_success=then("done", queue + "-cb")) for n in range(400)])

    def kill() -> None:
        for _ in range(20):
            if over.wait(0.03):
                return
            tables.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", name)

    def task(number: int) -> int:
        time.sleep(0.001)
        return number

    with running(Consumer(consumer_side, {"t": task}, [queue], lease=1.0)):
        try:
            with in_background(kill):
                pass
            wait_until(lambda: tables.count(queue) == 0, timeout=60, what="every message to be settled")
        finally:
            over.set()
    chained = tables.rows("SELECT message -> 'args' ->> 0 FROM {messages} WHERE queue_name = %s", queue + "-cb")
    assert sorted(int(row[0]) for row in chained) == list(range(400))


@pytest.fixture
def away(private: PrivateServer, name: str) -> Iterator[tuple[PostgresTransport, Tables]]:
    """A transport, and its tables, on the server that goes away; nothing but new connections is to be relied on."""
    with (
        servers.fresh_schema(private.url) as schema,
        transport_on(named(private.url, name), schema, timeout=30.0) as transport,
    ):
        transport.migrate()
        yield transport, Tables(private.url, schema)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_all_roles_recover_after_a_restart(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str, mode: str
) -> None:
    """After an orderly restart and after a crash, earlier messages run, callers get replies, and sends work."""
    transport, tables = away
    ran: list[str] = []
    go = threading.Event()

    def held(key: str) -> str:
        go.wait(60)
        ran.append(key)
        return key

    replies: list[Any] = []
    consumer = Consumer(transport, {"t": lambda: ran.append("sent"), "held": held}, [queue], concurrency=2, lease=5)
    with running(consumer):
        call = Dispatcher(transport)
        with in_background(lambda: replies.append(call.call("held", args=["called"], queue=queue, timeout=60))):
            wait_until(lambda: transport.queues([queue])[0].in_flight == 1, what="the call to be taken")
            private.stop(mode)
            private.start()
            go.set()
        transport.send([message("t", queue)])
        wait_until(lambda: tables.count(queue) == 0, what="the queue to be empty")
    assert replies == ["called"]
    assert sorted(ran) == ["called", "sent"]


def test_task_finished_in_outage_is_settled_later(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str
) -> None:
    """Without a server for three seconds, the task runs once, and its follow-up is sent."""
    transport, tables = away
    ran: list[int] = []
    started, finish, finished = threading.Event(), threading.Event(), threading.Event()

    def task() -> str:
        ran.append(1)
        started.set()
        finish.wait(60)
        finished.set()
        return "paid"

    consumer = Consumer(transport, {"t": task}, [queue], lease=10)
    transport.send([message("t", queue, task_id=queue, on_success=then("done", queue + "-cb"))])
    with running(consumer):
        assert started.wait(30)
        private.stop("fast")
        finish.set()
        assert finished.wait(30)
        time.sleep(3)
        private.start()
        wait_until(lambda: tables.count(queue) == 0, what="the settlement")
    assert ran == [1]
    assert tables.count(queue + "-cb") == 1
    assert consumer.counters["settled"] == 1


@pytest.mark.parametrize("used", [True, False], ids=["used before", "never used"])
def test_dispatch_in_outage_fails_with_known_fate(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str, used: bool
) -> None:
    """TransportUnavailable within the timeout; once the server is back the same transport sends."""
    _, tables = away
    with transport_on(private.url, tables.schema, timeout=2.0) as transport:
        if used:
            transport.send([message("t", queue)])
        private.stop("fast")
        try:
            started = time.monotonic()
            with pytest.raises(TransportUnavailable, match="nothing was done") as caught:
                transport.send([message("t", queue)])
            assert time.monotonic() - started < 2.0 + 6
            assert not caught.value.fate_unknown
            assert caught.value.__cause__ is not None
        finally:
            private.start()
        transport.send([message("t", queue)])
        assert tables.count(queue) == 1 + used


def test_send_waits_out_a_short_outage(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str
) -> None:
    """A restart that takes less than the timeout fails no send: no statement was sent, so the caller waits."""
    transport, tables = away
    transport.send([message("t", queue)])
    private.stop("fast")
    with in_background(private.start):
        transport.send([message("t", queue)])
    assert tables.count(queue) == 2


def test_commit_without_answer_is_not_repeated(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str
) -> None:
    """The server falls silent during the statement and dies: the fate is unknown, and no row exists twice."""
    transport, tables = away
    transport.send([message("t", queue)])
    caught: list[TransportUnavailable] = []

    def send() -> None:
        with pytest.raises(TransportUnavailable) as error:
            transport.send([message("t", queue, "doubtful")])
        caught.append(error.value)

    private.freeze()
    try:
        with in_background(send):
            time.sleep(1.0)
            private.kill()
    finally:
        private.start()
    assert caught[0].fate_unknown
    assert "unknown" in str(caught[0])
    assert tables.count(queue) in (1, 2)
    transport.send([message("t", queue)])
    assert tables.count(queue) in (2, 3)


def test_consumer_survives_a_frozen_server(
    private: PrivateServer, away: tuple[PostgresTransport, Tables], queue: str
) -> None:
    """After a freeze for longer than a lease, running tasks are settled, and later messages run."""
    transport, tables = away
    ran: list[int] = []
    with running(Consumer(transport, {"t": ran.append}, [queue], lease=0.6)):
        transport.send([message("t", queue, 1)])
        wait_until(lambda: ran == [1], what="the first")
        private.freeze()
        time.sleep(1.0)
        private.thaw()
        transport.send([message("t", queue, 2)])
        wait_until(lambda: tables.count(queue) == 0, what="the queue to be empty")
    assert ran == [1, 2]
