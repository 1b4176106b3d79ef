"""The version mark of a schema: an older version never migrates the tables of a newer one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from click.testing import CliRunner
from pg_tables import Tables
from postgres import product
from postgres.support import on_one_server, transport_on
from psycopg import sql
from queues import receive_all

from contract_tests.messages import message, then
from transports.postgres import PostgresTransport, migrate
from transports.postgres.execution import run
from transports.postgres.migrate import SCHEMA_VERSION, schema_version
from transports.postgres.statements import Statements
from unstract_core import ConfigurationError, Consumer, cli

COMMENT = "SELECT obj_description(c.oid, 'pg_class') FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace "
OURS = f"unstract-wire schema {SCHEMA_VERSION}"


def mark(tables: Tables, comment: str | None) -> None:
    """Set the comment of pg_queue_dead_letter, as the migrate of another version does."""
    with tables.connect() as connection:
        connection.execute(sql.SQL("{} {}").format(tables.sql("COMMENT ON TABLE {dead} IS"), comment))


def marked(tables: Tables) -> str | None:
    where = "WHERE n.nspname = %s AND relname = 'pg_queue_dead_letter'"
    ((comment,),) = tables.rows(COMMENT + where, tables.schema)
    return None if comment is None else str(comment)


def everything(tables: Tables) -> list[list[tuple[object, ...]]]:
    """Return the relations, columns, constraints and comments of the schema."""
    return [
        tables.rows(statement, tables.schema)
        for statement in (
            "SELECT oid, relname, relfilenode, reloptions::text, relacl::text FROM pg_class"
            " WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) ORDER BY oid",
            "SELECT table_name, column_name, data_type, column_default FROM information_schema.columns"
            " WHERE table_schema = %s ORDER BY 1, ordinal_position",
            "SELECT oid, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) ORDER BY 1",
            COMMENT + "WHERE n.nspname = %s ORDER BY c.oid",
        )
    ]


def test_migrated_schema_has_a_version_mark(postgres: PostgresTransport, tables: Tables) -> None:
    """The mark is the comment of pg_queue_dead_letter; `schema_version` reads it without any right."""
    assert marked(tables) == OURS == "unstract-wire schema 1"
    with tables.connect() as connection:
        execute = partial(run, connection)  # type: ignore[arg-type]  # any connection will do here
        assert schema_version(execute, Statements(tables.schema)) == SCHEMA_VERSION
        assert schema_version(execute, Statements(tables.schema + "x")) is None


@pytest.mark.parametrize("comment", [None, "unstract-wire schema 0", "letters of ours", "unstract-wire schema 2 or so"])
def test_migrate_marks_an_older_installation(postgres: PostgresTransport, tables: Tables, comment: str | None) -> None:
    """A schema without a mark, or with a lower one, gets it; nothing else changes."""
    mark(tables, comment)
    before = everything(tables)[:-1]
    assert postgres.migrate() == []
    assert (marked(tables), everything(tables)[:-1]) == (OURS, before)


def test_product_tables_keep_their_comments(tables: Tables) -> None:
    """If the product made the first two tables, the mark is on pg_queue_dead_letter alone."""
    product.make_tables(tables, "text")
    tables.execute("COMMENT ON TABLE {messages} IS 'the product'")
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
    assert marked(tables) == OURS
    assert tables.rows("SELECT obj_description(%s::regclass, 'pg_class')", f"{tables.schema}.pg_queue_message") == [
        ("the product",)
    ]


def test_version_rises_with_its_steps(
    postgres: PostgresTransport, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a version and its mark are one transaction: a failed migration leaves the old mark."""
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", 2)
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    tables.execute("CREATE TABLE {schema}.pg_queue_message_claimed ()")
    with pytest.raises(Exception, match="pg_queue_message_claimed"):
        postgres.migrate()
    assert marked(tables) == OURS
    tables.execute("DROP TABLE {schema}.pg_queue_message_claimed")
    assert postgres.migrate() == ["pg_queue_message_claimed"]
    assert marked(tables) == "unstract-wire schema 2"


