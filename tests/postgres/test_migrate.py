"""`migrate` creates missing objects once, and leaves existing ones unchanged."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import servers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres import product
from postgres.support import on_one_server, transport_on
from psycopg import sql
from queues import queue_name, receive_all

from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import (
    ConfigurationError,
    Consumer,
    Message,
    Reply,
    Settlement,
    TransportError,
    TransportNotReady,
    TransportUnavailable,
    Verdict,
)

EVERYTHING = [
    "pg_queue_message",
    "pg_task_result",
    "pg_queue_dead_letter",
    "pg_queue_message_ready",
    "pg_queue_message_claimed",
    "pg_queue_message_held",
    "pg_queue_message_strange",
    "pg_task_result_expires",
    "pg_queue_dead_letter_queue",
]
BESIDE_THE_PRODUCTS = [
    "pg_queue_dead_letter",
    "pg_queue_message_held",
    "pg_queue_message_strange",
    "pg_queue_dead_letter_queue",
]


def whole_path(transport: PostgresTransport) -> None:
    """Send, receive, settle in every form, reply, dead-letter, inspect, replay and purge."""
    queue, key = queue_name(), queue_name()
    sent = transport.send([message("t", queue, n) for n in range(4)] + [message("t", queue, delay=60)])
    assert len(transport.send([message("t", queue, 4)])) == 1
    subscription = transport.subscribe([queue, queue + "-other"], lease=60)
    held = subscription.receive(limit=10, wait=0)
    assert [delivery.id for delivery in held[:4]] == list(sent[:4])
    assert subscription.renew(held) == [True] * 5
    again, buried, continued, answered, done = held
    follow_up = Message(message("f", queue).payload, queue + "-other", org_id="org", priority=9)
    settled = subscription.settle(
        [
            Settlement(again, Verdict.RETRY, delay=60),
            Settlement(buried, Verdict.BURY, reason="why", result={"paid": 1}),
            Settlement(continued, Verdict.ACK, follow_up=follow_up),
            Settlement(answered, Verdict.ACK, reply=Reply(key, "completed", result=[1])),
            Settlement(done, Verdict.ACK),
        ]
    )
    assert settled == [True] * 5
    (followed,) = subscription.receive(limit=10, wait=0)
    assert (followed.queue, followed.org_id, followed.priority) == (queue + "-other", "org", 9)
    subscription.close()
    assert transport.reply(key, consume=True) == Reply(key, "completed", result=[1])
    assert transport.reply(key) == Reply(key, "completed")
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.reason, letter.result, letter.attempts) == ("why", {"paid": 1}, 1)
    assert transport.dead.replay([letter.id]) == [letter.id]
    (replayed,) = receive_all(transport, queue)
    assert replayed.attempt == 1
    assert transport.dead.purge() == 0
    (state,) = transport.queues([queue])
    assert state.in_flight + state.delayed == 3


def test_blocked_migration_names_the_lock_holder(postgres: PostgresTransport, tables: Tables) -> None:
    """`migrate` waits for a lock up to its timeout; the error names the session, and no send waits."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    with tables.locked("INSERT INTO {messages} SELECT * FROM {messages}") as holder:
        with pytest.raises(TransportUnavailable) as raised:
            postgres.migrate(lock_timeout=0.2)
        text = str(raised.value)
        assert f"pg_queue_message is held by session {holder.info.backend_pid} " in text
        assert "idle in transaction" in text
        assert raised.value.effect == "nothing was done"
        assert raised.value.remedy.endswith("End what holds it, and run this again")
        assert len(postgres.send([message("t", "q")])) == 1
    assert postgres.migrate() == ["pg_queue_message_claimed"]


def test_reader_blocks_no_migration(postgres: PostgresTransport, tables: Tables) -> None:
    """A session that has only read does not prevent the creation of an index."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    with tables.locked("SELECT count(*) FROM {messages}"):
        assert postgres.migrate(lock_timeout=0.5) == ["pg_queue_message_claimed"]


@pytest.mark.parametrize("lock_timeout", [0, -1, math.nan, math.inf])
def test_invalid_lock_timeout_is_refused(postgres: PostgresTransport, lock_timeout: float) -> None:
    """A timeout of zero would mean to wait for ever."""
    with pytest.raises(ConfigurationError, match="lock_timeout"):
        postgres.migrate(lock_timeout=lock_timeout)


def test_migrate_leaves_django_tables_to_django(tables: Tables) -> None:
    """If Django keeps its migrations in the schema, `migrate` creates none of Django's tables."""
    tables.execute("CREATE SCHEMA {schema}; CREATE TABLE {schema}.django_migrations (id int)")
    with transport_on(tables.url, tables.schema) as transport:
        with pytest.raises(TransportNotReady, match=r"no table pg_queue_message.*nothing was done.*--create-tables"):
            transport.migrate()
        tables.execute("DROP SCHEMA {schema} CASCADE")
        product.make_tables(tables, "varchar")
        tables.execute("CREATE TABLE {schema}.django_migrations (id int)")
        assert transport.migrate() == BESIDE_THE_PRODUCTS
        tables.execute("DROP TABLE {messages}")
        assert transport.migrate(create_tables=True)[0] == "pg_queue_message"


