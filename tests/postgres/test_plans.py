"""The plans of the frequent statements: they find each row by an index, with any table content and statistics.

The tests run EXPLAIN on the statements with the parameters of production. They check custom plans, and the generic
plans that a connection keeps after preparing. The states of the table follow each other on one server, so that a
million rows are written only twice.

UNSTRACT_WIRE_PLANS=all reads every size of every queue with all statistics. Otherwise a million rows are written once
for each server.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import servers
from pg_tables import Tables
from pgbouncer import private_pgbouncer
from postgres.support import second_server
from psycopg import sql

from transports.postgres import PostgresTransport
from transports.postgres.claim_planner import PRIORITIES
from transports.postgres.connection import Connection
from transports.postgres.connector import Connector
from transports.postgres.expiry_planner import NEW, PART
from transports.postgres.listener import use_indexes
from transports.postgres.rows import settle_parameters
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements
from unstract_core import Delivery, Message, Reply, Settlement, TaskPayload, Verdict

SCHEMA = "plans"
QUEUES = ["q-1", "q-2", "q-3"]
MILLION = 1_000_000
FILL = """INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
          SELECT 'q-' || n %% 4, '{{}}', '', now(), now() + n %% 60 * interval '1 second', 1, 1 + n %% 10,
                 CASE WHEN n %% 10 = 0 THEN 'claimed' ELSE 'ready' END
          FROM generate_series(1, %s) AS n"""
TABLES = ("pg_queue_message", "pg_task_result", "pg_queue_dead_letter")
READY, CLAIMED = "pg_queue_message_ready", "pg_queue_message_claimed"
HELD, STRANGE = "pg_queue_message_held", "pg_queue_message_strange"


def hot_statements(schema: str = SCHEMA) -> dict[str, tuple[Statement, dict[str, Any], set[str]]]:
    """Return each frequent statement with its parameters and the indexes, beside primary keys, that it must use."""
    statements = Statements(schema)
    cases: dict[str, tuple[Statement, dict[str, Any], set[str]]] = {}
    for name, queues in (("one queue", QUEUES[:1]), ("three queues", QUEUES)):
        claim, names = statements.claim(queues)
        frontier, _ = statements.claim_frontier(queues)
        more = {"limit": 100, "lease": 60.0}
        bounds = {f"frontier_{number}": [0, *range(9)] for number in range(len(queues))}
        cases[f"claim from {name}"] = claim, {**names, **more}, {READY}
        cases[f"claim frontier, from {name}"] = frontier, {**names, **more, **bounds, "priorities": PRIORITIES}, {READY}
        part = {"walked": queues, "afters": [0] * len(queues), "share": PART, "window": PART, "known": []}
        scan = {"queues": queues, "limit": 500, "ahead": 30.0, **part}
        cases[f"requeue in {name}"] = statements["requeue_expired"], scan, {READY, HELD}
        recent = {**scan, "share": NEW, "window": NEW, "known": list(range(1, 101))}
        cases[f"requeue in any queue, {name}"] = statements["requeue_expired_any_queue"], scan, {CLAIMED}
        cases[f"requeue recent in {name}"] = statements["requeue_expired_recent"], recent, {HELD}
        cases[f"requeue recent in any queue, {name}"] = (
            statements["requeue_expired_recent_any_queue"],
            recent,
            {CLAIMED},
        )
    cases["look for queues"] = statements["queues_with_ready"], {}, {READY}
    held = {"ids": list(range(1, 101)), "attempts": [1] * 100, "enqueued": [b""] * 100, "lease": 60.0}
    cases["renew"] = statements["renew"], held, set()
    announced = {"channel": "c", "wake": [], "reply_channel": "r", "wake_callers": False}
    cases["settle"] = statements["settle"], {**settle_parameters(settlements()), **announced}, set()
    cases["purge replies"] = statements["purge_replies"], {"limit": 1000, "since": 0.0}, {"pg_task_result_expires"}
    return cases


def settlements() -> list[Settlement]:
    """Return a batch with every kind of settlement."""
    payload = TaskPayload(task_name="t", queue="q-1")
    batch = []
    for n in range(1, 101):
        delivery = Delivery(str(n), "q-1", 1, payload, "{}", None, "", 5)
        verdict = Verdict.BURY if n % 10 == 0 else Verdict.RETRY if n % 10 == 1 else Verdict.ACK
        follow_up = Message(payload, "q-2") if verdict is Verdict.ACK else None
        reply = Reply(f"key-{n}", "completed", {}, "", 60.0) if n % 10 == 2 else None
        batch.append(Settlement(delivery, verdict, follow_up=follow_up, reply=reply, reason="r"))
    return batch


def positional(statement: Statement, parameters: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return a statement with the server's own parameters, as psycopg writes it to prepare it."""
    names: list[str] = []

    def numbered(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)[sb]", numbered, statement.text.decode()).replace("%%", "%")
    return text, [parameters[name] for name in names]


