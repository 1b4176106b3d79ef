"""Least privilege: the grants of docs/security.md are enough for each role's work, and allow nothing else."""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest
from consumers import running
from core.signatures import as_object, fields_of
from pg_tables import Tables
from postgres.support import application, on_one_server, transport_on
from psycopg.conninfo import make_conninfo

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from transports.postgres.privileges import CONSUMER
from unstract_core import Consumer, Dispatcher, Reply, RetryLater, Settlement, TransportNotReady, Verdict

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
TABLES = {"pg_queue_message": "messages", "pg_task_result": "results", "pg_queue_dead_letter": "dead"}
CONSUMERS_RIGHTS = [(table, right) for table, rights in CONSUMER.items() for right in rights]
AT_THE_START_ALONE = ("pg_queue_dead_letter", "SELECT")
"""What a consumer needs to look at the tables, and not to settle."""


@attrs.frozen
class Roles:
    """Roles of the document, on the tables of one test; each has a name that no other test gives."""

    tables: Tables
    names: dict[str, str]

    def url(self, role: str) -> str:
        return make_conninfo(self.tables.url, user=self.names[role])

    def transport(self, role: str, **options: Any) -> Any:
        return transport_on(self.url(role), self.tables.schema, **options)

    def take(self, role: str, right: str) -> None:
        """Take a right, as `INSERT ON {messages}`, from a role."""
        self.tables.execute(f"REVOKE {right} FROM {self.names[role]}")

    def give(self, role: str, right: str) -> None:
        self.tables.execute(f"GRANT {right} TO {self.names[role]}")

    def refused(self, role: str, statement: str) -> bool:
        """Whether the server lets this role not run a statement, which is rolled back where it does."""
        with psycopg.connect(self.url(role)) as connection:
            try:
                connection.execute(self.tables.sql(statement))
            except psycopg.errors.InsufficientPrivilege:
                return True
            finally:
                connection.rollback()
        return False


def statements() -> list[str]:
    """Return the statements of the document, in its order."""
    blocks = re.findall(r"^```sql\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return [statement.strip() for block in blocks for statement in block.split(";") if statement.strip()]


@pytest.fixture
def roles(postgres: PostgresTransport, tables: Tables) -> Iterator[Roles]:
    """The roles, made by exactly the statements that the document has, with other names."""
    own = application().replace("-", "_")
    names = {name: f"{own}_{name}" for name in ("producer", "consumer", "operator")}
    try:
        for statement in statements():
            renamed = re.sub(r"\bunstract\b", "{schema}", statement)
            tables.execute(re.sub(r"\bwire_(\w+)\b", lambda match: names[match[1]], renamed))
        yield Roles(tables, names)
    finally:
        for name in names.values():
            tables.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def send_in_every_way(transport: PostgresTransport, url: str, queue: str) -> int:
    """Send alone, right afterwards (which goes another way), in bulk, delayed and within; return how many."""
    for _ in range(3):
        transport.send([message("t", queue, "alone")])
    transport.send([message("t", queue, n, org_id="org", priority=9) for n in range(5)])
    transport.send([message("t", queue, delay=60)])
    with psycopg.connect(url) as connection:
        transport.send([message("t", queue, "within"), message("t", queue, delay=60)], within=connection.cursor())
    return 11


@pytest.mark.parametrize("listen", [True, False])
def test_producer_role_can_send_and_read_replies(roles: Roles, queue: str, listen: bool) -> None:
    """The documented rights are enough for every way to send, for calls and for statuses."""
    with roles.transport("producer", listen=listen) as producer, roles.transport("consumer") as workers:
        sent = send_in_every_way(producer, roles.url("producer"), queue)
        assert roles.tables.count(queue) == sent
        dispatcher = Dispatcher(producer)
        called_back = as_object(fields_of(options={"queue": queue}))
        with running(Consumer(workers, {"add": lambda a, b: a + b}, [f"{queue}-call"])):
            assert dispatcher.call("add", args=[1, 2], queue=f"{queue}-call", timeout=30) == 3
            handle = dispatcher.send_with_callback("add", args=[1, 2], queue=f"{queue}-call", on_success=called_back)
            wait_until(lambda: dispatcher.status(handle.id), what="the status")
    assert roles.tables.rows("SELECT count(*) FROM {results} WHERE result IS NULL") == [(1,)]


def test_consumer_role_can_do_all_its_work(roles: Roles, queue: str) -> None:
    """The documented rights are enough to return, raise, retry, reply, dead-letter, release, renew and purge."""
    callbacks: list[Any] = []
    tries = itertools.count()

    def again() -> str:
        if next(tries) == 0:
            raise RetryLater(delay=0)
        return "at last"

    tasks: dict[str, Callable[..., Any]] = {
        "return": lambda: "result",
        "raise": lambda: 1 / 0,
        "again": again,
        "done": lambda result: callbacks.append(result),
        "failed": lambda id: callbacks.append(id),
    }
    done, failed = then("done", queue), then("failed", queue)
    with roles.transport("consumer") as transport:
        transport.send([message("return", queue, task_id="a", on_success=done)])
        transport.send([message("raise", queue, task_id="b", on_error=failed)])
        transport.send([message("again", queue, on_success=done, task_id="c")])
        transport.send([message("return", queue, reply_key="d"), message("unknown", queue)])
        Consumer(transport, tasks, [queue], max_attempts=2).drain(timeout=60)
        assert sorted(callbacks) == ["at last", "b", "result"]
        assert transport.reply("d", consume=True) == Reply("d", "completed", "result")
        subscription = transport.subscribe([queue, f"{queue}-2"], lease=60)
        transport.send([message("t", queue)])
        (delivery,) = subscription.receive(limit=1, wait=5)
        assert subscription.renew([delivery]) == [True]
        assert subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)]) == [True]
        roles.tables.execute("UPDATE {results} SET expires_at = now() - interval '1 hour'")
        subscription.purger.run()
        subscription.close()
    assert roles.tables.rows("SELECT count(*) FROM {results}") == [(0,)]
    assert roles.tables.rows("SELECT count(*) FROM {dead}") == [(1,)]
    assert roles.tables.count(queue) == 1