@pytest.mark.parametrize("whose", ["nobody's", "the product's", "ours"])
def test_printed_sql_equals_migrate(tables: Tables, whose: str) -> None:
    """The SQL creates the missing objects, can run twice, and leaves nothing for `migrate`."""
    with transport_on(tables.url, tables.schema) as transport:
        if whose == "the product's":
            product.make_tables(tables, "varchar")
        elif whose == "ours":
            transport.migrate()
        for _ in range(2):
            with tables.connect(autocommit=False) as connection:
                connection.execute(transport.migration_sql().encode())
        assert transport.migrate() == []
        assert (
            len(
                tables.rows(
                    "SELECT 1 FROM pg_index WHERE indrelid = to_regclass(%s)", f"{tables.schema}.pg_queue_message"
                )
            )
            == 5
        )
        whole_path(transport)


def test_second_migration_does_nothing(postgres_url: str, schema: str) -> None:
    """The first call returns the created objects, the second an empty list."""
    with transport_on(postgres_url, schema) as transport:
        assert transport.migrate() == [f"schema {schema}", *EVERYTHING]
        assert transport.migrate() == []


def test_threads_can_migrate_at_once(postgres_url: str) -> None:
    """All threads succeed, and exactly one creates each object."""
    for _ in range(3):
        with servers.fresh_schema(postgres_url) as schema:
            barrier = threading.Barrier(8)

            def migrate(schema: str = schema, barrier: threading.Barrier = barrier) -> list[str]:
                with transport_on(postgres_url, schema) as transport:
                    barrier.wait(10)
                    return transport.migrate()

            with ThreadPoolExecutor(8) as pool:
                created = [future.result(30) for future in [pool.submit(migrate) for _ in range(8)]]
            assert sorted(itertools.chain(*created)) == sorted([f"schema {schema}", *EVERYTHING])


