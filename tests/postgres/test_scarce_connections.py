"""Connections that are scarce, silent or lead to the wrong server: callers wait no longer than their timeout."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.support import AT_ONCE, in_background, named, on_one_server, transport_on
from proxy import Proxy, proxy
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from queues import answer

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport, connection, execution, reply_reader, reply_waiter
from transports.postgres.connector import Connector
from transports.postgres.execution import run
from transports.postgres.statement import Statement
from unstract_core import (
    Consumer,
    Dispatcher,
    Reply,
    ReplyTimeout,
    TransportRefused,
    TransportUnavailable,
)

Make = Callable[..., PostgresTransport]


@pytest.fixture
def narrow(limited: tuple[str, str], tables: Tables) -> Callable[[int], str]:
    """Return a conninfo whose role may have so many connections."""
    conninfo, role = limited

    def limit(number: int) -> str:
        tables.execute(f"ALTER ROLE {role} CONNECTION LIMIT {number}")
        return conninfo

    return limit


@contextlib.contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    parts = conninfo_to_dict(url)
    with proxy(str(parts["host"]), int(str(parts["port"]))) as between:
        yield between, make_conninfo(url, port=between.port)


def events(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(record.__dict__.get("wire.event") == name for record in caplog.records)


@on_one_server
def test_call_returns_reply_without_waiter_connection(
    narrow: Callable[[int], str],
    postgres: PostgresTransport,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Callers look for themselves once per `poll_interval`, and one WARNING is logged."""
    monkeypatch.setattr(reply_waiter, "_LONGEST_PAUSE", 0.5)
    schema = postgres._statements.schema
    with (
        transport_on(narrow(1), schema, poll_interval=0.2) as caller,
        running(Consumer(postgres, {"t": lambda: 42}, [queue])),
        caplog.at_level(logging.INFO),
    ):
        began = time.monotonic()
        for _ in range(2):
            assert Dispatcher(caller).call("t", queue=queue, timeout=60) == 42
        assert time.monotonic() - began < 20
        assert events(caplog, "reply_waiter_away") == 1
        narrow(5)
        with in_background(lambda: caller.reply(queue, timeout=30)):
            wait_until(lambda: events(caplog, "reply_waiter_back") == 1, what="the waiter to get a connection")
            answer(postgres, Reply(queue, "completed"))
    assert events(caplog, "reply_waiter_away") == 1


