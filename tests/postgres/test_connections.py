"""The connections between transport and server: encodings, poolers, lost answers, and impossible addresses."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from consumers import running
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, application, in_background, on_one_server
from proxy import Proxy, proxy
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from queues import queue_name
from servers import PrivateServer

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport, from_url
from transports.postgres.statement import Statement
from unstract_core import (
    ConfigurationError,
    Consumer,
    Delivery,
    Dispatcher,
    Reply,
    Settlement,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)

Make = Callable[..., PostgresTransport]


@pytest.fixture
def between(postgres_url: str) -> Iterator[Proxy]:
    parts = conninfo_to_dict(postgres_url)
    with proxy(str(parts["host"]), int(str(parts["port"]))) as made:
        yield made


@pytest.fixture
def through(between: Proxy, postgres_url: str, schema: str) -> Iterator[Make]:
    """A factory of transports that connect through the proxy."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> PostgresTransport:
            transport = PostgresTransport(make_conninfo(postgres_url, port=between.port), schema, **options)
            stack.enter_context(contextlib.closing(transport))
            transport.migrate()
            return transport

        yield make


# Lost answers


@pytest.mark.parametrize("lost", [b"SELECT status, result", b"SET result = NULL"], ids=["reading", "clearing"])
def test_caller_gets_reply_despite_lost_answer(
    through: Make, between: Proxy, postgres: PostgresTransport, queue: str, lost: bytes
) -> None:
    """Reading is repeated after a lost answer; clearing comes later, and its failure loses nothing."""
    caller = through()
    with running(Consumer(postgres, {"t": lambda: "paid"}, [queue])):
        between.lose_the_answer_to(lost)
        assert Dispatcher(caller).call("t", queue=queue, timeout=10) == "paid"
    assert between.has_lost


@pytest.mark.parametrize("many", [1, 3])
def test_send_without_answer_has_unknown_fate(
    through: Make, between: Proxy, tables: Tables, queue: str, many: int
) -> None:
    """A send whose answer is lost is not repeated; the error says that it may have taken effect."""
    transport = through()
    between.lose_the_answer_to(b"INSERT INTO")
    with pytest.raises(TransportUnavailable, match="unknown") as caught:
        transport.send([message("t", queue)] * many)
    assert caught.value.fate_unknown
    assert tables.count(queue) == many


def test_settlement_without_answer_takes_effect_once(through: Make, between: Proxy, tables: Tables, queue: str) -> None:
    """The settlement is repeated, and the fence prevents a second follow-up."""
    transport = through()
    transport.send([message("t", queue, task_id=queue, on_success=then("done", queue + "-cb"))])
    consumer = Consumer(transport, {"t": lambda: between.lose_the_answer_to(b"removed AS")}, [queue])
    assert consumer.drain(timeout=10) == 1
    assert between.has_lost
    assert tables.count(queue + "-cb") == 1
    assert consumer.counters["lost"] == 0


# Prepared statements behind a pooler


def test_lost_prepared_statements_cause_no_failure(make_named: Make, tables: Tables, name: str) -> None:
    """After a pooler lost them (here DEALLOCATE ALL), the transport prepares no more; nothing fails."""
    transport, queue = make_named(), queue_name()
    subscription = transport.subscribe([queue], lease=60)

    def once(n: int) -> None:
        transport.send([message("t", queue, n)])
        (held,) = subscription.receive(limit=1, wait=5)
        assert subscription.renew([held]) == [True]
        reply = Reply(f"{queue}-{n}", "completed", result=n)
        assert subscription.settle([Settlement(held, Verdict.ACK, reply=reply)]) == [True]
        assert transport.reply(reply.key, consume=True) == reply

    def connections() -> list[Any]:
        time.sleep(0.1)  # until nothing is announced any more, for which one of them would be used
        return [*transport._pool._idle, subscription._listener.connect()]

    def prepared() -> int:
        rows = [
            connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() for connection in connections()
        ]
        return sum(count for (count,) in rows)

    for n in range(10):
        once(n)
    assert prepared() > 2
    for connection in connections():
        connection.pgconn.exec_(b"DEALLOCATE ALL")  # which psycopg would notice in an execute of its own
    for n in range(10, 20):
        once(n)
    assert prepared() == 0
    subscription.close()


