"""Everything through a PgBouncer whose clients share three connections to the server, and take turns on them.

A transport that was told (`listen=False`) and one that has to find out are the same but for one WARNING. No pooler may
ever mean silence: whoever waits looks again after its `poll_interval`, whatever became of a LISTEN.
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

told_or_not = pytest.mark.parametrize("options", [{"listen": False}, {}], ids=["told", "found"])


@pytest.fixture(scope="session")
def postgres_url(server_url: str) -> str:
    """The machine's own server, before which the poolers stand."""
    return server_url


@pytest.fixture(scope="module")
def pgbouncer(server_url: str) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode, which is left as it was found."""
    with private_pgbouncer(server_url) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def pooled(pgbouncer: PgBouncer, schema: str) -> Iterator[Make]:
    """A factory of transports on the test's own schema, migrated, that reach the server through the PgBouncer."""
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
    """Hold a transaction open on each of them, as other programs behind the same pooler may."""
    with contextlib.ExitStack() as held:
        for _ in range(SERVER_CONNECTIONS):
            held.enter_context(psycopg.connect(pgbouncer.url)).execute("SELECT 1")
        yield


# What a pooler does to sessions.


def test_one_client_meets_every_server_connection_in_turn(pooled: Make, queue: str) -> None:
    """So these tests test something: no two transactions in a row of one client are in the same session."""
    subscription = pooled().subscribe([queue], lease=60)
    connection = subscription._listener.connect()
    sessions = [connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(2 * SERVER_CONNECTIONS)]
    assert len(set(sessions)) == SERVER_CONNECTIONS
    assert connection.pooled
    subscription.close()


@told_or_not
def test_nothing_is_left_in_a_session_that_others_share(
    pooled: Make, pgbouncer: PgBouncer, queue: str, options: dict[str, Any]
) -> None:
    """No LISTEN and no prepared statement on any of the server's connections, whatever was done and however often."""
    transport = pooled(**options)
    with running(Consumer(transport, {"t": lambda n: n}, [queue])):
        for n in range(4 * SERVER_CONNECTIONS):
            assert Dispatcher(transport).call("t", args=[n], queue=queue, timeout=30) == n
            transport.send([message("t", queue, n)])
        assert pgbouncer.on_each(LISTENING) == []
        assert pgbouncer.on_each(PREPARED) == []