@pytest.mark.parametrize("newer", [SCHEMA_VERSION + 1, 999_999_999])
def test_older_migrate_refuses_a_newer_schema(postgres: PostgresTransport, tables: Tables, newer: int) -> None:
    """The error names both versions, the schema and the remedy, and nothing was changed."""
    mark(tables, f"unstract-wire schema {newer}")
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed; ALTER TABLE {results} ADD COLUMN trace text")
    before = everything(tables)
    with pytest.raises(ConfigurationError) as caught:
        postgres.migrate()
    for part in (f"schema {tables.schema} ", f"version {newer}", f"version {SCHEMA_VERSION};", "newer unstract-wire"):
        assert part in str(caught.value)
    assert everything(tables) == before


def test_command_refuses_newer_schema_in_one_line(postgres: PostgresTransport, tables: Tables) -> None:
    """`unstract-wire migrate` of an older version exits with 2 and prints one line on stderr."""
    mark(tables, "unstract-wire schema 2")
    ended = CliRunner().invoke(cli.main, ["migrate", "--url", f"{tables.url}?schema={tables.schema}"])
    assert (ended.exit_code, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"unstract-wire: migrate: the tables in schema {tables.schema} are of version 2,")


def test_worker_runs_without_a_newer_index(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Before `migrate` a worker works and counts as afterwards, except for rows in unknown states."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_held, {schema}.pg_queue_message_strange")
    postgres.send([message("t", queue, delay=delay) for delay in (0, 0.3)] + [message("t", f"{queue}-x", delay=3600)])
    mine, other = postgres.queues()
    assert (mine.ready, mine.delayed, other.delayed, other.unknown) == (1, 1, 1, 0)
    assert Consumer(postgres, {"t": lambda: None}, [queue]).drain(timeout=30) == 2


def test_worker_runs_on_a_newer_schema(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """It sends, runs, sends follow-ups, dead-letters and replays, and ignores the additions."""
    mark(tables, "unstract-wire schema 2")
    tables.execute("ALTER TABLE {messages} ADD COLUMN trace text; ALTER TABLE {dead} ADD COLUMN trace text DEFAULT ''")
    with transport_on(tables.url, tables.schema) as transport:
        consumer = Consumer(transport, {"t": lambda: 1, "done": lambda result: None}, [queue])
        transport.send([message("t", queue, on_success=then("done", queue), task_id=queue), message("unknown", queue)])
        assert consumer.drain(timeout=30) == 2
        status = transport.reply(queue)
        assert status is not None
        assert status.status == "completed"
        assert len(transport.dead.replay(queue=queue)) == 1
        assert len(receive_all(transport, queue)) == 1


@on_one_server
def test_concurrent_migrations_never_lower_the_mark(
    postgres: PostgresTransport, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older migrate that waits for a newer one finds its mark, refuses, and has created nothing."""
    mark(tables, None)
    tables.execute("DROP INDEX {schema}.pg_task_result_expires")
    with (
        ThreadPoolExecutor(1) as pool,
        tables.locked("COMMENT ON TABLE {dead} IS 'unstract-wire schema 2'") as newer,
        transport_on(f"{tables.url}?application_name=older", tables.schema) as older,
    ):
        asked = pool.submit(older.migrate)
        tables.wait_for_lock("older")
        newer.commit()
        with pytest.raises(ConfigurationError, match="version 2"):
            asked.result(30)
    assert marked(tables) == "unstract-wire schema 2"
    indexes = tables.rows("SELECT indexname FROM pg_indexes WHERE schemaname = %s", tables.schema)
    assert "pg_task_result_expires" not in {name for (name,) in indexes}


def test_concurrent_marks_succeed(postgres: PostgresTransport, tables: Tables) -> None:
    """Several processes that mark a schema at once all succeed."""
    mark(tables, None)
    barrier = threading.Barrier(6)

    def migrates() -> list[str]:
        with transport_on(tables.url, tables.schema) as transport:
            barrier.wait(30)
            return transport.migrate()

    with ThreadPoolExecutor(6) as pool:
        assert [future.result(60) for future in [pool.submit(migrates) for _ in range(6)]] == [[]] * 6
    assert marked(tables) == OURS