def test_operator_role_can_inspect_replay_and_purge(roles: Roles, queue: str) -> None:
    """The documented rights are enough for queues and dead letters."""
    with roles.transport("consumer") as transport:
        transport.send([message("unknown", queue, n) for n in range(3)])
        Consumer(transport, {"t": print}, [queue]).drain(timeout=60)
    with roles.transport("operator") as transport:
        (state,) = transport.queues([queue])
        assert state.dead == 3
        first, second, third = transport.dead.find(queue=queue)
        assert transport.dead.get([first.id]) == [first]
        assert transport.dead.replay([second.id]) == [second.id]
        assert transport.dead.purge(ids=[third.id]) == 1
    assert roles.tables.count(queue) == 1


CHANGES_TO_TABLES = [
    f"{change} {{{table}}}{more}"
    for table in TABLES.values()
    for change, more in [
        ("TRUNCATE", ""),
        ("DROP TABLE", ""),
        ("ALTER TABLE", " ADD COLUMN mine int"),
        ("ALTER TABLE", " DISABLE TRIGGER ALL"),
        ("CREATE INDEX ON", " ((1))"),
        ("CREATE RULE mine AS ON INSERT TO", " DO INSTEAD NOTHING"),
        ("COMMENT ON TABLE", " IS 'unstract-wire schema 9'"),
    ]
] + ["CREATE TABLE {schema}.mine ()", "DROP SCHEMA {schema} CASCADE", "ALTER SCHEMA {schema} RENAME TO mine"]
READS_LETTERS = ["SELECT reason FROM {dead}", "SELECT result FROM {dead}"]
CHANGES_LETTERS = ["DELETE FROM {dead}", "UPDATE {dead} SET reason = ''"]
FORGED_IDS = [
    "INSERT INTO {messages} VALUES (7, 'q', '{{}}', '', now(), now(), 0, 5, 'ready')",
    "INSERT INTO {messages} (msg_id, queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)"
    " VALUES (nextval('{schema}.pg_queue_message_msg_id_seq') + 1, 'q', '{{}}', '', now(), now(), 0, 5, 'ready')",
    "INSERT INTO {messages} (msg_id) VALUES (7) ON CONFLICT DO NOTHING",
    "COPY {messages} (msg_id, queue_name) FROM STDIN",
]
DENIED = {
    "producer": [
        *CHANGES_TO_TABLES,
        *READS_LETTERS,
        *CHANGES_LETTERS,
        "LOCK TABLE {messages} IN SHARE MODE",
        "SELECT message FROM {messages}",
        "SELECT queue_name FROM {messages}",
        "SELECT msg_id FROM {messages} FOR UPDATE",
        "SELECT msg_id FROM {messages} WHERE queue_name = 'q'",
        "UPDATE {messages} SET state = 'ready'",
        "DELETE FROM {messages}",
        "INSERT INTO {messages} (queue_name) VALUES ('q') RETURNING message",
        *FORGED_IDS,
        "INSERT INTO {results} (task_id) VALUES ('forged')",
        "UPDATE {results} SET status = 'completed'",
        "UPDATE {results} SET task_id = 'x'",
        "DELETE FROM {results}",
        "INSERT INTO {dead} (msg_id) VALUES (1)",
        "SELECT setval('{schema}.pg_queue_message_msg_id_seq', 1)",
    ],
    "consumer": [
        *CHANGES_TO_TABLES,
        *CHANGES_LETTERS,
        "UPDATE {messages} SET message = '{{}}'",
        "UPDATE {messages} SET queue_name = 'q'",
        "UPDATE {messages} SET org_id = 'q'",
        *FORGED_IDS,
        "INSERT INTO {dead} (dead_id) VALUES (1)",
        "SELECT setval('{schema}.pg_queue_message_msg_id_seq', 1)",
    ],
    "operator": [
        *CHANGES_TO_TABLES,
        "UPDATE {messages} SET state = 'ready'",
        "DELETE FROM {messages}",
        *FORGED_IDS,
        "UPDATE {dead} SET reason = ''",
        "SELECT result FROM {results}",
        "INSERT INTO {results} (task_id) VALUES ('forged')",
    ],
}