def test_no_statement_that_counts_is_compiled(pgbouncer: PgBouncer, server_url: str) -> None:
    """A direct connection has JIT off; through a pooler the counting statements do, and all others stay one command."""
    show = b"SELECT current_setting('jit')"
    with Connector(server_url, prepare=False).connect() as direct:
        assert direct.execute(show).fetchall() == [("off",)]
    with Connector(pgbouncer.url, prepare=False).connect() as pooled:
        ((default,),) = run(pooled, "look", Statement(show), {})
        assert pooled.missing_settings == {}
        assert run(pooled, "look", UncompiledStatement(show), {}) == [("off",)]
        assert run(pooled, "look", Statement(show), {}) == [(default,)]


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_is_found_out_in_every_mode(
    server_url: str, schema: str, queue: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING for each process, and polling: in session mode, too, where a LISTEN would be heard."""
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


def test_a_listen_that_is_lost_makes_nobody_wait_longer_than_a_poll(
    pooled: Make, pgbouncer: PgBouncer, postgres: PostgresTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler that nothing has found out takes the LISTEN and tells nobody: messages and replies come all the same."""
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


# Everything that is done, done through it.


@told_or_not
def test_a_consumer_beside_producers_runs_everything_once(
    pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str, options: dict[str, Any]
) -> None:
    """Four producers, two consumers, three connections to the server: each dispatch has its one callback."""
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


@told_or_not
def test_more_callers_than_server_connections_get_their_answers(
    pooled: Make, queue: str, options: dict[str, Any]
) -> None:
    """Twenty callers block at once; one who waits for a reply holds none of the connections that he waits for."""
    caller, worker = pooled(pool_size=20, **options), pooled(**options)
    answers: list[Any] = []

    def call(n: int) -> None:
        answers.append(Dispatcher(caller).call("t", args=[n], queue=queue, timeout=60))

    callers = [partial(call, n) for n in range(20)]
    with running(Consumer(worker, {"t": lambda n: n}, [queue], concurrency=4)), in_background(*callers, timeout=90):
        pass
    assert sorted(answers) == list(range(20))


def test_several_processes_migrate_through_it_at_once(pgbouncer: PgBouncer, schema: str, tables: Tables) -> None:
    """Everything is created, by one of them; a migration that finds it all there creates nothing."""
    created: list[list[str]] = []

    def migrate() -> None:
        with transport_on(pgbouncer.url, schema) as transport:
            created.append(transport.migrate())

    with in_background(*[migrate] * SERVER_CONNECTIONS):
        pass
    names = [name for one in created for name in one]
    assert sorted(names) == sorted(set(names))
    assert {"pg_queue_message", "pg_task_result", "pg_queue_dead_letter"} < set(names)
    with transport_on(pgbouncer.url, schema) as transport:
        assert transport.migrate() == []
    assert tables.count("q") == 0


def test_what_a_caller_sends_within_its_transaction_stays_in_it(
    pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str
) -> None:
    """The caller's psycopg connection goes through the pooler, others are served in between: commit and rollback hold.

    Its own statements prepare nothing (`prepare_threshold=None`), as psycopg asks of everybody behind a PgBouncer.
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
    assert [first(one) for one in subscription.receive(limit=20, wait=0)] == [0, 2, 4, 6, 8, 10]
    subscription.close()


def test_sending_prepares_nothing_on_the_callers_connection(pooled: Make, pgbouncer: PgBouncer, queue: str) -> None:
    """However often it is done, and whatever psycopg would do by itself with a statement that comes again."""
    transport = pooled()
    with psycopg.connect(pgbouncer.url) as caller:
        for n in range(4 * SERVER_CONNECTIONS):
            with caller.transaction(), caller.cursor() as cursor:
                transport.send([message("t", queue, n)], within=cursor)
        assert pgbouncer.on_each(PREPARED) == []


def test_a_send_that_a_lock_holds_up_is_cancelled_through_it(pooled: Make, tables: Tables, queue: str) -> None:
    """A cancel finds its way to the right server connection: nothing took effect, and its caller is told that."""
    transport = pooled(statement_timeout=1.0)
    transport.send([message("t", queue)])
    with tables.locked("LOCK TABLE {messages} IN SHARE MODE"):
        for _ in range(2):
            with pytest.raises(TransportUnavailable, match="nothing took effect") as caught:
                transport.send([message("t", queue)])
            assert not caught.value.fate_unknown
    transport.send([message("t", queue)])
    assert tables.count(queue) == 2


# What a pooler refuses, and when it is full.


def test_a_startup_parameter_that_it_refuses_is_told_with_the_remedy(
    pgbouncer: PgBouncer, server_url: str, schema: str
) -> None:
    """What we send by ourselves is refused by no PgBouncer; `options` are, until it is told to ignore them."""
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


def test_a_pooler_that_takes_no_more_clients_is_told(server_url: str, schema: str, queue: str) -> None:
    """TransportUnavailable names max_client_conn; nothing was done, and the next send works when there is room."""
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
def test_a_pooler_without_a_free_server_connection_is_told_in_time(
    server_url: str, schema: str, tables: Tables, queue: str, connected: bool
) -> None:
    """Its query_wait_timeout ends a send that waits for one: TransportUnavailable, and nothing was sent."""
    with (
        private_pgbouncer(server_url, query_wait_timeout=1) as pgbouncer,
        _making(pgbouncer, schema) as make,
    ):
        transport = make(timeout=2.0)
        if connected:
            transport.send([message("t", queue)])
        before = tables.count(queue)
        refused = pytest.raises(TransportUnavailable, match="query_wait_timeout")
        with _every_server_connection_taken(pgbouncer), refused as told:
            transport.send([message("t", queue)])
        assert not told.value.fate_unknown
        transport.send([message("t", queue)])
        assert tables.count(queue) == before + 1


@pytest.mark.parametrize("connected", [True, False])
def test_a_send_that_waits_for_a_server_connection_ends_with_its_own_limit_first(
    pooled: Make, pgbouncer: PgBouncer, tables: Tables, queue: str, connected: bool
) -> None:
    """The pooler would let it wait for two minutes: it is given up after statement_timeout, or after timeout where the
    pooler is still to be found out; and what is said of its fate is true."""
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
def test_connections_that_it_closes_for_being_idle_cost_nothing(server_url: str, schema: str, queue: str) -> None:
    """server_idle_timeout and client_idle_timeout of a second: a send, a call and a consumer go on after them."""
    settings = {"server_idle_timeout": 1, "client_idle_timeout": 1, "min_pool_size": 0}
    with private_pgbouncer(server_url, **settings) as pgbouncer, _making(pgbouncer, schema) as make:
        producer, worker = make(), make(poll_interval=2.5)
        with running(Consumer(worker, {"t": lambda: "answer"}, [queue])):
            for _ in range(2):
                assert Dispatcher(producer).call("t", queue=queue, timeout=60) == "answer"
                wait_until(lambda: not pgbouncer.show("SERVERS"), what="the connections to the server to be closed")
                wait_until(lambda: pgbouncer.log().count("client_idle_timeout"), what="a client's to be closed, too")


# When it goes away.


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
def test_a_consumer_outlives_whatever_happens_to_the_pooler(
    server_url: str, schema: str, tables: Tables, queue: str, disturb: Callable[[PgBouncer], None]
) -> None:
    """Killed and started again, its connections cut, paused, reconnected, twice in mid-work: nothing accepted is lost,
    every callback runs, and nobody has to restart anything."""
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