def test_pooler_is_detected(
    through: Make, between: Proxy, postgres: PostgresTransport, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler shows a process id of its own; the transport then polls, prepares nothing, and logs one WARNING."""
    between.hide_the_process = True
    transport = through(poll_interval=0.2)
    subscription = transport.subscribe([queue], lease=60)
    for n in range(10):
        postgres.send([message("t", queue, n)])
        (held,) = subscription.receive(limit=1, wait=5)
        assert subscription.settle([Settlement(held, Verdict.ACK)]) == [True]
        transport.reply("nobody")
    connection = subscription._listener.connect()
    assert connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM pg_listening_channels()").fetchone() == (0,)
    subscription.close()
    assert [text for text in caplog.messages if "pooler_found" in text] == ["wire.pooler_found"] * len(caplog.messages)


# Servers that do not answer


def test_silent_server_ends_at_the_timeout(private: PrivateServer, queue: str) -> None:
    """A send ends after statement_timeout, and a reply with its own timeout. A send that reports "nothing was sent" has
    sent nothing.
    """
    transport = PostgresTransport(private.url, queue, statement_timeout=2.0, timeout=4.0)
    with contextlib.closing(transport):
        transport.migrate()
        transport.send([message("t", queue)])
        transport.send([message("t", queue)])
        private.freeze()
        try:
            began = time.monotonic()
            with pytest.raises(TransportUnavailable, match=r"unknown|nothing was (sent|done)") as caught:
                transport.send([message("t", queue)])
            assert caught.value.fate_unknown == ("unknown" in str(caught.value))
            assert time.monotonic() - began < 20
            began = time.monotonic()
            with pytest.raises(TransportUnavailable):
                transport.reply("k", timeout=1.0)
            assert time.monotonic() - began < 20
        finally:
            private.thaw()
        transport.send([message("t", queue)])
        (state,) = transport.queues([queue])
        assert state.ready in ({3, 4} if caught.value.fate_unknown else {3})


@on_one_server
def test_blocked_settlement_blocks_no_renewal(make_postgres: Make, tables: Tables, queue: str) -> None:
    """A lock on pg_task_result loses no running task its lease: nothing runs twice."""
    first, second = make_postgres(), make_postgres()
    ran: list[str] = []

    def long() -> None:
        ran.append("long")
        time.sleep(9)

    tasks: dict[str, Any] = {"long": long, "answered": lambda: ran.append("answered")}
    consumers = [Consumer(transport, tasks, [queue], lease=5, concurrency=2) for transport in (first, second)]
    with running(*consumers):
        with tables.locked("LOCK TABLE {results} IN SHARE MODE"):
            first.send([message("long", queue), message("answered", queue, reply_key=queue)])
            time.sleep(10)
        assert first.reply(queue, timeout=60) is not None
        wait_until(lambda: tables.count(queue) == 0, what="everything to be settled")
    assert sorted(ran) == ["answered", "long"]


@on_one_server
def test_slow_statements_lose_no_lease(through: Make, between: Proxy, make_postgres: Make, queue: str) -> None:
    """A renewal that is due comes before any other statement, so several slow statements lose no lease.

    The renewals of the far worker reach the server a second late, as does everything else that it asks. It prepares
    nothing: to prepare a statement is one more round trip, and both have to end within a quarter of the lease.
    """
    near, ran = make_postgres(), []

    def task(worker: str) -> None:
        ran.append(worker)
        time.sleep(10)

    far = Consumer(through(listen=False), {"t": lambda: task("far")}, [queue], lease=6, concurrency=2)
    near.send([message("t", queue)])
    with running(far):
        wait_until(lambda: ran == ["far"], what="the far worker to run it")
        between.latency = 1.0
        with running(Consumer(near, {"t": lambda: task("near")}, [queue], lease=6, concurrency=2)):
            wait_until(lambda: far.counters["settled"] == 1, timeout=30, what="the far worker to settle it")
        between.latency = 0.0
    assert ran == ["far"]


@on_one_server
@pytest.mark.parametrize("renewal", [0.0, 0.6])
def test_receive_ends_when_a_renewal_is_due(postgres: PostgresTransport, queue: str, renewal: float) -> None:
    """A due renewal comes before further statements, also after one that took more than a third of the lease."""
    postgres.send([message("t", queue)])
    subscription = postgres.subscribe([queue], lease=1.5)
    asked: list[str] = []
    execute = subscription._listener.execute

    def slowly(operation: str, statement: Statement, parameters: Any) -> Any:
        asked.append(operation)
        rows = execute(operation, statement, parameters)
        time.sleep(renewal if operation == "renew leases" else 0.6)
        return rows

    (first,) = subscription.receive(limit=1, wait=5)
    subscription._listener.execute = slowly  # type: ignore[method-assign]
    looked_for = []
    for _ in range(3):
        assert subscription.renew([first]) == [True]
        asked.clear()
        assert subscription.receive(limit=1, wait=5) == ()
        looked_for += asked
    assert len(looked_for) == 3
    assert "claim messages" in looked_for
    subscription.close()


@on_one_server
def test_forgotten_delivery_ends_no_receive(postgres: PostgresTransport, queue: str) -> None:
    """An idle worker waits, although it has claimed a message and forgotten it."""
    postgres.send([message("t", queue)])
    subscription = postgres.subscribe([queue], lease=0.6)
    assert len(subscription.receive(limit=1, wait=5)) == 1
    time.sleep(0.3)
    asked: list[str] = []
    execute = subscription._listener.execute

    def noted(operation: str, statement: Statement, parameters: Any) -> Any:
        asked.append(operation)
        return execute(operation, statement, parameters)

    subscription._listener.execute = noted  # type: ignore[method-assign]
    (again,) = subscription.receive(limit=1, wait=5)
    assert again.attempt == 2
    assert len(asked) < 20
    subscription.close()


@pytest.mark.parametrize("listen", [True, False])
def test_prepared_send_takes_any_size(make_postgres: Make, tables: Tables, queue: str, listen: bool) -> None:
    """The statement of single sends takes more data than a socket takes at once, prepared or not."""
    transport = make_postgres(listen=listen)
    transport.send([message("t", queue, "first")])
    for size in (1, 100_000, 20_000_000):
        transport.send([message("t", queue, "x" * size)])
    rows = tables.rows("SELECT length(message -> 'args' ->> 0) FROM {messages} WHERE queue_name = %s ORDER BY 1", queue)
    assert rows == [(1,), (5,), (100_000,), (20_000_000,)]


@on_one_server
def test_locked_row_loses_no_other_lease(make_postgres: Make, tables: Tables, queue: str) -> None:
    """If an administrator locks one message for longer than a lease, the other one is renewed and runs once."""
    first, second = make_postgres(), make_postgres()
    ran: list[int] = []

    def task(number: int) -> None:
        ran.append(number)
        time.sleep(9)

    first.send([message("t", queue, 0), message("t", queue, 1)])
    with running(Consumer(first, {"t": task}, [queue], lease=4, concurrency=2)):
        wait_until(lambda: sorted(ran) == [0, 1], what="both tasks to run")
        with running(Consumer(second, {"t": task}, [queue], lease=4, concurrency=2)):
            with tables.locked("SELECT * FROM {messages} WHERE message -> 'args' ->> 0 = '0' FOR UPDATE"):
                time.sleep(7)
            wait_until(lambda: tables.count(queue) == 0, what="both to be settled")
    assert ran.count(1) == 1  # the locked one's lease cannot be renewed, so any consumer may run it afterwards


@on_one_server
@pytest.mark.parametrize("prepared", [True, False])
def test_blocked_send_is_cancelled_with_known_fate(
    make_named: Make, tables: Tables, name: str, queue: str, prepared: bool
) -> None:
    """Nothing took effect, then or later, and no statement stays on the server."""
    transport = make_named(statement_timeout=1.0)
    transport.send([message("t", queue)])
    if prepared:
        transport.send([message("t", queue)])
    stored = tables.count(queue)
    with tables.locked("LOCK TABLE {messages} IN SHARE MODE"):
        for _ in range(3):
            transport._notifier._last[queue] = time.monotonic()
            with pytest.raises(TransportUnavailable, match="nothing took effect") as caught:
                transport.send([message("t", queue)])
            assert not caught.value.fate_unknown
        wait_until(lambda: not [pid for pid, event, _ in tables.backends(name) if event == "Lock"], timeout=30)
    time.sleep(0.3)
    assert tables.count(queue) == stored
    transport.send([message("t", queue)])


# Encodings


@pytest.fixture
def latin1(postgres_url: str, schema: str) -> Iterator[PostgresTransport]:
    """A database with an encoding that cannot hold all texts of the wire."""
    database = application().replace("-", "_")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'".encode())
        transport = PostgresTransport(make_conninfo(postgres_url, dbname=database), schema)
        transport.migrate()
        try:
            yield transport
        finally:
            transport.close()
            connection.execute(f"DROP DATABASE {database} WITH (FORCE)".encode())


def test_client_encoding_of_environment_is_ignored(
    make_postgres: Make, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any PGCLIENTENCODING, every text is sent and received unchanged."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    transport = make_postgres()
    transport.send([message("t", queue, "5 \u20ac", reply_key=queue)])
    assert Consumer(transport, {"t": lambda text: text + " \U0001f600"}, [queue]).drain(timeout=10) == 1
    reply = transport.reply(queue)
    assert reply is not None
    assert reply.result == "5 \u20ac \U0001f600"


@on_one_server
def test_unencodable_text_is_refused_without_stopping_consumers(latin1: PostgresTransport) -> None:
    """A dispatch is refused with the reason. For a result, the sender gets an error and others go on."""
    with pytest.raises(TransportRefused, match="UTF8"):
        latin1.send([message("t", "q", "5 \u20ac")])
    latin1.send([message("euro", "q", reply_key="k"), message("plain", "q", reply_key="p")])
    tasks = {"euro": lambda: "5 \u20ac", "plain": lambda: "\u00e9"}
    assert Consumer(latin1, tasks, ["q"]).drain(timeout=10) == 2
    euro, plain = latin1.reply("k"), latin1.reply("p")
    assert euro is not None
    assert plain is not None
    assert euro.status == "failed"
    assert euro.error.startswith("result delivery failed: TransportRefused: settle:")
    assert plain.result == "\u00e9"


# Addresses and options

CANNOT_WORK = {
    "an empty label": ("postgresql://postgres:s3cret@a..b/db", "label"),
    "no number": ("postgresql://postgres:s3cret@127.0.0.1/db?connect_timeout=soon", "connect_timeout"),
    "@ in the password": ("postgresql://postgres:p@s3cret@127.0.0.1/db", "%40"),
    "? in the password": ("postgresql://postgres:p/?s3cret@127.0.0.1/db", "unknown option that is no name"),
}


@pytest.mark.parametrize("name", CANNOT_WORK)
def test_impossible_address_is_a_configuration_error(name: str) -> None:
    """The error says what is wrong, and contains no password."""
    url, said = CANNOT_WORK[name]

    def use() -> None:
        from_url(url).send([message("t", "q")])

    with pytest.raises(ConfigurationError, match=said) as caught:
        use()
    assert "s3cret" not in str(caught.value)


def test_libpq_environment_wins_over_defaults(monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
    """PGAPPNAME, PGCONNECT_TIMEOUT and a service file win over the defaults of this package."""
    monkeypatch.setenv("PGAPPNAME", "my-app")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
    connector = PostgresTransport(postgres_url)._connector
    assert connector._connect_timeout == 3
    connection = connector.connect()
    assert connection.execute("SHOW application_name").fetchone() == ("my-app",)
    connection.close()
    assert "keepalives" not in PostgresTransport("service=mine")._connector.conninfo


def test_unknown_option_is_named() -> None:
    """The error names a misspelled option of this package."""
    with pytest.raises(ConfigurationError, match="'shema' in the PostgreSQL URL; use schema, listen"):
        from_url("postgresql://postgres@127.0.0.1/db?shema=x")


@pytest.mark.parametrize(
    ("url", "option", "value"),
    [
        ("postgresql://u@h/d?password=Ab%2Bc+d", "password", "Ab+c+d"),
        ("postgresql://u@h/d?sslrootcert=/etc/c++/ca.pem&schema=s", "sslrootcert", "/etc/c++/ca.pem"),
        ("postgresql://u:p?w@h/d?schema=s", "password", "p?w"),
        ("postgresql://u@h/d?listen=false&application_name=a%26b&poll_interval=2", "application_name", "a&b"),
        ("postgresql:///d?host=/var/run&timeout=3", "host", "/var/run"),
    ],
)
def test_libpq_options_are_passed_unchanged(url: str, option: str, value: str) -> None:
    """Options of libpq reach it byte for byte, with plus signs and question marks."""
    assert conninfo_to_dict(from_url(url)._connector.conninfo)[option] == value


@pytest.mark.parametrize("option", ["poll_interval", "timeout", "pool_size", "statement_timeout"])
@pytest.mark.parametrize("number", [0, -1, float("inf"), float("nan"), 1e13])
def test_invalid_numbers_are_refused_by_name(option: str, number: float) -> None:
    """The error names a number that no clock or pool can have."""
    with pytest.raises(ConfigurationError, match=option):
        PostgresTransport("postgresql://postgres@127.0.0.1/db", **{option: number})  # type: ignore[arg-type]


@pytest.mark.parametrize("lease", [0, -1, float("inf"), float("nan"), 1e13])
def test_impossible_lease_is_refused_at_once(postgres: PostgresTransport, queue: str, lease: float) -> None:
    """The subscription is refused, not the first claim."""
    with pytest.raises(ConfigurationError, match="lease"):
        postgres.subscribe([queue], lease=lease)


def test_endless_wait_ends_with_a_message(make_postgres: Make, queue: str) -> None:
    """receive(wait=inf) waits until there is a message."""
    transport = make_postgres(poll_interval=LONG_POLL)
    subscription = transport.subscribe([queue], lease=60)
    received: list[Any] = []

    def receive() -> None:
        received.extend(subscription.receive(limit=1, wait=float("inf")))

    with in_background(receive):
        time.sleep(0.2)
        transport.send([message("t", queue)])
    assert len(received) == 1
    subscription.close()


# No threads


def test_transport_polls_without_threads(make_postgres: Make, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored send never fails for a notification, and a waiting caller still gets its reply."""
    transport, worker = make_postgres(poll_interval=0.2), make_postgres(poll_interval=0.2)

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with running(Consumer(worker, {"t": lambda: "paid"}, [queue])):
        assert Dispatcher(worker).call("t", queue=queue, timeout=10) == "paid"
        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", no_thread)
            transport.send([message("t", queue)])
            transport.send([message("t", queue)])
            assert Dispatcher(transport).call("t", queue=queue, timeout=10) == "paid"
        began = time.monotonic()
        assert Dispatcher(transport).call("t", queue=queue, timeout=10) == "paid"
        assert time.monotonic() - began < AT_ONCE


def test_close_sends_late_notifications(make_postgres: Make, queue: str) -> None:
    """close() sends the notifications of the current window, so that a short process wakes its workers too."""
    worker = make_postgres(poll_interval=LONG_POLL)
    subscription = worker.subscribe([queue], lease=60)
    for _ in range(5):
        assert subscription.receive(limit=10, wait=0) == ()
        producer, received = make_postgres(), list[Delivery]()

        def take(received: list[Delivery] = received) -> None:
            while len(received) < 2:
                received.extend(subscription.receive(limit=10, wait=LONG_POLL))

        with in_background(take):
            time.sleep(0.1)
            producer.send([message("t", queue)])
            producer.send([message("t", queue)])
            producer.close()
    subscription.close()


# Exceptions of signal handlers


class Interrupted(BaseException):
    """The exception of a signal handler: Celery's soft time limit, or a Ctrl-C."""


def test_no_interruption_loses_a_permit(postgres: PostgresTransport, queue: str) -> None:
    """An exception of a signal handler at random moments of a send leaves every permit in the pool."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    chance = random.Random(1)
    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for _ in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0006))
                for _ in range(5):
                    postgres.send([message("t", queue)])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 100
    wait_until(lambda: postgres._pool._permits.qsize() == 10, what="every slot to be back")
    postgres.send([message("t", queue)])
