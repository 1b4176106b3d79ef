"""Settings of a role or database change neither results nor throughput nor a caller's connection."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg2
import pytest
from consumers import running
from pg_tables import Tables
from pgbouncer import PgBouncer, private_pgbouncer
from postgres.support import on_one_server, transport_on
from psycopg import sql
from psycopg.conninfo import make_conninfo
from queues import bury

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Dispatcher

HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "array_nulls": "off",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "backslash_quote": "off",
    "search_path": "pg_temp",
    "statement_timeout": "30s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "20s",
    "idle_session_timeout": "1s",
    "transaction_timeout": "30s",
    "row_security": "off",
    "client_encoding": "LATIN1",
    "jit": "on",
    "jit_above_cost": "0",
    "plan_cache_mode": "force_generic_plan",
    "enable_indexscan": "off",
    "enable_indexonlyscan": "off",
    "enable_nestloop": "off",
    "enable_hashjoin": "off",
    "enable_material": "off",
    "enable_sort": "off",
    "geqo_threshold": "2",
    "from_collapse_limit": "1",
    "join_collapse_limit": "1",
    "work_mem": "64kB",
    "synchronous_commit": "off",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
    "exit_on_error": "on",
    "xmloption": "document",
    "client_min_messages": "error",
    "debug_parallel_query": "on",
    "force_parallel_mode": "on",
    "default_toast_compression": "pglz",
}


@pytest.fixture
def hostile(limited: tuple[str, str], tables: Tables) -> str:
    """A conninfo whose role carries every setting that can matter, as far as the server knows it."""
    conninfo, role = limited
    known = {name.lower() for (name,) in tables.rows("SELECT name FROM pg_settings")}
    with tables.connect() as connection:
        for name, value in HOSTILE.items():
            if name.lower() in known:
                setting = sql.SQL("ALTER ROLE {} SET {} = {}").format(
                    sql.Identifier(role), sql.Identifier(name.lower()), sql.Literal(value)
                )
                if name == "DateStyle":
                    setting = sql.SQL("ALTER ROLE {} SET datestyle = German, DMY").format(sql.Identifier(role))
                if name == "search_path":
                    setting = sql.SQL("ALTER ROLE {} SET search_path = pg_temp").format(sql.Identifier(role))
                connection.execute(setting)
    return conninfo


@contextlib.contextmanager
def adapted() -> Iterator[None]:
    """Register adapters as an application may, for all connections of its process, until the block ends."""

    class Odd(psycopg.adapt.Loader):
        def load(self, data: Any) -> Any:
            return "odd"

    class OddDumper(psycopg.adapt.Dumper):
        def dump(self, obj: Any) -> bytes:
            return b"odd"

    saved = psycopg.adapt.AdaptersMap(psycopg.adapters)
    lists = psycopg2.extensions.adapters.copy()
    try:
        for oid in ("int8", "text", "jsonb", "float8", "timestamptz", "bool"):
            psycopg.adapters.register_loader(oid, Odd)
        for kind in (str, int, float, list):
            psycopg.adapters.register_dumper(kind, OddDumper)
        psycopg2.extensions.register_adapter(list, lambda _: psycopg2.extensions.AsIs("odd"))
        psycopg2.extensions.register_adapter(str, lambda _: psycopg2.extensions.AsIs("odd"))
        yield
    finally:
        for name in ("_dumpers", "_dumpers_by_oid", "_loaders"):
            setattr(psycopg.adapters, name, getattr(saved, name))
        psycopg2.extensions.adapters.clear()
        psycopg2.extensions.adapters.update(lists)


def exercise(transport: PostgresTransport, queue: str) -> None:
    """Use everything that a transport has, and check every value that comes back."""
    began = dt.datetime.now(dt.UTC)
    ran: list[Any] = []

    def task(number: int, text: str) -> str:
        if number == 7:
            raise ValueError("seven \u20ac")
        return f"{text} {number}"

    tasks: dict[str, Callable[..., Any]] = {"t": task, "done": lambda result, **_: ran.append(result)}
    dispatcher = Dispatcher(transport)
    transport.send([message("t", queue, n, "\u20ac\\'", on_success=then("done", queue)) for n in range(20, 40)])
    transport.send([message("t", queue, 7, "x", task_id=f"{queue}-7", on_success=then("done", queue))])
    transport.send([message("t", queue + "-later", 1, "x", delay=3600.5)])
    consumer = Consumer(transport, tasks, [queue], lease=5, concurrency=2)
    with running(consumer):
        assert dispatcher.call("t", args=[1, "\U0001f600"], queue=queue, timeout=30) == "\U0001f600 1"
        wait_until(lambda: len(ran) == 20, what="every callback")
        wait_until(lambda: dispatcher.status(f"{queue}-7"), what="the failure")
    assert sorted(ran) == [f"\u20ac\\' {n}" for n in range(20, 40)]
    status = dispatcher.status(f"{queue}-7")
    assert status is not None
    assert (status.status, status.ttl) == ("failed", 86400.0)
    (later,) = transport.queues([queue + "-later"])
    assert (later.delayed, later.ready) == (1, 0)
    transport.send([message("t", queue + "-dead", 1, "x")])
    bury(transport, queue + "-dead", result={"a": 1})
    transport.send([message("t", queue + "-dead", 2, "x")])
    bury(transport, queue + "-dead")
    newest, oldest = transport.dead.find(queue=queue + "-dead")
    assert (newest.result, oldest.result) == (None, {"a": 1})
    assert began - dt.timedelta(minutes=5) < newest.buried_at < began + dt.timedelta(minutes=5)
    assert transport.dead.replay([newest.id]) == [newest.id]
    assert transport.dead.purge(ids=[oldest.id]) == 1
    assert consumer.counters["lost"] == 0


@on_one_server
@pytest.mark.parametrize("listen", [True, False])
def test_role_settings_change_nothing(
    hostile: str, tables: Tables, queue: str, listen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """On a direct connection everything works under every setting that a role can carry, and with foreign adapters."""
    with adapted(), transport_on(hostile, tables.schema, listen=listen) as transport:
        exercise(transport, queue)
        connection = transport._pool._connection("look", 0.0)
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
        assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        connection.close()
    assert not [text for text in caplog.messages if "transport_away" in text]


@pytest.fixture(scope="module")
def pgbouncer(embedded_url: str) -> Iterator[PgBouncer]:
    with private_pgbouncer(embedded_url) as made:
        yield made


@on_one_server
def test_role_settings_change_nothing_behind_a_pooler(
    pgbouncer: PgBouncer, hostile: str, tables: Tables, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each transaction sets the needed settings; the server's sessions keep theirs."""
    user = psycopg.conninfo.conninfo_to_dict(hostile)["user"]
    users = pgbouncer._directory / "users.txt"
    users.write_text(users.read_text() + f'"{user}" ""\n')
    pgbouncer.command("RELOAD")
    url = make_conninfo(pgbouncer.url, user=user)
    with transport_on(url, tables.schema, listen=False, poll_interval=0.2) as transport:
        exercise(transport, queue)
    assert not [text for text in caplog.messages if "transport_away" in text]
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)


@on_one_server
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_caller_settings_change_nothing_and_stay(
    hostile: str, postgres: PostgresTransport, tables: Tables, queue: str, driver: str
) -> None:
    """`send(within=)` stores the same message, and the caller's session has the same settings afterwards."""
    connect: Any = psycopg.connect if driver == "psycopg" else psycopg2.connect
    show = "SELECT string_agg(name || '=' || setting, ';' ORDER BY name) FROM pg_settings WHERE source <> 'override'"
    with contextlib.closing(connect(hostile)) as connection:
        cursor = connection.cursor()
        cursor.execute(show)
        before = cursor.fetchall()
        connection.commit()
        with adapted():
            mine = connection.cursor()
            ids = postgres.send(
                [message("t", queue, n, "\u20ac\\'\"{},\U0001f600", None) for n in range(3)], within=mine
            )
        cursor.execute(show)
        assert cursor.fetchall() == before
        connection.commit()
    rows = tables.rows("SELECT msg_id::text, message -> 'args' FROM {messages} ORDER BY msg_id")
    assert rows == [(id, [n, "\u20ac\\'\"{},\U0001f600", None]) for n, id in enumerate(ids)]