@pytest.mark.parametrize("role", DENIED)
def test_roles_have_no_further_rights(roles: Roles, postgres: PostgresTransport, role: str) -> None:
    """The server refuses each role all operations outside its work; the owner may do all of them."""
    assert [statement for statement in DENIED[role] if not roles.refused(role, statement)] == []


def test_producer_without_update_changes_no_result(roles: Roles, queue: str, caplog: Any) -> None:
    """Without UPDATE, calls get their replies, and no producer can change a result."""
    roles.take("producer", "UPDATE (result, error) ON {results}")
    assert roles.refused("producer", "UPDATE {results} SET result = '1'")
    assert roles.refused("producer", "UPDATE {results} SET error = 'x'")
    with (
        roles.transport("producer") as producer,
        roles.transport("consumer") as workers,
        running(Consumer(workers, {"add": lambda a, b: a + b}, [queue])),
    ):
        assert Dispatcher(producer).call("add", args=[1, 2], queue=queue, timeout=30) == 3
    assert any(record.__dict__.get("wire.event") == "reply_not_cleared" for record in caplog.records)


BEYOND_A_PRODUCER: dict[str, tuple[Callable[[PostgresTransport], object], str]] = {
    "subscribe": (
        lambda transport: transport.subscribe(["q"], lease=1),
        r"lacks .*SELECT \(queue_name, message, .*\) on pg_queue_message",
    ),
    "queues": (lambda transport: transport.queues(["q"]), r"pg_\w+.*; it takes SELECT; grant this role the right$"),
    "find": (lambda transport: transport.dead.find(), r"pg_queue_dead_letter .*; it takes SELECT; grant"),
    "get": (lambda transport: transport.dead.get(["1"]), r"pg_queue_dead_letter .*; it takes SELECT; grant"),
    "replay": (lambda transport: transport.dead.replay(["1"]), r"pg_queue_dead_letter.*takes SELECT and DELETE; grant"),
    "purge": (lambda transport: transport.dead.purge(), r"pg_queue_dead_letter .*takes SELECT and DELETE; grant"),
}


@pytest.mark.parametrize("act", BEYOND_A_PRODUCER)
def test_refused_producer_error_names_the_right(roles: Roles, act: str) -> None:
    """TransportNotReady names the table and the right for each operation beyond sending."""
    attempt, said = BEYOND_A_PRODUCER[act]
    with roles.transport("producer") as transport, pytest.raises(TransportNotReady, match=said):
        attempt(transport)


@pytest.mark.parametrize("role", ["producer", "consumer", "operator"])
def test_only_the_owner_can_migrate(roles: Roles, role: str) -> None:
    """Another role is refused with the remedy, and has created nothing."""
    roles.tables.execute("DROP INDEX {schema}.pg_queue_message_claimed")
    with (
        roles.transport(role) as transport,
        pytest.raises(TransportNotReady, match=r"must be owner of table .*takes the owner of the tables"),
    ):
        transport.migrate()


