"""A session with an old snapshot: claimed rows cannot be vacuumed away, and no statement may read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import servers
from pg_tables import Tables

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from transports.postgres.claim_planner import PRIORITIES
from transports.postgres.expiry_planner import NEW, ExpiryPlanner
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements

SCHEMA = "night"
DEAD = 200_000
BUFFERS = 2_000
"""The pages that a statement may read: it claims ten messages, and the dead ones fill more than ten thousand."""


@pytest.fixture(scope="module")
def night() -> Iterator[tuple[PostgresTransport, Tables]]:
    """A queue with ten ready messages, and 200,000 settled ones since a session took its snapshot."""
    with servers.private_server(options="-c fsync=off -c synchronous_commit=off -c shared_buffers=512MB") as server:
        transport = PostgresTransport(server.url, SCHEMA)
        transport.migrate()
        tables = Tables(server.url, SCHEMA)
        with tables.connect(autocommit=False) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute(tables.sql("SELECT count(*) FROM {messages}"))
            tables.execute(
                "INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)"
                " SELECT 'q', '{{}}', '', now(), now(), 0, 5, 'ready' FROM generate_series(1, %s)",
                DEAD,
            )
            tables.execute("UPDATE {messages} SET state = 'claimed', vt = now() + interval '1 minute', read_ct = 1")
            tables.execute("DELETE FROM {messages}")
            tables.execute("VACUUM {messages}")
            transport.send([message("t", "q") for _ in range(10)])
            yield transport, tables
        transport.close()


def buffers(tables: Tables, statement: Statement, parameters: dict[str, Any]) -> int:
    """Return the number of pages that a statement reads."""
    with tables.connect(autocommit=False) as connection:
        explain = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement.text
        ((explained,),) = connection.execute(explain, parameters).fetchall()
        connection.rollback()
    plan = explained if isinstance(explained, list) else json.loads(explained)
    return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])


@pytest.mark.parametrize("queues", [["q"], ["q", "other"]], ids=["one queue", "two queues"])
def test_frontier_claim_reads_no_dead_rows(night: tuple[PostgresTransport, Tables], queues: list[str]) -> None:
    """It reads a few pages at any number of dead rows; a claim over the whole index reads all of them."""
    _, tables = night
    statements = Statements(SCHEMA)
    frontier, names = statements.claim_frontier(queues)
    whole, _ = statements.claim(queues)
    more = {**names, "limit": 10, "lease": 60.0}
    bounds = {f"frontier_{number}": [DEAD] * 10 for number in range(len(queues))}
    assert buffers(tables, frontier, {**more, **bounds, "priorities": PRIORITIES}) < BUFFERS
    assert buffers(tables, whole, more) > BUFFERS


@pytest.mark.parametrize("name", ["queues", "queue_names"])
def test_counting_unknown_states_uses_their_index(night: tuple[PostgresTransport, Tables], name: str) -> None:
    """Rows in unknown states are counted with an index that is empty without them, not with the table."""
    _, tables = night
    with tables.connect() as connection:
        explain = b"EXPLAIN (ANALYZE, FORMAT JSON) " + Statements(SCHEMA)[name].text
        ((explained,),) = connection.execute(explain, {"names": ["q"], "most": 1000}).fetchall()
    text = json.dumps(explained)
    assert "pg_queue_message_strange" in text
    assert "pg_queue_message_pkey" not in text
    assert not re.search(r'"Seq Scan"[^{}]*"Relation Name": "pg_queue_message"', text)


def test_expiry_scan_reads_no_dead_rows(night: tuple[PostgresTransport, Tables]) -> None:
    """A recent scan reads neither dead entries of claimed rows nor ready rows."""
    _, tables = night
    statements = Statements(SCHEMA)
    scan = {"queues": ["q"], "limit": 500, "ahead": 30.0}
    known = {"walked": ["q"], "afters": [DEAD], "share": NEW, "window": NEW, "known": list(range(1, 101))}
    assert buffers(tables, statements["requeue_expired_recent"], {**scan, **known}) < BUFFERS
    assert buffers(tables, statements["requeue_expired"], {**scan, **ExpiryPlanner(["q"]).next_part()}) > BUFFERS
