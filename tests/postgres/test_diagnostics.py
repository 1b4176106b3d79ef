"""The check-up: each thing that can be wrong is provoked, and found, named, and told with its remedy."""

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
"""What other tests, or the settings of the machine's server, have a say in."""


def check(transport: PostgresTransport, **limits: Any) -> list[Finding]:
    return list(transport.check_up(limits=DiagnosticLimits(**limits)))


def of(name: str, found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.name == name]


def the(name: str, found: list[Finding]) -> Finding:
    (finding,) = of(name, found)
    return finding


@contextlib.contextmanager
def reached(url: str) -> Iterator[Proxy]:
    """A proxy before the server of `url`."""
    parts = conninfo_to_dict(url)
    with proxy(str(parts["host"]), int(str(parts["port"]))) as between:
        yield between


def test_of_a_sound_schema_everything_is_ok(postgres: PostgresTransport, queue: str) -> None:
    """Every check is made, each says what it found, and none has anything to say against a fresh schema in use."""
    postgres.send([message("t", queue), message("t", queue, delay=60.0)])
    found = check(postgres)
    assert {finding.name for finding in found} == EVERY_CHECK
    assert all(finding.what for finding in found)
    assert [finding for finding in found if finding.level != "ok" and finding.name not in OF_THE_SERVER] == []


def test_of_the_products_tables_everything_is_ok(tables: Tables) -> None:
    """An index counts by what it indexes, whatever it is called, and a key however it was made."""
    product.make_tables(tables, "varchar(255)")
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
        found = check(transport)
    assert [finding for finding in found if finding.level != "ok" and finding.name not in OF_THE_SERVER] == []
    assert "ALTER TABLE" in of("autovacuum", found)[-1].remedy or of("autovacuum", found)[-1].level == "warning"


@pytest.mark.parametrize(
    "schema", ['a"b', "a b%s", "{x}", "ä;--", "x" * 63], ids=["quote", "percent", "brace", "umlaut", "long"]
)
@on_one_server
def test_a_schema_of_any_name_is_checked(postgres_url: str, schema: str) -> None:
    """Names are identifiers, and never a part of a statement's text."""
    tables = Tables(postgres_url, schema)
    try:
        with transport_on(postgres_url, schema) as transport:
            transport.migrate()
            found = check(transport)
    finally:
        tables.execute("DROP SCHEMA IF EXISTS {schema} CASCADE")
    assert [finding for finding in found if finding.level != "ok" and finding.name not in OF_THE_SERVER] == []


def test_where_there_is_no_connection_the_others_say_that_they_were_not_made() -> None:
    """One error with what the network said; nothing is raised."""
    with transport_on("postgresql://nobody@127.0.0.1:1/nothing", "s") as transport:
        first, *others = check(transport)
    assert (first.name, first.level) == ("connection", "error")
    assert "refused" in first.what
    assert first.remedy
    assert {finding.level for finding in others} == {"skipped"}
    assert {first.name, *(finding.name for finding in others)} == EVERY_CHECK - {"encoding", "durability"}


@on_one_server
def test_a_connection_that_breaks_costs_one_check_and_no_other(postgres_url: str, postgres: PostgresTransport) -> None:
    """The next check connects anew."""
    with reached(postgres_url) as between:
        url = make_conninfo(postgres_url, port=between.port)
        with transport_on(url, postgres._statements.schema) as transport:
            between.lose(b"pg_notification_queue_usage")
            found = check(transport)
    assert the("notifications", found).level == "warning"
    assert "could not be checked" in the("notifications", found).what
    assert the("tables", found).level == the("leases", found).level == "ok"


def test_tables_that_are_not_there_are_named(postgres_url: str, schema: str) -> None:
    """Each of them, with `migrate` as the remedy; what could have been asked of them was not looked at."""
    with transport_on(postgres_url, schema) as transport:
        found = check(transport)
    assert [finding.level for finding in of("tables", found)] == ["error"] * 3
    assert all("unstract-wire migrate" in finding.remedy for finding in of("tables", found))
    for name in ("rights", "indexes", "leases", "waiting", "dead letters", "replies"):
        assert the(name, found).level == "skipped"