@on_one_server
@pytest.mark.parametrize(
    ("right", "said"),
    [
        (
            "INSERT ON {messages}",
            r"table pg_queue_message .*takes INSERT on its columns but msg_id, and SELECT on its column msg_id; grant",
        ),
        (
            "SELECT (msg_id) ON {messages}",
            r"table pg_queue_message .*takes INSERT on its columns but msg_id, and SELECT on its column msg_id",
        ),
        ("USAGE ON SEQUENCE {schema}.pg_queue_message_msg_id_seq", r"pg_queue_message_msg_id_seq .*takes USAGE on the"),
        ("USAGE ON SCHEMA {schema}", r"schema \w+ .*takes USAGE on the schema; grant this role the right"),
    ],
)
def test_send_without_a_right_names_it(roles: Roles, queue: str, right: str, said: str) -> None:
    """For each right and each way to send, the error names table and right, and nothing was sent."""
    url = roles.url("producer")
    with roles.transport("producer") as transport, psycopg.connect(url) as connection:
        roles.take("producer", right)
        ways: dict[str, Callable[[], object]] = {
            "one": lambda: transport.send([message("t", queue)]),
            "many": lambda: transport.send([message("t", queue)] * 2),
            "delayed": lambda: transport.send([message("t", queue, delay=1)]),
            "within": lambda: transport.send([message("t", queue)], within=connection.cursor()),
            "right after another": lambda: transport.send([message("t", f"{queue}-busy")]),
        }
        transport._notifier._last[f"{queue}-busy"] = time.monotonic() + 60  # as if it had been announced just now
        for way, send in ways.items():
            with pytest.raises(TransportNotReady, match=said):
                send()
            assert roles.tables.rows("SELECT count(*) FROM {messages}") == [(0,)], way
            connection.rollback()
        roles.give("producer", right)
        assert send_in_every_way(transport, url, queue) == roles.tables.count(queue)


@on_one_server
@pytest.mark.parametrize(("right", "work"), [("SELECT", "read"), ("UPDATE", "clear")])
def test_producer_without_reply_rights_loses_no_reply(
    roles: Roles, postgres: PostgresTransport, queue: str, caplog: pytest.LogCaptureFixture, right: str, work: str
) -> None:
    """Without SELECT a read fails with an error; without UPDATE a reply is read, and stays."""
    postgres.send([message("t", queue, reply_key=queue)])
    Consumer(postgres, {"t": lambda: "paid"}, [queue]).drain(timeout=60)
    columns = "" if right == "SELECT" else " (result, error)"
    roles.take("producer", f"{right}{columns} ON {{results}}")
    with roles.transport("producer") as transport:
        if work == "read":
            with pytest.raises(TransportNotReady, match=r"table pg_task_result .*it takes SELECT; grant this role"):
                transport.reply(queue)
        else:
            assert transport.reply(queue, consume=True) == Reply(queue, "completed", "paid")
            assert "takes SELECT, and UPDATE on its columns result and error" in caplog.text
    assert postgres.reply(queue) == Reply(queue, "completed", "paid")


def test_identity_sequences_need_no_right(roles: Roles, queue: str) -> None:
    """With identity columns, a consumer without USAGE starts, sends a follow-up and dead-letters."""
    for table, column in (("messages", "msg_id"), ("dead", "dead_id")):
        name = {name: table for table, name in TABLES.items()}[table]
        roles.tables.execute(
            f"ALTER TABLE {{{table}}} ALTER {column} DROP DEFAULT; DROP SEQUENCE {{schema}}.{name}_{column}_seq; "
            f"ALTER TABLE {{{table}}} ALTER {column} ADD GENERATED BY DEFAULT AS IDENTITY"
        )
    with roles.transport("consumer") as transport:
        transport.send([message("t", queue, on_success=then("t", queue), task_id=queue), message("nobody", queue)])
        consumer = Consumer(transport, {"t": lambda *_: None}, [queue])
        assert consumer.drain(timeout=60) == 2
        assert (consumer.counters["settled"], consumer.counters["buried"]) == (2, 1)


