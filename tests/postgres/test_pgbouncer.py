"""All operations through a PgBouncer whose clients share three connections to the server.

With `listen=False` and without it the transport behaves the same, except for one WARNING when it detects the pooler. A
lost LISTEN is never silent: each waiting caller or worker looks again after its `poll_interval`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from consumers import running
from pg_tables import Tables
from pgbouncer import SERVER_CONNECTIONS, PgBouncer, private_pgbouncer
from postgres.support import AT_ONCE, LONG_POLL, in_background, transport_on
from psycopg.conninfo import make_conninfo

from contract_tests.kit import retry_outages, wait_until
from contract_tests.messages import first, message, then
from transports.postgres import PostgresTransport
from transports.postgres.connector import Connector
from transports.postgres.execution import run
from transports.postgres.statement import Statement, UncompiledStatement
from unstract_core import Consumer, Dispatcher, Settlement, TransportUnavailable, Verdict

Make = Callable[..., PostgresTransport]

LISTENING = "SELECT * FROM pg_listening_channels()"
PREPARED = "SELECT name FROM pg_prepared_statements"

configured_or_detected = pytest.mark.parametrize("options", [{"listen": False}, {}], ids=["configured", "detected"])


@pytest.fixture(scope="session")
def postgres_url(server_url: str) -> str:
    """The machine's own server, behind the poolers."""
    return server_url


@pytest.fixture(scope="module")
def pgbouncer(server_url: str) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode; each test leaves it running."""
    with private_pgbouncer(server_url) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def pooled(pgbouncer: PgBouncer, schema: str) -> Iterator[Make]:
    """A factory of transports on the test's own migrated schema, through the PgBouncer."""
    with _making(pgbouncer, schema) as make:
        yield make


@contextlib.contextmanager
def _making(pgbouncer: PgBouncer, schema: str) -> Iterator[Make]:
    with contextlib.ExitStack() as made:

        def make(**options: Any) -> PostgresTransport:
            transport = made.enter_context(
                transport_on(pgbouncer.url, schema, **{"poll_interval": 0.2, "timeout": 30.0, **options})
            )
            transport.migrate()
            return transport

        yield make


@contextlib.contextmanager
def _every_server_connection_taken(pgbouncer: PgBouncer) -> Iterator[None]:
    """Hold a transaction open on each server connection, as other programs may."""
    with contextlib.ExitStack() as held:
        for _ in range(SERVER_CONNECTIONS):
            held.enter_context(psycopg.connect(pgbouncer.url)).execute("SELECT 1")
        yield


# Sessions behind a pooler


def test_one_client_uses_every_server_connection(pooled: Make, queue: str) -> None:
    """No two consecutive transactions of one client are in the same session, so that these tests prove something."""
    subscription = pooled().subscribe([queue], lease=60)
    connection = subscription._listener.connect()
    sessions = [connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(2 * SERVER_CONNECTIONS)]
    assert len(set(sessions)) == SERVER_CONNECTIONS
    assert connection.pooled
    subscription.close()


@configured_or_detected
def test_shared_sessions_stay_clean(pooled: Make, pgbouncer: PgBouncer, queue: str, options: dict[str, Any]) -> None:
    """No server connection has a LISTEN or a prepared statement, after any use."""
    transport = pooled(**options)
    with running(Consumer(transport, {"t": lambda n: n}, [queue])):
        for n in range(4 * SERVER_CONNECTIONS):
            assert Dispatcher(transport).call("t", args=[n], queue=queue, timeout=30) == n
            transport.send([message("t", queue, n)])
        assert pgbouncer.on_each(LISTENING) == []
        assert pgbouncer.on_each(PREPARED) == []