@on_one_server
def test_call_returns_reply_when_its_waiter_hangs(
    make_postgres: Make, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers do not depend on a waiter whose statement gets no answer."""
    monkeypatch.setattr(reply_reader, "_LONGEST_READ", 1.0)
    with proxied(tables.url) as (between, url), transport_on(url, tables.schema, poll_interval=0.2) as caller:
        made = make_postgres()
        caller.send([message("t", queue + "-other")])
        with in_background(lambda: made.reply(queue, timeout=1)):
            pass
        received: list[Reply | None] = []
        with in_background(lambda: received.append(caller.reply(queue, timeout=40))):
            wait_until(lambda: caller._waiter.waiting and caller._waiter.is_connected, what="the waiter")
            between.fall_silent()
            answer(made, Reply(queue, "completed", result=1))
    assert received == [Reply(queue, "completed", result=1)]


@on_one_server
@pytest.mark.parametrize("lock", ["ACCESS EXCLUSIVE", None], ids=["locked", "silent"])
def test_reply_keeps_its_timeout_when_statement_hangs(
    make_postgres: Make, tables: Tables, queue: str, lock: str | None
) -> None:
    """A wait of one second ends after a second and the time of a cancel request, for any statement limit."""
    make_postgres()
    with proxied(tables.url) as (between, url), transport_on(url, tables.schema) as caller:
        assert caller.reply(queue) is None
        with tables.locked("LOCK TABLE {results} IN ACCESS EXCLUSIVE MODE") if lock else contextlib.nullcontext():
            if not lock:
                between.fall_silent()
            began = time.monotonic()
            with contextlib.suppress(TransportUnavailable):
                caller.reply(queue, timeout=1.0)
            assert time.monotonic() - began < 1.0 + 2 * connection.CANCEL_TIMEOUT + AT_ONCE


@on_one_server
def test_senders_share_the_connections_that_a_limit_leaves(
    narrow: Callable[[int], str], postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """Callers that wait for a new connection take an idle one; none fails with "too many connections"."""
    with transport_on(narrow(2), tables.schema, timeout=20.0) as transport:
        sends = [lambda: [transport.send([message("t", queue)]) for _ in range(5)]] * 24
        with in_background(*sends):
            pass
    assert tables.count(queue) == 120


@on_one_server
def test_silent_idle_connections_cost_one_timeout(make_postgres: Make, tables: Tables, name: str, queue: str) -> None:
    """The first send without an answer replaces all idle connections, so that the next ones work at once."""
    make_postgres()
    with contextlib.ExitStack() as stack:
        between, url = stack.enter_context(proxied(named(tables.url, name)))
        transport = stack.enter_context(transport_on(url, tables.schema, statement_timeout=1.0, pool_size=4))
        sends = [lambda: transport.send([message("t", queue)])] * 4
        with tables.locked("LOCK TABLE {messages}") as lock, in_background(*sends):
            wait_until(lambda: sum(event == "Lock" for _, event, _ in tables.backends(name)) == 4, what="sends")
            lock.rollback()
        between.fall_silent()
        failed = 0
        for _ in range(4):
            try:
                transport.send([message("t", queue)])
            except TransportUnavailable:
                failed += 1
    assert failed == 1


def test_hosts_share_the_time_that_a_caller_waits(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hosts that do not answer cost a caller its timeout once, not three times."""
    asked: list[str] = []

    def connect(conninfo: str, **_: Any) -> Any:
        asked.append(conninfo)
        raise psycopg.OperationalError("no answer")

    monkeypatch.setattr(connection.Connection, "connect", connect)
    connector = Connector(make_conninfo(postgres_url, host="a,b,c", port="1,2,3"), prepare=True)
    with pytest.raises(TransportUnavailable):
        connector.connect(timeout=12)
    parts = conninfo_to_dict(asked[0])
    assert (parts["connect_timeout"], parts["target_session_attrs"]) == ("4", "read-write")


@on_one_server
def test_statement_above_one_gigabyte_is_refused(postgres: PostgresTransport) -> None:
    """The error says that nothing was sent, and the connection stays usable."""
    made = postgres._connector.connect()
    parameters: dict[str, Any] = {"texts": ["x" * 2**26] * 16}
    with contextlib.closing(made):
        with pytest.raises(TransportRefused, match="nothing was sent") as caught:
            run(made, "send", Statement(b"SELECT %(texts)b::text[]"), parameters)
        assert (caught.value.effect, caught.value.remedy) == (
            "nothing was sent",
            "Send fewer or smaller messages at once",
        )
        assert made.usable


@pytest.mark.parametrize("many", [1, 2])
def test_pool_keeps_no_connection_with_a_large_buffer(postgres: PostgresTransport, queue: str, many: int) -> None:
    """A connection that carried a large message, to the server or from it, is closed and not kept."""
    large = "x" * (execution._LARGE + 1)
    postgres.send([message("t", queue)])
    postgres.send([message("t", queue, large)] * many)
    assert not any(idle.large for idle in postgres._pool._idle)
    answer(postgres, Reply(queue, "completed", result=large))
    assert postgres.reply(queue) is not None
    assert not postgres._pool._idle or not any(idle.large for idle in postgres._pool._idle)


@on_one_server
def test_call_reports_a_sent_task_as_sent(make_postgres: Make, tables: Tables, queue: str) -> None:
    """If the server is unavailable at the deadline, the call raises ReplyTimeout, and the task is in its queue."""
    make_postgres()
    with proxied(tables.url) as (between, url), transport_on(url, tables.schema, poll_interval=0.2) as transport:
        caught: list[BaseException] = []

        def call() -> None:
            with pytest.raises((ReplyTimeout, TransportUnavailable)) as raised:
                Dispatcher(transport).call("t", queue=queue, timeout=2)
            caught.append(raised.value)

        with in_background(call):
            wait_until(lambda: tables.count(queue) == 1, what="the task to be sent")
            between.away = True
            between.cut()
    (error,) = caught
    assert isinstance(error, ReplyTimeout) or getattr(error, "fate_unknown", False)
    assert "nothing was" not in str(error)
    assert "was sent" in str(error) or "no reply" in str(error)


@on_one_server
def test_transport_without_references_ends(make_postgres: Make, tables: Tables, name: str, queue: str) -> None:
    """Its threads end and its connections close, although it was never closed."""
    worker = make_postgres()
    before = threading.active_count()
    with running(Consumer(worker, {"t": lambda: 1}, [queue])):
        for _ in range(3):
            caller = PostgresTransport(named(tables.url, name), tables.schema)
            assert Dispatcher(caller).call("t", queue=queue, timeout=30) == 1
            caller.send([message("t", queue)] * 2)
            del caller
        gc.collect()
        wait_until(lambda: not tables.backends(name), what="every connection to be closed")
    wait_until(lambda: threading.active_count() <= before, what="every thread to end")


def test_dead_letters_keep_their_transport_alive(postgres_url: str, postgres: PostgresTransport) -> None:
    """`load_transport(url).dead.find()` works in one line."""
    assert PostgresTransport(postgres_url, postgres._statements.schema).dead.find() == []


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[servers.PrivateServer, servers.PrivateServer]]:
    """An old primary and a new one, each with tables of its own."""
    with servers.private_server() as old, servers.private_server() as new:
        yield old, new


def test_readers_leave_a_primary_that_became_read_only(
    pair: tuple[servers.PrivateServer, servers.PrivateServer], queue: str
) -> None:
    """After a failover no send fails, a status comes from the new primary, and a waiting caller gets its reply."""
    old, new = pair
    both = f"postgresql://postgres@127.0.0.1:{old.port},127.0.0.1:{new.port}/postgres"
    with transport_on(old.url, "unstract") as first, transport_on(new.url, "unstract") as second:
        first.migrate()
        second.migrate()
        with transport_on(both, "unstract", poll_interval=0.2) as transport:
            holding = Tables(old.url, "unstract")
            sends = [lambda: transport.send([message("t", queue)])] * 4
            with holding.locked("LOCK TABLE {messages}") as lock, in_background(*sends):
                wait_until(lambda: len(holding.backends("unstract-wire")) >= 4, what="four connections")
                lock.rollback()
            received: list[Reply | None] = []
            with in_background(lambda: received.append(transport.reply(queue, timeout=40))):
                wait_until(lambda: transport._waiter.waiting, what="the caller to wait")
                holding.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                holding.rows("SELECT pg_reload_conf()")
                answer(second, Reply(queue, "completed", result="new"))
                for _ in range(4):
                    transport.send([message("t", queue)])
            assert received == [Reply(queue, "completed", result="new")]
            assert transport.reply(queue) == Reply(queue, "completed", result="new")
    assert Tables(new.url, "unstract").count(queue) == 4