def test_processes_can_migrate_at_once(postgres_url: str, schema: str) -> None:
    """Several processes that start together all find the tables."""
    script = "import sys; from transports.postgres import PostgresTransport; PostgresTransport(*sys.argv[1:]).migrate()"
    command = [sys.executable, "-c", script, postgres_url, schema]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(4)]
    ended = [(process.communicate(timeout=30)[1], process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * 4, ended
    with transport_on(postgres_url, schema) as transport:
        assert transport.migrate() == []
        whole_path(transport)


@pytest.mark.parametrize("text", ["text", "varchar", "varchar(255)"])
def test_product_tables_accept_every_insert(tables: Tables, text: str) -> None:
    """Tables that Django made, without any default, accept every insert of this package."""
    product.make_tables(tables, text)
    with transport_on(tables.url, tables.schema) as transport:
        created = transport.migrate()
        assert created == BESIDE_THE_PRODUCTS
        assert transport.migrate() == []
        whole_path(transport)


@pytest.mark.parametrize("text", ["text", "varchar"])
def test_no_index_is_created_twice(tables: Tables, text: str) -> None:
    """After a migration no two indexes of a table have the same columns, order and condition."""
    product.make_tables(tables, text)
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
    doubled = tables.rows(
        """SELECT indrelid::regclass::text, array_agg(indexrelid::regclass::text)
           FROM pg_index JOIN pg_class ON pg_class.oid = indrelid JOIN pg_namespace AS n ON n.oid = relnamespace
           WHERE nspname = %s
           GROUP BY indrelid, indkey::text, indoption::text, pg_get_expr(indpred, indrelid) HAVING count(*) > 1""",
        tables.schema,
    )
    assert doubled == []


def test_existing_objects_stay_unchanged(tables: Tables) -> None:
    """The product's columns, constraints, indexes and rows are the same after a migration."""
    product.make_tables(tables, "varchar")
    tables.inject("q", "{}")

    def shape() -> list[list[tuple[object, ...]]]:
        return [
            tables.rows(
                """SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity
                   FROM information_schema.columns
                   WHERE table_schema = %s AND table_name <> 'pg_queue_dead_letter' ORDER BY 1, 2""",
                tables.schema,
            ),
            tables.rows(
                "SELECT indexdef FROM pg_indexes WHERE schemaname = %s AND indexname LIKE 'product%%' ORDER BY 1",
                tables.schema,
            ),
            tables.rows("SELECT * FROM {messages}"),
        ]

    before = shape()
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
    assert shape() == before


def test_every_insert_names_every_column(postgres: PostgresTransport, tables: Tables) -> None:
    """The statements rely on no default except the numbering of rows."""
    defaults = tables.rows(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND column_default IS NOT NULL",
        tables.schema,
    )
    assert {name for (name,) in defaults} == {"msg_id", "dead_id"}
    whole_path(postgres)


@settings(max_examples=20)
@given(priority=st.integers(-(2**15), 0) | st.integers(11, 2**15 - 1))
@example(priority=0)
@example(priority=11)
def test_table_refuses_priorities_outside_range(shared: tuple[PostgresTransport, Tables], priority: int) -> None:
    """The range holds for rows of other programs as well."""
    _, tables = shared
    with pytest.raises(psycopg.errors.CheckViolation):
        tables.inject("q", "{}", priority=priority)


def test_name_conflict_is_an_error(tables: Tables) -> None:
    """If another object has the name of an index, the error names it, instead of trying for ever."""
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
        tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
        tables.execute("CREATE INDEX pg_queue_message_claimed ON {messages} (vt)")
        with pytest.raises(TransportError, match="pg_queue_message_claimed"):
            transport.migrate()


hostile_pieces = st.sampled_from(
    [*"\"'%{};.\\ \n\t\x7f\x01ß日é🧾A", "%s", "%%", "%(queue)s", "{messages}", "{}", "--", "/*", "$1", "$$", "e\u0301"]
) | st.sampled_from([" USING ", " ON ", "pg_queue_message", "NULL"])
hostile_schemas = (
    st.lists(hostile_pieces, min_size=1, max_size=8)
    .map("".join)
    .filter(lambda name: len(name.encode()) <= 63 and not name.startswith("pg_"))
)


@on_one_server
@settings(max_examples=15)
@given(schema=hostile_schemas)
@example(schema='a"b""c')
@example(schema="100% {messages} %(queue)s")
@example(schema="it's; DROP TABLE x --")
@example(schema="a USING b")
@example(schema="x" * 63)
@example(schema="ä" * 31)
@example(schema="Select")
def test_any_postgresql_name_can_be_the_schema(postgres_url: str, schema: str) -> None:
    """Names with quotes, percent signs, braces and Unicode work on the whole path, also migrated twice."""
    try:
        with transport_on(postgres_url, schema) as transport:
            with psycopg.connect(postgres_url) as connection:
                connection.execute(transport.migration_sql().encode())
                connection.rollback()
            assert transport.migrate() == [f"schema {schema}", *EVERYTHING]
            assert transport.migrate() == []
            whole_path(transport)
            consumer = Consumer(transport, {"t": lambda *args: 1, "done": lambda result: None}, ["consumed"])
            transport.send([message("t", "consumed", on_success=then("done", "consumed"), task_id="id")])
            assert consumer.drain(timeout=10) == 2
            with psycopg.connect(postgres_url) as connection:
                transport.send([message("t", "within", "50 %")], within=connection.cursor())
            assert len(receive_all(transport, "within")) == 1
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


@pytest.mark.parametrize("schema", ["", "x" * 64, "ä" * 32, "a\0b", "\ud800", None, 7])
def test_impossible_schema_name_is_refused(schema: str) -> None:
    """The constructor says what is wrong with the name, and cuts or replaces nothing."""
    with pytest.raises(ConfigurationError, match="schema"):
        PostgresTransport("postgresql://user@host/database", schema)


def test_invalid_index_is_not_accepted(postgres: PostgresTransport, tables: Tables) -> None:
    """The error names the index that a failed CREATE INDEX CONCURRENTLY left, and says to drop it."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_ready")
    postgres.send([message("t", "q")] * 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        tables.execute("CREATE UNIQUE INDEX CONCURRENTLY failed ON {messages} (queue_name)")
    with pytest.raises(TransportNotReady, match=r"the index failed .* is not valid.*drop the index"):
        postgres.migrate()
    tables.execute("DROP INDEX {schema}.failed")
    assert postgres.migrate() == ["pg_queue_message_ready"]


def test_table_without_a_column_fails_migration(postgres: PostgresTransport, tables: Tables) -> None:
    """The error names an existing table that lacks a column, and the file to compare it with."""
    tables.execute("ALTER TABLE {results} DROP COLUMN error")
    with pytest.raises(TransportNotReady, match=r"column r.error does not exist.*schema.sql"):
        postgres.migrate()


def test_invalid_index_of_other_table_is_ignored(postgres: PostgresTransport, tables: Tables) -> None:
    """Other tables of the product's schema do not affect a migration."""
    tables.execute("CREATE TABLE {schema}.pg_other AS SELECT 1 AS n FROM generate_series(1, 2)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        tables.execute("CREATE UNIQUE INDEX CONCURRENTLY ON {schema}.pg_other (n)")
    assert postgres.migrate() == []


def test_missing_key_on_results_fails_at_start(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Without a unique task_id no reply can be written once: migrate and subscribe raise an error."""
    tables.execute("ALTER TABLE {results} DROP CONSTRAINT pg_task_result_pkey")
    for look in (postgres.migrate, lambda: postgres.subscribe([queue], lease=1)):
        with pytest.raises(TransportNotReady, match=r"ON CONFLICT.*schema.sql"):
            look()


def test_printed_sql_can_omit_product_tables() -> None:
    """With `create_tables=False` it creates the dead letters and the indexes, as `migrate` does."""
    transport = PostgresTransport("postgresql://nobody@127.0.0.1:1/nothing")
    printed = transport.migration_sql(create_tables=False)
    assert "CREATE TABLE" in printed
    assert not re.search(r"CREATE TABLE \S*pg_(queue_message|task_result)\W", printed)
    assert re.search(r"CREATE TABLE \S*pg_queue_message\W", transport.migration_sql())
    transport.close()