def test_a_sequence_that_is_behind_is_named(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """With the highest id that exists, and the statement that puts it right."""
    postgres.send([message("t", queue)] * 3)
    tables.execute("SELECT setval(pg_get_serial_sequence('{messages}', 'msg_id'), 1)")
    finding = the("tables", check(postgres))
    assert (finding.level, "behind the id 3" in finding.what) == ("warning", True)
    tables.execute(finding.remedy)
    assert the("tables", check(postgres)).level == "ok"


def test_a_column_that_is_missing_is_named(postgres: PostgresTransport, tables: Tables) -> None:
    """With its table, and what to compare that with."""
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
def test_an_index_that_was_dropped_is_named_with_the_statement_that_makes_it(
    postgres: PostgresTransport, tables: Tables, index: str, table: str, level: str
) -> None:
    """The remedy for a large table can be run as it stands, and mends it."""
    tables.execute(f"DROP INDEX {{schema}}.{index}")
    finding = the("indexes", check(postgres))
    assert finding.level == level
    assert index in finding.what
    assert table in finding.what
    with tables.connect() as connection:
        connection.execute(finding.remedy.partition("table: ")[2].encode())
    assert the("indexes", check(postgres)).level == "ok"


@on_one_server
def test_an_index_of_the_right_name_and_the_wrong_columns_is_none(postgres: PostgresTransport, tables: Tables) -> None:
    """It counts by its definition."""
    tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    tables.execute("CREATE INDEX pg_queue_message_claimed ON {messages} (read_ct)")
    finding = the("indexes", check(postgres))
    assert (finding.level, "pg_queue_message_claimed" in finding.what) == ("error", True)


@on_one_server
def test_an_index_that_ends_hot_updates_is_named(postgres: PostgresTransport, tables: Tables) -> None:
    """An index with `vt`, as earlier versions made it, is a warning with the statement that drops it."""
    tables.execute("CREATE INDEX pg_queue_message_due ON {messages} (queue_name, vt) WHERE state = 'claimed'")
    finding = the("indexes", check(postgres))
    assert (finding.level, "pg_queue_message_due" in finding.what) == ("warning", True)
    with tables.connect() as connection:
        connection.execute(finding.remedy.partition("runs: ")[2].encode())
    assert the("indexes", check(postgres)).level == "ok"


def test_an_index_that_is_not_valid_is_named_and_to_be_dropped(postgres: PostgresTransport, tables: Tables) -> None:
    """As a CREATE INDEX CONCURRENTLY leaves it that failed."""
    postgres.send([message("t", "q")] * 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        tables.execute("CREATE UNIQUE INDEX CONCURRENTLY failed ON {messages} (queue_name)")
    finding = the("indexes", check(postgres))
    assert finding.level == "error"
    assert finding.what.startswith("failed is not valid")
    assert "drop it" in finding.remedy


@on_one_server
def test_a_table_without_its_key_is_told(postgres: PostgresTransport, tables: Tables) -> None:
    """Its rows are found by it."""
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
def test_a_right_that_is_missing_is_told_by_what_cannot_be_done(
    limited: tuple[str, str], tables: Tables, taken: str, level: str, said: str
) -> None:
    """Who may only send is warned; who may not even do that is in error; who cannot sweep is told so."""
    url, role = limited
    tables.execute(f"REVOKE {taken} FROM {role}")
    with transport_on(url, tables.schema) as transport:
        finding = the("rights", check(transport))
    assert (finding.level, said in finding.remedy) == (level, True), finding


@on_one_server
def test_a_check_that_lacks_a_right_says_so_and_the_others_go_on(limited: tuple[str, str], tables: Tables) -> None:
    """Who may not read dead letters hears all about messages and replies."""
    url, role = limited
    tables.execute(f"REVOKE SELECT ON {{dead}} FROM {role}")  # noqa: S608 - the role of this test
    with transport_on(url, tables.schema) as transport:
        found = check(transport)
    finding = the("dead letters", found)
    assert (finding.level, finding.remedy) == ("skipped", "it takes SELECT on the table; grant this role the right")
    assert "could not be checked" in finding.what
    assert the("replies", found).level == the("leases", found).level == "ok"


@on_one_server
def test_a_pooler_is_found_and_heard_of(postgres_url: str, postgres: PostgresTransport) -> None:
    """A warning where listening was wanted; nothing to say where listen=false was."""
    with reached(postgres_url) as between:
        between.hide_the_process = True
        url, schema = make_conninfo(postgres_url, port=between.port), postgres._statements.schema
        with transport_on(url, schema) as transport:
            finding = the("pooler", check(transport))
        assert (finding.level, "listen=false" in finding.remedy) == ("warning", True)
        with transport_on(url, schema, listen=False) as transport:
            found = check(transport)
    assert (the("pooler", found).level, the("listen", found).level) == ("ok", "skipped")


@on_one_server
def test_listening_that_does_not_work_is_found_out(postgres_url: str, postgres: PostgresTransport) -> None:
    """A notification is really sent, and really waited for: one that something swallows is missed."""
    with reached(postgres_url) as between:
        url = make_conninfo(postgres_url, port=between.port)
        with transport_on(url, postgres._statements.schema) as transport:
            assert the("listen", check(transport)).level == "ok"
            between.swallow(b"unstract_wire_check_")
            finding = the("listen", check(transport, notification=0.5))
    assert (finding.level, "listen=false" in finding.remedy) == ("warning", True)
    assert "no notification came in 0.5 s" in finding.what


def test_through_a_pgbouncer_the_pooler_is_named_and_listening_is_seen_not_to_work(server_url: str) -> None:
    """A real one, in transaction mode; everything else is checked through it, too."""
    with private_pgbouncer(server_url) as pgbouncer, servers.fresh_schema(server_url) as schema:
        with transport_on(server_url, schema) as direct:
            direct.migrate()
        with transport_on(pgbouncer.url, schema) as transport:
            found = check(transport, notification=1.0)
    assert {finding.name for finding in found} == EVERY_CHECK
    named = {finding.name for finding in found if finding.level != "ok"} - OF_THE_SERVER
    assert named == {"pooler", "listen"}


def test_the_clocks_are_compared(postgres: PostgresTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and which is ahead; it is told and no more, because nothing depends on it."""
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
        ("letters that nobody wants", "warning", "unstract-wire migrate"),
        ("unstract-wire schema 11", "error", "bring this package up to date"),
    ],
)
@on_one_server
def test_the_version_of_the_schema_is_held_against_this_packages(
    postgres: PostgresTransport,
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    comment: str,
    level: str,
    said: str,
) -> None:
    """An older one is to be migrated; a newer one is an error, because this package does not know what changed."""
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", 2)
    tables.execute(f"COMMENT ON TABLE {{dead}} IS '{comment}'")
    finding = the("schema", check(postgres))
    assert (finding.level, said in finding.remedy) == (level, True)


def test_a_table_that_is_not_vacuumed_is_told(postgres: PostgresTransport, tables: Tables) -> None:
    """That autovacuum is off for it, and how many dead rows it has."""
    tables.execute("ALTER TABLE {messages} SET (autovacuum_enabled = false)")
    postgres.send([message("t", "q", n) for n in range(50)])
    tables.execute("DELETE FROM {messages}")
    split_remedy: list[str] = []

    def found() -> bool:
        split_remedy[:] = [finding.what + finding.remedy for finding in of("autovacuum", check(postgres, dead_rows=10))]
        return any("50 dead rows to 0 live ones" in what for what in split_remedy)

    wait_until(found, what="the dead rows to be counted")
    assert any("is off for pg_queue_message" in what and "autovacuum_enabled = true" in what for what in split_remedy)


def test_a_session_that_is_idle_in_transaction_is_named(postgres: PostgresTransport, tables: Tables, name: str) -> None:
    """With its process id, its state, how long, and how many transactions old its snapshot is."""
    with psycopg.connect(named(tables.url, name)) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT 1")
        found = check(postgres, transaction=0.0)
        (finding,) = [finding for finding in of("snapshots", found) if name in finding.what]
        assert finding.level == "warning"
        assert f"pid {other.info.backend_pid} " in finding.what
        assert "idle in transaction" in finding.what
        assert "holds a snapshot" in finding.what
        assert f"pg_terminate_backend({other.info.backend_pid})" in finding.remedy


@on_one_server
def test_an_old_snapshot_of_a_session_that_may_not_be_looked_at_is_told_by_its_age(
    limited: tuple[str, str], tables: Tables, name: str
) -> None:
    """A role without pg_read_all_stats sees no state and no time, but the snapshot."""
    with psycopg.connect(named(tables.url, name)) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT 1")
        with transport_on(limited[0], tables.schema) as transport:
            found = check(transport, transaction=0.0, transactions=0)
        (finding,) = [finding for finding in of("snapshots", found) if name in finding.what]
    assert "a time that this role may not see" in finding.what
    assert "holds a snapshot" in finding.what


def test_leases_that_nobody_brings_back_are_counted_by_queue(postgres: PostgresTransport, tables: Tables) -> None:
    """Ended long ago; those of a moment ago, and those that run, are not."""
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


def test_messages_that_wait_for_long_are_told_by_whether_anybody_works_on_them(
    postgres: PostgresTransport, tables: Tables
) -> None:
    """A queue without a worker wants one, a queue with workers wants more of them."""
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


def test_dead_letters_are_counted_by_queue_and_quote_nothing(postgres: PostgresTransport) -> None:
    """The type of the newest error, and not what it says, which may hold what the message held."""
    queue = queue_name()
    for reason in ("KeyError: old", "ValueError: secret-word of a payload"):
        postgres.send([message("t", queue, "secret-word")])
        bury(postgres, queue, reason)
    found = check(postgres)
    finding = the("dead letters", found)
    assert (finding.level, finding.what) == ("warning", f"2 in '{queue}' (the newest: ValueError)")
    assert f"dead list --queue {queue}" in finding.remedy
    assert not any("secret-word" in one.what + one.remedy for one in found)


def test_replies_that_nobody_sweeps_are_told(postgres: PostgresTransport, tables: Tables) -> None:
    """Where they expired long ago; those of a moment ago wait for the next sweep."""
    answer(postgres, Reply("old", "completed"))
    tables.execute("UPDATE {results} SET expires_at = now() - interval '1 minute'")
    assert the("replies", check(postgres)).level == "ok"
    tables.execute("UPDATE {results} SET expires_at = now() - interval '2 hours'")
    finding = the("replies", check(postgres))
    assert (finding.level, finding.what[:26]) == ("warning", "1 expired replies are left")
    assert "DELETE on pg_task_result" in finding.remedy


@pytest.mark.parametrize("moment", ["-infinity", "infinity", "4713-01-01 BC"])
def test_no_moment_in_a_row_breaks_a_check(
    postgres: PostgresTransport, tables: Tables, queue: str, moment: str
) -> None:
    """Other programs write these tables, too: what they write is looked at, and every check is made."""
    postgres.send([message("t", queue), message("t", queue)])
    receive_all(postgres, queue)
    answer(postgres, Reply("r", "completed"))
    postgres.send([message("t", queue)])
    tables.execute(f"UPDATE {{messages}} SET vt = '{moment}', enqueued_at = '{moment}'")  # noqa: S608 - from above
    tables.execute(f"UPDATE {{results}} SET expires_at = '{moment}'")  # noqa: S608 - likewise
    found = check(postgres)
    assert not any("could not be checked" in finding.what for finding in found)
    assert the("leases", found).level == ("ok" if moment == "infinity" else "warning")
    assert the("replies", found).level == ("ok" if moment == "infinity" else "warning")


@on_one_server
def test_a_server_that_takes_no_writes_is_an_error(postgres_url: str, postgres: PostgresTransport) -> None:
    """As one that was failed over from; the remedy reaches the other."""
    url = make_conninfo(postgres_url, options="-c default_transaction_read_only=on")
    with transport_on(url, postgres._statements.schema) as transport:
        finding = the("server", check(transport))
    assert (finding.level, "target_session_attrs=read-write" in finding.remedy) == ("error", True)


@on_one_server
def test_a_notification_queue_that_fills_is_told(postgres: PostgresTransport, tables: Tables) -> None:
    """Because some session listens and never reads."""
    with tables.connect() as listener:
        listener.execute("LISTEN anything")
        listener.execute("BEGIN")
        tables.rows("SELECT pg_notify('anything', repeat('x', 7000) || n) FROM generate_series(1, 500) AS n")
        finding = the("notifications", check(postgres, notification_queue=0.0))
        listener.execute("ROLLBACK")
    assert (finding.level, "pg_terminate_backend" in finding.remedy) == ("warning", True)


@on_one_server
def test_a_role_that_has_no_connections_left_is_told(limited: tuple[str, str], tables: Tables) -> None:
    """The narrowest limit counts: the server's, the database's or the role's."""
    url, role = limited
    tables.execute(f"ALTER ROLE {role} CONNECTION LIMIT 3")
    with transport_on(url, tables.schema) as transport:
        finding = the("connections", check(transport))
    assert finding.level == "warning"
    assert "of 3 connections are in use (the role's limit)" in finding.what
    assert "ALTER ROLE" in finding.remedy


@pytest.fixture(scope="module")
def neglected() -> Iterator[str]:
    """A database of another encoding, on a server with every setting wrong."""
    options = "-c autovacuum=off -c synchronous_commit=off -c max_connections=8 -c max_prepared_transactions=2"
    with servers.private_server(options=options) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE old ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        yield make_conninfo(server.url, dbname="old")


def test_settings_of_a_server_that_are_wrong_are_told(neglected: str) -> None:
    """Encoding, durability, autovacuum, room for connections and a prepared transaction: each for itself."""
    with transport_on(neglected, "s") as transport:
        transport.migrate()
        with psycopg.connect(neglected, autocommit=True) as connection:
            connection.execute("BEGIN")
            connection.execute("CREATE TABLE forgotten ()")
            connection.execute("PREPARE TRANSACTION 'forgotten'")
            found = check(transport, transaction=0.0)
            connection.execute("ROLLBACK PREPARED 'forgotten'")
    assert (the("encoding", found).level, the("encoding", found).what[:9]) == ("error", "SQL_ASCII")
    assert "synchronous_commit" in the("durability", found).remedy
    assert "whole server" in the("autovacuum", found).what
    assert (the("connections", found).level, "max_connections" in the("connections", found).what) == ("warning", True)
    assert any("prepared transaction forgotten" in finding.what for finding in of("snapshots", found))


def test_who_is_connected_is_told(make_named: Callable[..., PostgresTransport], name: str, postgres_url: str) -> None:
    """This package's sessions, and those that carry the name which this one was given; what they run is not told."""
    watching = make_named()
    subscription = watching.subscribe(["q"], lease=60.0)
    own = f"unstract-wire worker test-{uuid.uuid4().hex[:8]}"
    with psycopg.connect(named(postgres_url, own), autocommit=True) as other:
        other.execute("SELECT 'secret-word'")
        workers = watching.workers()
        subscription.close()
        (found,) = [worker for worker in workers if worker.name == own]
        assert (found.pid, found.state, found.address) == (other.info.backend_pid, "idle", "127.0.0.1")
        assert found.since is not None
        assert 0 <= found.since < 300
    assert [worker.name for worker in workers if worker.name == name] == [name]
    assert "secret-word" not in repr(workers)


@on_one_server
def test_of_other_roles_sessions_only_the_name_is_seen_without_the_right(
    limited: tuple[str, str], tables: Tables, postgres: PostgresTransport
) -> None:
    """Neither state nor address, until pg_read_all_stats is granted."""
    url, role = limited
    subscription = postgres.subscribe(["q"], lease=60.0)
    with transport_on(url, tables.schema) as watching:
        assert {(worker.state, worker.since, worker.address) for worker in watching.workers()} == {(None, None, "")}
        tables.execute(f"GRANT pg_read_all_stats TO {role}")
        assert {worker.state for worker in watching.workers()} == {"idle"}
    subscription.close()