@on_one_server
@pytest.mark.parametrize(("table", "right"), CONSUMERS_RIGHTS)
def test_consumer_without_a_right_does_not_start(roles: Roles, queue: str, table: str, right: str) -> None:
    """For each right on each table and column, the error names the table, the right and the column."""
    place, columns = f"{{{TABLES[table]}}}", CONSUMER[table][right]
    with roles.transport("consumer") as transport:
        transport.send([message("t", queue)])
        whole = f"UPDATE ({', '.join(columns)})" if table == "pg_queue_message" and right == "UPDATE" else right
        roles.take("consumer", f"{whole} ON {place}")
        named = f"UPDATE ({', '.join(columns)})" if right == "UPDATE" else right
        wanted = (
            rf"denied for table {table} .*: this role lacks {re.escape(named)} on {table}; grant this role the right$"
        )
        with pytest.raises(TransportNotReady, match=wanted):
            transport.subscribe([queue], lease=1)
        for column in columns:
            for other in columns:
                (roles.take if other == column else roles.give)("consumer", f"{right} ({other}) ON {place}")
            with pytest.raises(TransportNotReady, match=rf"lacks {right} \({column}\) on {table}; grant"):
                transport.subscribe([queue], lease=1)
        roles.give("consumer", f"{whole} ON {place}")
        assert Consumer(transport, {"t": print}, [queue]).drain(timeout=60) == 1


@on_one_server
def test_error_names_all_missing_rights(roles: Roles, queue: str) -> None:
    """One error is enough to grant all missing rights, also on the schema."""
    roles.take("consumer", "USAGE ON SCHEMA {schema}")
    roles.take("consumer", "DELETE ON {messages}")
    roles.take("consumer", "INSERT ON {dead}")
    with roles.transport("consumer") as transport, pytest.raises(TransportNotReady) as caught:
        transport.subscribe([queue], lease=1)
    for part in ("USAGE on the schema", "DELETE on pg_queue_message", "INSERT on pg_queue_dead_letter"):
        assert part in str(caught.value)


@on_one_server
@pytest.mark.parametrize(("table", "right"), [pair for pair in CONSUMERS_RIGHTS if pair != AT_THE_START_ALONE])
def test_revoked_right_loses_no_work(
    roles: Roles, queue: str, caplog: pytest.LogCaptureFixture, table: str, right: str
) -> None:
    """Finished tasks are kept and settled when the right is granted again; each runs once."""
    ran: list[int] = []
    go = threading.Event()

    def pay(number: int) -> int:
        go.wait(60)
        ran.append(number)
        return number

    def away() -> bool:
        return any(record.__dict__.get("wire.event") == "transport_away" for record in caplog.records)

    columns = CONSUMER[table][right] if (table, right) == ("pg_queue_message", "UPDATE") else ()
    taken = f"{right}{' (' + ', '.join(columns) + ')' if columns else ''} ON {{{TABLES[table]}}}"
    with roles.transport("consumer") as transport, caplog.at_level(logging.WARNING):
        transport.send(
            [message("pay", queue, n, task_id=f"{queue}-{n}", on_success=then("done", f"{queue}-cb")) for n in (1, 2)]
        )
        with running(Consumer(transport, {"pay": pay}, [queue], lease=60, concurrency=2)):
            wait_until(
                lambda: roles.tables.rows("SELECT count(*) FROM {messages} WHERE state = 'claimed'") == [(2,)],
                what="both to run",
            )
            roles.take("consumer", taken)
            go.set()
            wait_until(away, what="the consumer to notice")
            assert roles.tables.count(queue) == 2
            roles.give("consumer", taken)
            wait_until(lambda: roles.tables.count(queue) == 0, what="both settlements")
    assert sorted(ran) == [1, 2]
    assert roles.tables.count(f"{queue}-cb") == 2
    said = next(
        record.getMessage() for record in caplog.records if record.__dict__.get("wire.event") == "transport_away"
    )
    assert table in said
    assert "it takes" in said


@pytest.mark.parametrize("attempts", [-1, -1000, -(2**31)])
def test_forged_attempt_count_is_at_least_one(
    postgres: PostgresTransport, tables: Tables, queue: str, attempts: int
) -> None:
    """A producer that writes a negative count gets no additional starts and no shorter back-off."""
    postgres.send([message("t", queue)])
    tables.execute("UPDATE {messages} SET read_ct = %s", attempts)
    subscription = postgres.subscribe([queue], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=5)
    assert delivery.attempt == 1
    assert subscription.renew([delivery]) == [True]
    assert subscription.settle([Settlement(delivery, Verdict.ACK)]) == [True]
    subscription.close()