def test_counting_statements_are_not_compiled(pgbouncer: PgBouncer, server_url: str) -> None:
    """A direct connection has JIT off; through a pooler only the counting statements switch it off."""
    show = b"SELECT current_setting('jit')"
    with Connector(server_url, prepare=False).connect() as direct:
        assert direct.execute(show).fetchall() == [("off",)]
    with Connector(pgbouncer.url, prepare=False).connect() as pooled:
        ((default,),) = run(pooled, "look", Statement(show), {})
        assert pooled.missing_settings == {}
        assert run(pooled, "look", UncompiledStatement(show), {}) == [("off",)]
        assert run(pooled, "look", Statement(show), {}) == [(default,)]


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pooler_is_detected_in_every_mode(
    server_url: str, schema: str, queue: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process logs one WARNING and polls, also in session mode, where a LISTEN would work."""
    with (
        private_pgbouncer(server_url, pool_mode=mode, default_pool_size=10, min_pool_size=0) as pgbouncer,
        _making(pgbouncer, schema) as make,
    ):
        transport = make()
        with running(Consumer(transport, {"t": lambda: "answer"}, [queue])):
            for _ in range(3):
                assert Dispatcher(transport).call("t", queue=queue, timeout=30) == "answer"
    assert [text for text in caplog.messages if "pooler" in text] == ["wire.pooler_found"]
    assert not [text for text in caplog.messages if "prepared" in text]


def test_lost_listen_delays_at_most_one_poll(
    pooled: Make, pgbouncer: PgBouncer, postgres: PostgresTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an undetected pooler takes the LISTEN, messages and replies still come by polling."""
    monkeypatch.setattr(Connector, "_probe", lambda *args: None)
    transport = pooled(poll_interval=0.5)
    subscription = transport.subscribe([queue], lease=60)
    came: list[float] = []

    def take() -> None:
        (held,) = subscription.receive(limit=1, wait=LONG_POLL)
        came.append(time.monotonic())
        assert subscription.settle([Settlement(held, Verdict.ACK)]) == [True]

    try:
        for n in range(4):
            with in_background(take, timeout=LONG_POLL):
                time.sleep(0.1)
                sent = time.monotonic()
                postgres.send([message("t", queue, n)])
            assert came[n] - sent < 0.5 + AT_ONCE
        with running(Consumer(postgres, {"t": lambda: "answer"}, [queue])):
            for _ in range(3):
                asked = time.monotonic()
                assert Dispatcher(transport).call("t", queue=queue, timeout=LONG_POLL) == "answer"
                assert time.monotonic() - asked < 0.5 + AT_ONCE
        assert pgbouncer.on_each(LISTENING), "this test has made nobody listen"
    finally:
        subscription.close()
        pgbouncer.on_each("UNLISTEN *")


# All operations through it


@configured_or_detected
def test_concurrent_use_behind_pgbouncer_runs_tasks_once(
    pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str, options: dict[str, Any]
) -> None:
    """With four producers, two consumers and three server connections, each dispatch has one callback."""
    ran: Counter[int] = Counter()
    called_back: Counter[int] = Counter()
    lock = threading.Lock()

    def count(counter: Counter[int], n: int) -> int:
        with lock:
            counter[n] += 1
        return n

    tasks: dict[str, Any] = {"t": partial(count, ran), "done": partial(count, called_back)}

    def produce(producer: int, transport: PostgresTransport) -> None:
        for n in range(producer, 100, 4):
            transport.send([message("t", queue, n, on_success=then("done", queue + "-cb"))])

    producers = [partial(produce, producer, pooled(**options)) for producer in range(4)]
    consumers = [Consumer(pooled(**options), tasks, [queue, queue + "-cb"], concurrency=4) for _ in range(2)]
    with running(*consumers), in_background(*producers):
        wait_until(lambda: len(called_back) == 100, what="every callback")
        wait_until(lambda: tables.count(queue) + tables.count(queue + "-cb") == 0, what="everything to be settled")
    assert set(ran.values()) == set(called_back.values()) == {1}
    assert len(pgbouncer.show("SERVERS")) == SERVER_CONNECTIONS


@configured_or_detected
def test_callers_outnumber_server_connections(pooled: Make, queue: str, options: dict[str, Any]) -> None:
    """Twenty callers block at once and get their replies; a waiting caller uses no server connection."""
    caller, worker = pooled(pool_size=20, **options), pooled(**options)
    answers: list[Any] = []

    def call(n: int) -> None:
        answers.append(Dispatcher(caller).call("t", args=[n], queue=queue, timeout=60))

    callers = [partial(call, n) for n in range(20)]
    with running(Consumer(worker, {"t": lambda n: n}, [queue], concurrency=4)), in_background(*callers, timeout=90):
        pass
    assert sorted(answers) == list(range(20))


def test_processes_migrate_through_pgbouncer_at_once(pgbouncer: PgBouncer, schema: str, tables: Tables) -> None:
    """One process creates the objects; a migration that finds them creates nothing."""
    created: list[list[str]] = []

    def migrate() -> None:
        with transport_on(pgbouncer.url, schema) as transport:
            created.append(transport.migrate())

    with in_background(*[migrate] * SERVER_CONNECTIONS):
        pass
    names = [name for made in created for name in made]
    assert sorted(names) == sorted(set(names))
    assert {"pg_queue_message", "pg_task_result", "pg_queue_dead_letter"} < set(names)
    with transport_on(pgbouncer.url, schema) as transport:
        assert transport.migrate() == []
    assert tables.count("q") == 0


def test_send_within_works_through_pgbouncer(pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str) -> None:
    """The caller's connection goes through the pooler beside others: commit and rollback hold.

    Its own statements prepare nothing (`prepare_threshold=None`), as psycopg requires behind a PgBouncer.
    """
    transport = pooled()
    with psycopg.connect(pgbouncer.url, prepare_threshold=None) as caller:
        for n in range(12):
            with caller.cursor() as cursor:
                cursor.execute("SELECT 1")
                transport.send([message("t", queue, n)], within=cursor)
                transport.reply("nobody")
                assert tables.count(queue) == (n + 1) // 2
                transport.send([message("t", queue, n)], within=cursor)
            if n % 2:
                caller.rollback()
            else:
                caller.execute(tables.sql("DELETE FROM {messages} WHERE msg_id = (SELECT max(msg_id) FROM {messages})"))
                caller.commit()
    subscription = transport.subscribe([queue], lease=60)
    assert [first(delivery) for delivery in subscription.receive(limit=20, wait=0)] == [0, 2, 4, 6, 8, 10]
    subscription.close()


def test_send_within_prepares_no_statement(pooled: Make, pgbouncer: PgBouncer, queue: str) -> None:
    """That holds for any number of sends, although psycopg prepares repeated statements by itself."""
    transport = pooled()
    with psycopg.connect(pgbouncer.url) as caller:
        for n in range(4 * SERVER_CONNECTIONS):
            with caller.transaction(), caller.cursor() as cursor:
                transport.send([message("t", queue, n)], within=cursor)
        assert pgbouncer.on_each(PREPARED) == []


def test_blocked_send_is_cancelled_through_pgbouncer(pooled: Make, tables: Tables, queue: str) -> None:
    """The cancel request reaches the right server connection: nothing took effect, and the error says so."""
    transport = pooled(statement_timeout=1.0)
    transport.send([message("t", queue)])
    with tables.locked("LOCK TABLE {messages} IN SHARE MODE"):
        for _ in range(2):
            with pytest.raises(TransportUnavailable, match="nothing took effect") as caught:
                transport.send([message("t", queue)])
            assert not caught.value.fate_unknown
    transport.send([message("t", queue)])
    assert tables.count(queue) == 2


# Refusals of a pooler, and its limits


def test_refused_startup_parameter_has_a_remedy(pgbouncer: PgBouncer, server_url: str, schema: str) -> None:
    """PgBouncer accepts all default parameters of this package; it refuses `options` unless configured."""
    given = {"options": "-c geqo=off"}
    with transport_on(make_conninfo(pgbouncer.url, **given), schema) as transport:
        with pytest.raises(TransportUnavailable, match=r"parameter: options.*ignore_startup_parameters") as caught:
            transport.migrate()
        assert not caught.value.fate_unknown
    with (
        private_pgbouncer(server_url, ignore_startup_parameters="options") as lenient,
        transport_on(make_conninfo(lenient.url, **given), schema) as transport,
    ):
        assert transport.migrate()


def test_full_pooler_is_unavailable(server_url: str, schema: str, queue: str) -> None:
    """TransportUnavailable names max_client_conn; nothing was done, and the next send works later."""
    with (
        private_pgbouncer(server_url, max_client_conn=4) as pgbouncer,
        _making(pgbouncer, schema) as make,
    ):
        transport = make()
        with contextlib.ExitStack() as others:
            for _ in range(4):
                others.enter_context(psycopg.connect(pgbouncer.url))
            with pytest.raises(TransportUnavailable, match=r"max_client_conn.*nothing was done.*pool_size") as caught:
                transport.send([message("t", queue)])
            assert not caught.value.fate_unknown
        retry_outages(lambda: transport.send([message("t", queue)]))
        (state,) = transport.queues([queue])
        assert state.ready == 1


@pytest.mark.parametrize("connected", [True, False])
def test_query_wait_timeout_is_unavailable(
    server_url: str, schema: str, tables: Tables, queue: str, connected: bool
) -> None:
    """PgBouncer's query_wait_timeout ends a waiting send with TransportUnavailable, and nothing was sent."""
    with (
        private_pgbouncer(server_url, query_wait_timeout=1) as pgbouncer,
        _making(pgbouncer, schema) as make,
    ):
        transport = make(timeout=2.0)
        if connected:
            transport.send([message("t", queue)])
        before = tables.count(queue)
        refused = pytest.raises(TransportUnavailable, match="query_wait_timeout")
        with _every_server_connection_taken(pgbouncer), refused as caught:
            transport.send([message("t", queue)])
        assert not caught.value.fate_unknown
        transport.send([message("t", queue)])
        assert tables.count(queue) == before + 1


@pytest.mark.parametrize("connected", [True, False])
def test_send_ends_before_the_poolers_limit(
    pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str, connected: bool
) -> None:
    """A send ends after statement_timeout, or after timeout while the pooler is undetected, and its fate is true."""
    transport = pooled(statement_timeout=1.0 if connected else 60.0, timeout=2.0)
    if connected:
        transport.send([message("t", queue)])
    before = tables.count(queue)
    with _every_server_connection_taken(pgbouncer):
        began = time.monotonic()
        with pytest.raises(TransportUnavailable) as caught:
            transport.send([message("t", queue)])
        assert time.monotonic() - began < 30
    transport.send([message("t", queue)])
    sent = tables.count(queue) - before
    assert sent == 1 or (sent == 2 and caught.value.fate_unknown)


@pytest.mark.slow(reason="It waits for PgBouncer's own timeouts: about 20 s.")
def test_connections_closed_as_idle_cause_no_failure(server_url: str, schema: str, queue: str) -> None:
    """With server_idle_timeout and client_idle_timeout of a second, a send, a call and a consumer go on."""
    settings = {"server_idle_timeout": 1, "client_idle_timeout": 1, "min_pool_size": 0}
    with private_pgbouncer(server_url, **settings) as pgbouncer, _making(pgbouncer, schema) as make:
        producer, worker = make(), make(poll_interval=2.5)
        with running(Consumer(worker, {"t": lambda: "answer"}, [queue])):
            for _ in range(2):
                assert Dispatcher(producer).call("t", queue=queue, timeout=60) == "answer"
                wait_until(lambda: not pgbouncer.show("SERVERS"), what="the connections to the server to be closed")
                wait_until(lambda: pgbouncer.log().count("client_idle_timeout"), what="a client's to be closed, too")


# Outages of the pooler


def _restarted(pgbouncer: PgBouncer) -> None:
    pgbouncer.kill()
    time.sleep(0.3)
    pgbouncer.start()


def _paused(pgbouncer: PgBouncer) -> None:
    pgbouncer.command(f'PAUSE "{pgbouncer.database}"')
    time.sleep(0.3)
    pgbouncer.command(f'RESUME "{pgbouncer.database}"')


def _reconnected(pgbouncer: PgBouncer) -> None:
    pgbouncer.command(f'RECONNECT "{pgbouncer.database}"')


@pytest.mark.parametrize("disturb", [_restarted, PgBouncer.cut, _paused, _reconnected])
def test_consumer_survives_pooler_restarts(
    server_url: str, schema: str, tables: Tables, queue: str, disturb: Callable[[PgBouncer], None]
) -> None:
    """PgBouncer is killed, restarted, cut, paused and reconnected during work: nothing is lost, every callback runs."""
    called_back: set[int] = set()
    tasks: dict[str, Any] = {"t": lambda n: n, "done": called_back.add}
    with private_pgbouncer(server_url) as pgbouncer, _making(pgbouncer, schema) as make:
        producer, consumer = make(), Consumer(make(), tasks, [queue, queue + "-cb"], lease=3, concurrency=2)

        def produce() -> None:
            for n in range(90):
                retry_outages(partial(producer.send, [message("t", queue, n, on_success=then("done", queue + "-cb"))]))
                time.sleep(0.01)

        def done(count: int) -> bool:
            return len(called_back) >= count

        with running(consumer), in_background(produce):
            for share in (20, 50):
                wait_until(partial(done, share), timeout=60, what="some to be done")
                disturb(pgbouncer)
            wait_until(partial(done, 90), timeout=60, what="every callback")
            wait_until(lambda: tables.count(queue) + tables.count(queue + "-cb") == 0, timeout=60, what="the end")
        assert producer.queues() == []
        assert producer.dead.find() == []
