"""The checks of doctor: each problem is provoked, detected, named, and reported with its remedy."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import servers
from pg_tables import Tables
from pgbouncer import private_pgbouncer
from postgres import product
from postgres.support import named, on_one_server, transport_on
from proxy import Proxy, proxy
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from queues import answer, bury, queue_name, receive_all

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport, migrate
from transports.postgres.diagnostics.probe import DiagnosticLimits
from unstract_core import Reply
from unstract_core.observability.diagnostics import Finding

EVERY_CHECK = {
    "connection",
    "server",
    "encoding",
    "durability",
    "pooler",
    "listen",
    "clock",
    "connections",
    "notifications",
    "snapshots",
    "schema",
    "tables",
    "rights",
    "indexes",
    "autovacuum",
    "leases",
    "waiting",
    "dead letters",
    "replies",
}
OF_THE_SERVER = {"durability", "connections", "notifications", "snapshots", "autovacuum"}
"""Checks whose result depends on other tests or on the settings of the machine's server."""


def check(transport: PostgresTransport, **limits: Any) -> list[Finding]:
    return list(transport.check_up(limits=DiagnosticLimits(**limits)))


def of(name: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def problems(findings: list[Finding]) -> list[Finding]:
    """Return the findings that are not "ok", except those that depend on the server."""
    return [finding for finding in findings if finding.level != "ok" and finding.name not in OF_THE_SERVER]


def the(name: str, findings: list[Finding]) -> Finding:
    (finding,) = of(name, findings)
    return finding


@contextlib.contextmanager
def through_proxy(url: str, schema: str, **options: Any) -> Iterator[tuple[Proxy, PostgresTransport]]:
    """A proxy to the server of `url`, and a transport through it."""
    parts = conninfo_to_dict(url)
    with (
        proxy(str(parts["host"]), int(str(parts["port"]))) as between,
        transport_on(make_conninfo(url, port=between.port), schema, **options) as transport,
    ):
        yield between, transport


def test_healthy_schema_passes_every_check(postgres: PostgresTransport, queue: str) -> None:
    """Every check runs and reports "ok" for a fresh schema in use."""
    postgres.send([message("t", queue), message("t", queue, delay=60.0)])
    findings = check(postgres)
    assert {finding.name for finding in findings} == EVERY_CHECK
    assert all(finding.what for finding in findings)
    assert problems(findings) == []


def test_product_tables_pass_every_check(tables: Tables) -> None:
    """An index counts by its definition under any name, and a primary key in any form."""
    product.make_tables(tables, "varchar(255)")
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
        findings = check(transport)
    assert problems(findings) == []
    assert "ALTER TABLE" in of("autovacuum", findings)[-1].remedy or of("autovacuum", findings)[-1].level == "warning"


@pytest.mark.parametrize(
    "schema", ['a"b', "a b%s", "{x}", "ä;--", "x" * 63], ids=["quote", "percent", "brace", "umlaut", "long"]
)
@on_one_server
def test_schema_of_any_name_is_checked(postgres_url: str, schema: str) -> None:
    """Names are identifiers, and never part of a statement's text."""
    tables = Tables(postgres_url, schema)
    try:
        with transport_on(postgres_url, schema) as transport:
            transport.migrate()
            findings = check(transport)
    finally:
        tables.execute("DROP SCHEMA IF EXISTS {schema} CASCADE")
    assert problems(findings) == []


def test_checks_are_skipped_without_connection() -> None:
    """The first finding is an error with the network's message; all others are skipped."""
    with transport_on("postgresql://nobody@127.0.0.1:1/nothing", "s") as transport:
        first, *others = check(transport)
    assert (first.name, first.level) == ("connection", "error")
    assert "refused" in first.what
    assert first.remedy
    assert {finding.level for finding in others} == {"skipped"}
    assert {first.name, *(finding.name for finding in others)} == EVERY_CHECK - {"encoding", "durability"}


@on_one_server
def test_broken_connection_fails_one_check(postgres_url: str, postgres: PostgresTransport, schema: str) -> None:
    """The next check connects again."""
    with through_proxy(postgres_url, schema) as (between, transport):
        between.lose(b"pg_notification_queue_usage")
        findings = check(transport)
    assert the("notifications", findings).level == "warning"
    assert "could not be checked" in the("notifications", findings).what
    assert the("tables", findings).level == the("leases", findings).level == "ok"


def test_missing_tables_are_named(postgres_url: str, schema: str) -> None:
    """Each missing table is an error with `migrate` as the remedy; the checks of its rows are skipped."""
    with transport_on(postgres_url, schema) as transport:
        findings = check(transport)
    assert [finding.level for finding in of("tables", findings)] == ["error"] * 3
    assert all("unstract-wire migrate" in finding.remedy for finding in of("tables", findings))
    for name in ("rights", "indexes", "leases", "waiting", "dead letters", "replies"):
        assert the(name, findings).level == "skipped"


def test_sequence_behind_its_ids_is_named(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The warning has the highest existing id and the statement that corrects the sequence."""
    postgres.send([message("t", queue)] * 3)
    tables.execute("SELECT setval(pg_get_serial_sequence('{messages}', 'msg_id'), 1)")
    finding = the("tables", check(postgres))
    assert (finding.level, "behind the id 3" in finding.what) == ("warning", True)
    tables.execute(finding.remedy)
    assert the("tables", check(postgres)).level == "ok"


def test_missing_column_is_named(postgres: PostgresTransport, tables: Tables) -> None:
    """The error names the table and the file to compare it with."""
    tables.execute("ALTER TABLE {dead} DROP COLUMN attempts")
    finding = the("tables", check(postgres))
    assert (finding.level, finding.what) == ("error", "pg_queue_dead_letter has no column attempts")
    assert "schema.sql" in finding.remedy


@pytest.mark.parametrize(
    ("index", "table", "level"),
    [
        ("pg_queue_message_ready", "pg_queue_message", "error"),
        ("pg_queue_message_claimed", "pg_queue_message", "error"),
        ("pg_queue_message_held", "pg_queue_message", "error"),
        ("pg_queue_message_strange", "pg_queue_message", "warning"),
        ("pg_task_result_expires", "pg_task_result", "error"),
        ("pg_queue_dead_letter_queue", "pg_queue_dead_letter", "error"),
    ],
)
@on_one_server
def test_missing_index_is_named_with_its_statement(
    postgres: PostgresTransport, tables: Tables, index: str, table: str, level: str
) -> None:
    """The remedy for a large table can be run as it is, and creates the index."""
    tables.execute(f"DROP INDEX {{schema}}.{index}")
    finding = the("indexes", check(postgres))
    assert finding.level == level
    assert index in finding.what
    assert table in finding.what
    with tables.connect() as connection:
        connection.execute(finding.remedy.partition("table: ")[2].encode())
    assert the("indexes", check(postgres)).level == "ok"


@on_one_server
def test_index_with_wrong_columns_counts_as_missing(postgres: PostgresTransport, tables: Tables) -> None:
    """An index counts by its definition, not by its name."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    tables.execute("CREATE INDEX pg_queue_message_claimed ON {messages} (read_ct)")
    finding = the("indexes", check(postgres))
    assert (finding.level, "pg_queue_message_claimed" in finding.what) == ("error", True)


@on_one_server
def test_index_that_prevents_hot_updates_is_named(postgres: PostgresTransport, tables: Tables) -> None:
    """An index with `vt`, as earlier versions created it, is a warning with the statement that drops it."""
    tables.execute("CREATE INDEX pg_queue_message_due ON {messages} (queue_name, vt) WHERE state = 'claimed'")
    finding = the("indexes", check(postgres))
    assert (finding.level, "pg_queue_message_due" in finding.what) == ("warning", True)
    with tables.connect() as connection:
        connection.execute(finding.remedy.partition("runs: ")[2].encode())
    assert the("indexes", check(postgres)).level == "ok"


def test_invalid_index_is_named_with_remedy(postgres: PostgresTransport, tables: Tables) -> None:
    """The remedy for an index of a failed CREATE INDEX CONCURRENTLY is to drop it."""
    postgres.send([message("t", "q")] * 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        tables.execute("CREATE UNIQUE INDEX CONCURRENTLY failed ON {messages} (queue_name)")
    finding = the("indexes", check(postgres))
    assert finding.level == "error"
    assert finding.what.startswith("failed is not valid")
    assert "drop it" in finding.remedy


@on_one_server
def test_missing_primary_key_is_named(postgres: PostgresTransport, tables: Tables) -> None:
    """A table without its primary key is an error."""
    tables.execute("ALTER TABLE {messages} DROP CONSTRAINT pg_queue_message_pkey")
    finding = the("indexes", check(postgres))
    assert (finding.level, finding.what) == ("error", "pg_queue_message has no unique index on msg_id")


@pytest.mark.parametrize(
    ("taken", "level", "said"),
    [
        ("DELETE ON {results}", "warning", "DELETE on pg_task_result"),
        ("UPDATE, DELETE ON {messages}", "warning", "if it is to work"),
        ("INSERT ON {messages}", "error", "grant this role the right"),
        ("USAGE ON ALL SEQUENCES IN SCHEMA {schema}", "error", "grant this role the right"),
        ("USAGE ON SEQUENCE {schema}.pg_queue_dead_letter_dead_id_seq", "warning", "if it is to work"),
    ],
)
@on_one_server
def test_missing_right_is_reported_by_its_effect(
    limited: tuple[str, str], tables: Tables, taken: str, level: str, said: str
) -> None:
    """A role that may only send, or cannot purge replies, gets a warning; one that cannot send gets an error."""
    url, role = limited
    tables.execute(f"REVOKE {taken} FROM {role}")
    with transport_on(url, tables.schema) as transport:
        finding = the("rights", check(transport))
    assert (finding.level, said in finding.remedy) == (level, True), finding


@on_one_server
def test_check_without_right_is_skipped_alone(limited: tuple[str, str], tables: Tables) -> None:
    """A role that cannot read dead letters still gets the findings about messages and replies."""
    url, role = limited
    tables.execute(f"REVOKE SELECT ON {{dead}} FROM {role}")  # noqa: S608 - the role of this test
    with transport_on(url, tables.schema) as transport:
        findings = check(transport)
    finding = the("dead letters", findings)
    assert (finding.level, finding.remedy) == ("skipped", "it takes SELECT on the table; grant this role the right")
    assert "could not be checked" in finding.what
    assert the("replies", findings).level == the("leases", findings).level == "ok"


@on_one_server
def test_pooler_is_reported(postgres_url: str, postgres: PostgresTransport, schema: str) -> None:
    """A pooler is a warning if the transport listens, and "ok" with listen=false."""
    with through_proxy(postgres_url, schema) as (between, transport):
        between.hide_the_process = True
        finding = the("pooler", check(transport))
    assert (finding.level, "listen=false" in finding.remedy) == ("warning", True)
    with through_proxy(postgres_url, schema, listen=False) as (between, transport):
        between.hide_the_process = True
        findings = check(transport)
    assert (the("pooler", findings).level, the("listen", findings).level) == ("ok", "skipped")


@on_one_server
def test_lost_notification_is_detected(postgres_url: str, postgres: PostgresTransport, schema: str) -> None:
    """The check sends a notification and waits for it, so it detects one that is lost."""
    with through_proxy(postgres_url, schema) as (between, transport):
        assert the("listen", check(transport)).level == "ok"
        between.swallow(b"unstract_wire_check_")
        finding = the("listen", check(transport, notification=0.5))
    assert (finding.level, "listen=false" in finding.remedy) == ("warning", True)
    assert "no notification came in 0.5 s" in finding.what


def test_pgbouncer_is_reported_with_failed_listening(server_url: str) -> None:
    """Through PgBouncer in transaction mode every check runs; only "pooler" and "listen" are not "ok"."""
    with private_pgbouncer(server_url) as pgbouncer, servers.fresh_schema(server_url) as schema:
        with transport_on(server_url, schema) as direct:
            direct.migrate()
        with transport_on(pgbouncer.url, schema) as transport:
            findings = check(transport, notification=1.0)
    assert {finding.name for finding in findings} == EVERY_CHECK
    named = {finding.name for finding in findings if finding.level != "ok"} - OF_THE_SERVER
    assert named == {"pooler", "listen"}


def test_clocks_are_compared(postgres: PostgresTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has the difference and says which clock is ahead; it is "ok", because nothing depends on it."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 100.0)
    finding = the("clock", check(postgres))
    assert finding.level == "ok"
    assert "is 100." in finding.what or "is 99.9" in finding.what
    assert "ahead of" in finding.what


@pytest.mark.parametrize(
    ("comment", "level", "said"),
    [
        ("unstract-wire schema 2", "ok", ""),
        ("unstract-wire schema 1", "warning", "unstract-wire migrate"),
        ("a comment of another kind", "warning", "unstract-wire migrate"),
        ("unstract-wire schema 11", "error", "bring this package up to date"),
    ],
)
@on_one_server
def test_schema_version_is_compared(
    postgres: PostgresTransport,
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    comment: str,
    level: str,
    said: str,
) -> None:
    """An older schema is a warning with `migrate` as the remedy; a newer one is an error."""
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", 2)
    tables.execute(f"COMMENT ON TABLE {{dead}} IS '{comment}'")
    finding = the("schema", check(postgres))
    assert (finding.level, said in finding.remedy) == (level, True)


def test_table_without_vacuum_is_reported(postgres: PostgresTransport, tables: Tables) -> None:
    """The warning says that autovacuum is off for the table, and counts its dead rows."""
    tables.execute("ALTER TABLE {messages} SET (autovacuum_enabled = false)")
    postgres.send([message("t", "q", n) for n in range(50)])
    tables.execute("DELETE FROM {messages}")
    texts: list[str] = []

    def counts_dead_rows() -> bool:
        texts[:] = [finding.what + finding.remedy for finding in of("autovacuum", check(postgres, dead_rows=10))]
        return any("50 dead rows to 0 live ones" in text for text in texts)

    wait_until(counts_dead_rows, what="the dead rows to be counted")
    assert any("is off for pg_queue_message" in text and "autovacuum_enabled = true" in text for text in texts)


def test_idle_transaction_is_named(postgres: PostgresTransport, tables: Tables, name: str) -> None:
    """The warning has the session's process id, state and age, and the age of its snapshot in transactions."""
    with psycopg.connect(named(tables.url, name)) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT 1")
        findings = check(postgres, transaction=0.0)
        (finding,) = [finding for finding in of("snapshots", findings) if name in finding.what]
        assert finding.level == "warning"
        assert f"pid {other.info.backend_pid} " in finding.what
        assert "idle in transaction" in finding.what
        assert "holds a snapshot" in finding.what
        assert f"pg_terminate_backend({other.info.backend_pid})" in finding.remedy


@on_one_server
def test_old_snapshot_of_hidden_session_is_reported(limited: tuple[str, str], tables: Tables, name: str) -> None:
    """A role without pg_read_all_stats sees no state and no time of a session, but the age of its snapshot."""
    with psycopg.connect(named(tables.url, name)) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT 1")
        with transport_on(limited[0], tables.schema) as transport:
            findings = check(transport, transaction=0.0, transactions=0)
        (finding,) = [finding for finding in of("snapshots", findings) if name in finding.what]
    assert "a time that this role may not see" in finding.what
    assert "holds a snapshot" in finding.what


def test_abandoned_leases_are_counted_by_queue(postgres: PostgresTransport, tables: Tables) -> None:
    """Leases that ended long ago are counted; recent and running ones are not."""
    stuck, fine = queue_name(), f"{queue_name()} it's"
    for queue in (stuck, fine):
        postgres.send([message("t", queue), message("t", queue)])
        receive_all(postgres, queue)
    assert the("leases", check(postgres)).level == "ok"
    tables.execute("UPDATE {messages} SET vt = now() - interval '1 hour' WHERE queue_name = %s", stuck)
    finding = the("leases", check(postgres))
    assert finding.level == "warning"
    assert f"2 in '{stuck}'" in finding.what
    assert f"--queue {stuck}" in finding.remedy
    assert fine not in finding.what


def test_waiting_messages_are_reported_with_worker_state(postgres: PostgresTransport, tables: Tables) -> None:
    """For a queue without workers the remedy is a worker; for one with workers, more of them."""
    idle, busy, fresh = f"{queue_name()} it's", queue_name(), queue_name()
    for queue in (idle, busy):
        postgres.send([message("t", queue), message("t", queue)])
    tables.execute("UPDATE {messages} SET vt = vt - interval '1 hour', enqueued_at = enqueued_at - interval '1 hour'")
    subscription = postgres.subscribe([busy], lease=60.0)
    assert len(subscription.receive(limit=1, wait=0)) == 1
    postgres.send([message("t", fresh)])
    alone, behind = of("waiting", check(postgres))
    subscription.close()
    assert (alone.level, behind.level) == ("warning", "warning")
    assert "no worker claims them" in alone.what
    assert "2 in " in alone.what
    assert idle in alone.what
    assert "it'\"'\"'s'" in alone.remedy
    assert f"1 in '{busy}'" in behind.what
    assert "1 at work" in behind.what
    assert "workers" in behind.remedy
    assert fresh not in alone.what + behind.what


def test_dead_letters_are_counted_without_content(postgres: PostgresTransport) -> None:
    """The finding has the error type of the newest dead letter, and none of its text."""
    queue = queue_name()
    for reason in ("KeyError: old", "ValueError: secret-word of a payload"):
        postgres.send([message("t", queue, "secret-word")])
        bury(postgres, queue, reason)
    findings = check(postgres)
    finding = the("dead letters", findings)
    assert (finding.level, finding.what) == ("warning", f"2 in '{queue}' (the newest: ValueError)")
    assert f"dead list --queue {queue}" in finding.remedy
    assert not any("secret-word" in finding.what + finding.remedy for finding in findings)


def test_expired_replies_are_reported(postgres: PostgresTransport, tables: Tables) -> None:
    """Only replies that expired long ago are a warning; others wait for the next purge."""
    answer(postgres, Reply("old", "completed"))
    tables.execute("UPDATE {results} SET expires_at = now() - interval '1 minute'")
    assert the("replies", check(postgres)).level == "ok"
    tables.execute("UPDATE {results} SET expires_at = now() - interval '2 hours'")
    finding = the("replies", check(postgres))
    assert (finding.level, finding.what[:26]) == ("warning", "1 expired replies are left")
    assert "DELETE on pg_task_result" in finding.remedy


@pytest.mark.parametrize("moment", ["-infinity", "infinity", "4713-01-01 BC"])
def test_no_timestamp_breaks_a_check(postgres: PostgresTransport, tables: Tables, queue: str, moment: str) -> None:
    """Other programs may write any timestamp into the tables; every check still runs."""
    postgres.send([message("t", queue), message("t", queue)])
    receive_all(postgres, queue)
    answer(postgres, Reply("r", "completed"))
    postgres.send([message("t", queue)])
    tables.execute(f"UPDATE {{messages}} SET vt = '{moment}', enqueued_at = '{moment}'")  # noqa: S608 - from above
    tables.execute(f"UPDATE {{results}} SET expires_at = '{moment}'")  # noqa: S608 - likewise
    findings = check(postgres)
    assert not any("could not be checked" in finding.what for finding in findings)
    assert the("leases", findings).level == ("ok" if moment == "infinity" else "warning")
    assert the("replies", findings).level == ("ok" if moment == "infinity" else "warning")


@on_one_server
def test_read_only_server_is_an_error(postgres_url: str, postgres: PostgresTransport) -> None:
    """The remedy leads to the new primary after a failover."""
    url = make_conninfo(postgres_url, options="-c default_transaction_read_only=on")
    with transport_on(url, postgres._statements.schema) as transport:
        finding = the("server", check(transport))
    assert (finding.level, "target_session_attrs=read-write" in finding.remedy) == ("error", True)


@on_one_server
def test_filling_notification_queue_is_reported(postgres: PostgresTransport, tables: Tables) -> None:
    """The queue fills because a session listens and never reads."""
    with tables.connect() as listener:
        listener.execute("LISTEN anything")
        listener.execute("BEGIN")
        tables.rows("SELECT pg_notify('anything', repeat('x', 7000) || n) FROM generate_series(1, 500) AS n")
        finding = the("notifications", check(postgres, notification_queue=0.0))
        listener.execute("ROLLBACK")
    assert (finding.level, "pg_terminate_backend" in finding.remedy) == ("warning", True)


@on_one_server
def test_exhausted_connection_limit_is_reported(limited: tuple[str, str], tables: Tables) -> None:
    """The finding is about the lowest limit: of the server, the database or the role."""
    url, role = limited
    tables.execute(f"ALTER ROLE {role} CONNECTION LIMIT 3")
    with transport_on(url, tables.schema) as transport:
        finding = the("connections", check(transport))
    assert finding.level == "warning"
    assert "of 3 connections are in use (the role's limit)" in finding.what
    assert "ALTER ROLE" in finding.remedy


@pytest.fixture(scope="module")
def neglected() -> Iterator[str]:
    """A database with another encoding, on a server with wrong settings."""
    options = "-c autovacuum=off -c synchronous_commit=off -c max_connections=8 -c max_prepared_transactions=2"
    with servers.private_server(options=options) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE old ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        yield make_conninfo(server.url, dbname="old")


def test_wrong_server_settings_are_reported(neglected: str) -> None:
    """Encoding, durability, autovacuum, free connections and a prepared transaction are separate findings."""
    with transport_on(neglected, "s") as transport:
        transport.migrate()
        with psycopg.connect(neglected, autocommit=True) as connection:
            connection.execute("BEGIN")
            connection.execute("CREATE TABLE forgotten ()")
            connection.execute("PREPARE TRANSACTION 'forgotten'")
            findings = check(transport, transaction=0.0)
            connection.execute("ROLLBACK PREPARED 'forgotten'")
    assert (the("encoding", findings).level, the("encoding", findings).what[:9]) == ("error", "SQL_ASCII")
    assert "synchronous_commit" in the("durability", findings).remedy
    assert "whole server" in the("autovacuum", findings).what
    room = the("connections", findings)
    assert (room.level, "max_connections" in room.what) == ("warning", True)
    assert any("prepared transaction forgotten" in finding.what for finding in of("snapshots", findings))


def test_connected_workers_are_listed(
    make_named: Callable[..., PostgresTransport], name: str, postgres_url: str
) -> None:
    """The list has this package's sessions and those with the same application name, without their statements."""
    watching = make_named()
    subscription = watching.subscribe(["q"], lease=60.0)
    own = f"unstract-wire worker test-{uuid.uuid4().hex[:8]}"
    with psycopg.connect(named(postgres_url, own), autocommit=True) as other:
        other.execute("SELECT 'secret-word'")
        workers = watching.workers()
        subscription.close()
        (state,) = [worker for worker in workers if worker.name == own]
        assert (state.pid, state.state, state.address) == (other.info.backend_pid, "idle", "127.0.0.1")
        assert state.since is not None
        assert 0 <= state.since < 300
    assert [worker.name for worker in workers if worker.name == name] == [name]
    assert "secret-word" not in repr(workers)


@on_one_server
def test_sessions_of_other_roles_show_only_names(
    limited: tuple[str, str], tables: Tables, postgres: PostgresTransport
) -> None:
    """State and address are hidden until pg_read_all_stats is granted."""
    url, role = limited
    subscription = postgres.subscribe(["q"], lease=60.0)
    with transport_on(url, tables.schema) as watching:
        assert {(worker.state, worker.since, worker.address) for worker in watching.workers()} == {(None, None, "")}
        tables.execute(f"GRANT pg_read_all_stats TO {role}")
        assert {worker.state for worker in watching.workers()} == {"idle"}
    subscription.close()