def custom_plan(
    connection: psycopg.Connection[Any], statement: Statement, parameters: dict[str, Any]
) -> dict[str, Any]:
    explain = b"EXPLAIN (FORMAT JSON) " + statement.text
    ((plan,),) = connection.execute(explain, parameters, prepare=False).fetchall()
    return dict(plan[0])


def generic_plan(connection: psycopg.Connection[Any], name: str, values: list[Any]) -> dict[str, Any]:
    given = sql.SQL("({})").format(sql.SQL(", ").join(map(literal, values))) if values else sql.SQL("")
    execute = sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE {} {}").format(sql.Identifier(name), given)
    ((plan,),) = connection.execute(execute).fetchall()
    return dict(plan[0])


def literal(value: Any) -> sql.Composable:
    """Return a value as SQL without a type, as psycopg sends it."""
    return sql.Literal(value if isinstance(value, list | str | bool) else str(value))


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def inputs(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes whose rows pass through a node, without CTEs and subqueries."""
    yield plan
    for child in plan.get("Plans", []):
        if child.get("Parent Relationship") not in ("InitPlan", "SubPlan"):
            yield from inputs(child)


def faults(explained: dict[str, Any], wanted: set[str], *, may_sort: bool) -> Iterator[str]:
    """Yield the faults of a plan: a table read as a whole or sorted, an index read as a whole or not used.

    A plan `may_sort` what it reads by an index where a small table's statistics are right.
    """
    used = set()
    for node in nodes(explained["Plan"]):
        kind = node["Node Type"]
        used.add(node.get("Index Name", ""))
        if kind == "Seq Scan" and node["Relation Name"] in TABLES:
            yield f"reads all of {node['Relation Name']}"
        if "Index" in kind and "Index Cond" not in node:
            yield f"walks all of {node['Index Name']}"
        if "Sort" in kind and not may_sort and any(child.get("Relation Name") == TABLES[0] for child in inputs(node)):
            yield f"sorts by {node['Sort Key']} what it has read from a table"
    if missing := wanted - used:
        yield f"does not use {sorted(missing)}"
    if "JIT" in explained:
        yield "is compiled"


class Table:
    """The messages of one server, filled and emptied; `faults` are those of every plan so far, by kind."""

    def __init__(self, url: str, direct: Connection, pooled: psycopg.Connection[Any]) -> None:
        self.tables = Tables(url, SCHEMA)
        self._url = url
        self.faults: dict[str, list[str]] = {"custom": [], "generic": [], "kept": [], "pooled": []}
        self._direct = direct
        self._pooled = pooled
        use_indexes(direct)
        direct.execute(b"SET plan_cache_mode = force_generic_plan")
        for name, (statement, parameters, _) in hot_statements().items():
            prepare(direct, name, positional(statement, parameters)[0])

    def fill(self, rows: int) -> None:
        self.tables.execute(FILL, rows)

    def run(self, statement: str) -> None:
        self.tables.execute(statement)

    @contextlib.contextmanager
    def old_snapshot(self) -> Iterator[None]:
        """Hold one, so that nothing that is deleted meanwhile can be vacuumed away."""
        with psycopg.connect(self._url) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM pg_class")
            yield

    def check(self, state: str, *, may_sort: bool = False) -> None:
        """Look at each plan that a connection would make now, or has kept since an earlier state."""
        for name, (statement, parameters, wanted) in hot_statements().items():
            text, values = positional(statement, parameters)
            plans = {
                "custom": custom_plan(self._direct, statement, parameters),
                "kept": generic_plan(self._direct, name, values),
                "pooled": custom_plan(self._pooled, statement, parameters),
            }
            prepare(self._direct, "anew", text)
            plans["generic"] = generic_plan(self._direct, "anew", values)
            self._direct.execute(b"DEALLOCATE anew")
            for kind, plan in plans.items():
                self.faults[kind] += [f"{state}: {name} {fault}" for fault in faults(plan, wanted, may_sort=may_sort)]


def prepare(connection: psycopg.Connection[Any], name: str, text: str) -> None:
    connection.execute(sql.SQL("PREPARE {} AS {}").format(sql.Identifier(name), sql.SQL(text)))


@pytest.fixture(scope="module")
def faults_found() -> Iterator[dict[str, dict[str, list[str]]]]:
    """Return the faults of all plans, by kind, of a table with "some" rows and with "none"."""
    options = "-c fsync=off -c synchronous_commit=off -c autovacuum=off -c max_wal_size=4GB -c shared_buffers=512MB"
    with servers.private_server(options=options) as server:
        with contextlib.closing(PostgresTransport(server.url, SCHEMA)) as transport:
            transport.migrate()
        with (
            Connector(server.url, prepare=True).connect() as direct,
            Connector(server.url, prepare=False).connect() as pooled,
        ):
            pooled.execute("SET jit = on")
            yield look(Table(server.url, direct, pooled))


def look(table: Table) -> dict[str, dict[str, list[str]]]:
    faults_found = {states: {kind: list[str]() for kind in table.faults} for states in ("none", "some", "held")}
    before = [
        ("none", "no rows, never analysed", "", 0),
        ("none", "no rows", "VACUUM ANALYZE {messages}", 0),
        ("some", "a thousand rows, analysed at none", "", 1000),
        ("some", "a thousand rows", "ANALYZE {messages}", 0),
        ("some", "a million rows, analysed at a thousand", "", MILLION),
        ("some", "a million rows", "ANALYZE {messages}", 0),
    ]
    after = [
        ("held", "no rows, analysed as dead", "", 0),
        ("some", "no rows, and the pages of a million", "VACUUM (TRUNCATE off, ANALYZE) {messages}", 0),
        ("some", "a million rows, in pages known as empty", "", MILLION),
    ]

    def visit(states: str, state: str, statement: str, rows: int) -> None:
        if statement:
            table.run(statement)
        if rows:
            table.fill(rows)
        table.faults = faults_found[states]
        table.check(state, may_sort=state == "a thousand rows")

    for step in before:
        visit(*step)
    with table.old_snapshot():
        visit("held", "a million dead rows", "DELETE FROM {messages}", 0)
        visit("held", "a million dead rows, analysed", "VACUUM ANALYZE {messages}", 0)
        visit("held", "a thousand rows beside a million dead ones", "", 1000)
    for step in after:
        visit(*step)
    return faults_found


@pytest.mark.slow(reason="The server writes two million rows; `make test` counts the rows that each statement reads.")
@pytest.mark.parametrize("kind", ["custom", "generic", "pooled"])
def test_every_row_is_found_by_an_index(faults_found: dict[str, dict[str, list[str]]], kind: str) -> None:
    """With a thousand and a million rows, fresh and stale statistics, no table is read or sorted."""
    assert faults_found["some"][kind] == []


@pytest.mark.slow(reason="The server writes two million rows; `make test` counts the rows that each statement reads.")
def test_kept_plans_do_not_fit_empty_tables_only(faults_found: dict[str, dict[str, list[str]]]) -> None:
    """A plan made for a table without a page still uses the indexes when there are a million rows."""
    assert [*faults_found["none"]["generic"], *faults_found["none"]["kept"], *faults_found["some"]["kept"]] == []


@pytest.mark.slow(reason="The server writes two million rows; `make test` counts the rows that each statement reads.")
@pytest.mark.parametrize("kind", ["custom", "generic", "kept", "pooled"])
def test_plans_avoid_dead_rows_of_held_snapshots(faults_found: dict[str, dict[str, list[str]]], kind: str) -> None:
    """The statistics say that the table is empty while its indexes are full; the plan is still the right one.

    Through a pooler the session has no settings, and the statements alone lead the planner.
    """
    assert faults_found["held"][kind] == []


def test_disabled_paths_compile_no_plan(postgres: PostgresTransport, tables: Tables) -> None:
    """On an older server a disabled path adds to the cost of a plan, which would be compiled at each run."""
    with Connector(tables.url, prepare=True).connect() as connection:
        use_indexes(connection)
        for name, (statement, parameters, _) in hot_statements(tables.schema).items():
            assert "JIT" not in custom_plan(connection, statement, parameters), name
            prepare(connection, name, positional(statement, parameters)[0])
            assert "JIT" not in generic_plan(connection, name, positional(statement, parameters)[1]), name


@pytest.mark.parametrize("name", ["read_reply", "answered"])
def test_reply_is_read_by_its_key(shared: tuple[PostgresTransport, Tables], name: str) -> None:
    """Statistics of expired replies do not lead a lookup of one reply over all unexpired ones."""
    _, tables = shared
    fill = """INSERT INTO {results} (task_id, status, result, error, created_at, expires_at)
              SELECT %s || n, 'completed', NULL, '', now(), now() + %s * interval '1 hour'
              FROM generate_series(1, 5000) AS n"""
    tables.execute("ALTER TABLE {results} SET (autovacuum_enabled = off)")
    tables.execute(fill, f"{name} expired ", -1)
    tables.execute("ANALYZE {results}")
    tables.execute(fill, f"{name} not expired ", 1)
    statement = Statements(tables.schema)[name]
    with tables.connect() as connection:
        plan = custom_plan(connection, statement, {"key": f"{name} not expired 7", "keys": [f"{name} not expired 7"]})
    assert {node["Index Name"] for node in nodes(plan["Plan"]) if "Index Name" in node} == {"pg_task_result_pkey"}


ALL = os.environ.get("UNSTRACT_WIRE_PLANS") == "all"
SIZES = (1_000, 60_000, MILLION)
STATISTICS = ("never analysed", "analysed full", "analysed empty")
SHAPES = {
    "one queue": ("'q-1'", "5"),
    "ten priorities": ("'q-1'", "1 + n %% 10"),
    "many queues": ("'q-' || n %% 40", "1 + n %% 10"),
}
COSTS: list[dict[str, object]] = [
    {},
    {"random_page_cost": 1.1},
    {"random_page_cost": 8, "effective_cache_size": "1MB"},
    {"random_page_cost": 0, "seq_page_cost": 0},
    {"cpu_tuple_cost": 1, "cpu_index_tuple_cost": 1, "cpu_operator_cost": 0.0001},
]
GROW = """INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
          SELECT QUEUE, '{{}}', '', now(), now() + interval '1 hour', 0, PRIORITY,
                 CASE WHEN n %% 1000 = 0 THEN 'claimed' ELSE 'ready' END
          FROM generate_series(%s::int, %s::int) AS n"""
TAKEN = 10


def claims_and_looks(schema: str, size: int) -> Iterator[tuple[str, Statement, dict[str, Any]]]:
    """Yield each statement that chooses rows, with the parameters of production."""
    statements = Statements(schema)
    queues = [f"q-{number}" for number in range(5)]
    more = {"limit": TAKEN, "lease": 60.0}
    for names in (["q-1"], queues):
        claim, parameters = statements.claim(names)
        yield f"claim from {len(names)}", claim, {**parameters, **more}
        frontier, _ = statements.claim_frontier(names)
        for last in (0, size // 2, size):
            bounds = {f"frontier_{number}": [last] * 10 for number in range(len(names))}
            name = f"claim from {len(names)} beyond {last}"
            yield name, frontier, {**parameters, **more, **bounds, "priorities": PRIORITIES}
    part = {"walked": queues, "afters": [0] * len(queues), "share": PART, "window": PART, "known": []}
    scan = {"queues": queues, "limit": TAKEN, "ahead": 30.0, **part}
    yield "requeue", statements["requeue_expired"], scan
    recent = {**scan, "afters": [size // 2] * len(queues), "share": NEW, "window": NEW, "known": [1, 2, 3, 1000]}
    yield "requeue recent", statements["requeue_expired_recent"], recent
    yield "look for queues", statements["queues_with_ready"], {}


def rows_read(plan: dict[str, Any]) -> float:
    """Return the number of message rows that an executed plan has read, with those that a filter removed."""
    read = 0.0
    for node in nodes(plan):
        if node.get("Relation Name") == TABLES[0] and "Scan" in node["Node Type"]:
            read += (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    return read


def too_much(connection: psycopg.Connection[Any], schema: str, size: int, costs: dict[str, object]) -> Iterator[str]:
    """Return the statements that read more than their own rows, some rows of each priority and the claimed rows."""
    for name, statement, parameters in claims_and_looks(schema, size):
        with connection.transaction(force_rollback=True):
            for setting, value in costs.items():
                connection.execute(sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
            plan = custom_plan(connection, statement, parameters)
            wrong = list(faults(plan, set(), may_sort=True))
            explain = b"EXPLAIN (ANALYZE, FORMAT JSON) " + statement.text
            if not wrong:  # what is wrong would be run for minutes
                ((explained,),) = connection.execute(explain, parameters, prepare=False).fetchall()
                read = rows_read(explained[0]["Plan"])
                if read > 5 * (TAKEN + 100) + 20 * TAKEN + 2 * size / 1000:
                    wrong = [f"reads {read:.0f} rows"]
        yield from (f"{name} {costs}: {fault}" for fault in wrong)


@contextlib.contextmanager
def pooled_connection(url: str, server: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection without settings of its own: the machine's server is reached through a PgBouncer."""
    with contextlib.ExitStack() as stack:
        if server == "server":
            url = stack.enter_context(private_pgbouncer(url)).url
        yield stack.enter_context(Connector(url, prepare=False).connect())


@pytest.mark.parametrize("server", ["embedded", pytest.param("server", marks=second_server)])
def test_statements_read_few_rows_beyond_their_own(request: pytest.FixtureRequest, server: str) -> None:
    """That holds at each size, with all statistics and cost settings, for one and many queues and ten priorities."""
    url: str = request.getfixturevalue(f"{server}_url")
    wrong: list[str] = []
    with pooled_connection(url, server) as connection:
        for shape, statistics in itertools.product(SHAPES if ALL else list(SHAPES)[1:], STATISTICS):
            once = (shape, statistics) == ("ten priorities", "analysed full")
            with servers.fresh_schema(url) as schema:
                with contextlib.closing(PostgresTransport(url, schema)) as transport:
                    transport.migrate()
                tables = Tables(url, schema)
                tables.execute("ALTER TABLE {messages} SET (autovacuum_enabled = off)")
                tables.execute("ALTER TABLE {messages} SET UNLOGGED")
                if statistics == "analysed empty":
                    tables.execute("VACUUM ANALYZE {messages}")
                rows = 0
                for size in SIZES:
                    if size == MILLION and not (ALL or once):
                        continue
                    queue, priority = SHAPES[shape]
                    tables.execute(GROW.replace("QUEUE", queue).replace("PRIORITY", priority), rows + 1, size)
                    rows = size
                    if statistics == "analysed full":
                        tables.execute("ANALYZE {messages}")
                    for costs in COSTS if ALL else COSTS[::2]:
                        state = f"{shape}, {size} rows, {statistics}"
                        wrong += [f"{state}: {fault}" for fault in too_much(connection, schema, size, costs)]
    assert not wrong, "\n".join(wrong)
