"""Rows that the database hides or keeps: row-level security, and triggers and rules that undo a statement."""

from __future__ import annotations

import logging

import pytest
from pg_tables import Tables
from postgres.support import on_one_server, transport_on
from queues import queue_name

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Reply, Settlement, TransportNotReady, Verdict

pytestmark = on_one_server

TABLES = ["pg_queue_message", "pg_task_result", "pg_queue_dead_letter"]
POLICIES = ["", "USING (true)", "FOR SELECT USING (true)", "FOR DELETE USING (false)"]

KEEPS = """
CREATE FUNCTION {{schema}}.keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.org_id = 'kept' THEN RETURN NULL; END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep BEFORE {event} ON {{messages}} FOR EACH ROW EXECUTE FUNCTION {{schema}}.keep()
"""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("table", TABLES)
def test_row_security_is_refused_at_start(
    postgres: PostgresTransport, tables: Tables, limited: tuple[str, str], table: str, policy: str
) -> None:
    """With any policy on any table, subscribe and doctor name the table and the remedy."""
    url, role = limited
    tables.execute(f"ALTER TABLE {{schema}}.{table} ENABLE ROW LEVEL SECURITY")
    if policy:
        tables.execute(f"CREATE POLICY p ON {{schema}}.{table} {policy}")
    with transport_on(url, tables.schema) as transport:
        with pytest.raises(TransportNotReady, match=f"row-level security is active .* on {table}:.*BYPASSRLS"):
            transport.subscribe(["q"], lease=60)
        (finding,) = [finding for finding in transport.check_up() if finding.name == "rights"]
        assert (finding.level, table in finding.what, "BYPASSRLS" in finding.remedy) == ("error", True, True)
        tables.execute(f"ALTER ROLE {role} BYPASSRLS")
    with transport_on(url, tables.schema) as transport:
        transport.subscribe(["q"], lease=60).close()


def test_bypassed_row_security_is_accepted(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """If the role bypasses row security, work goes on."""
    for table in TABLES:
        tables.execute(f"ALTER TABLE {{schema}}.{table} ENABLE ROW LEVEL SECURITY")
    postgres.send([message("t", queue)])
    subscription = postgres.subscribe([queue], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=5)
    assert subscription.settle([Settlement(delivery, Verdict.ACK)]) == [True]
    subscription.close()
    assert {finding.level for finding in postgres.check_up() if finding.name == "rights"} == {"ok"}


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize("delay", [0.0, 60.0])
def test_kept_message_sends_no_follow_up(
    postgres: PostgresTransport,
    tables: Tables,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    verdict: Verdict,
    delay: float,
) -> None:
    """If a trigger keeps the row, its settlement returns False each time; the others of the batch take effect."""
    postgres.send([message("t", queue, n, org_id="kept" if n == 1 else "") for n in range(3)])
    subscription = postgres.subscribe([queue], lease=60)
    deliveries = subscription.receive(limit=3, wait=5)
    tables.execute(KEEPS.format(event="UPDATE OR DELETE"))
    after = queue_name()
    batch = [
        Settlement(
            delivery,
            verdict,
            delay=delay if verdict is Verdict.RETRY else 0.0,
            follow_up=message("f", after, n),
            reply=Reply(f"{after}-{n}", "completed", result=n),
        )
        for n, delivery in enumerate(deliveries)
    ]
    assert subscription.settle(batch) == [True, False, True]
    assert tables.rows("SELECT message->'args' FROM {messages} WHERE queue_name = %s ORDER BY 1", after) == [
        ([0],),
        ([2],),
    ]
    assert [postgres.reply(f"{after}-{n}") is not None for n in range(3)] == [True, False, True]
    assert len(postgres.dead.find(queue=queue)) == (2 if verdict is Verdict.BURY else 0)
    logged = [record for record in caplog.records if vars(record).get("wire.event") == "row_kept"]
    assert [(record.levelno, vars(record)["wire.id"]) for record in logged] == [(logging.ERROR, deliveries[1].id)]
    subscription.close()


def test_suppressed_renewal_loses_the_lease(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """`renew` returns True only for leases that were extended."""
    postgres.send([message("t", queue, n, org_id="kept" if n == 1 else "") for n in range(3)])
    subscription = postgres.subscribe([queue], lease=60)
    deliveries = subscription.receive(limit=3, wait=5)
    tables.execute(KEEPS.format(event="UPDATE"))
    assert subscription.renew(deliveries) == [True, False, True]
    subscription.close()


@pytest.mark.parametrize(("event", "level"), [("BEFORE UPDATE", "warning"), ("AFTER UPDATE", "ok")])
def test_doctor_names_triggers_that_can_keep_rows(
    postgres: PostgresTransport, tables: Tables, event: str, level: str
) -> None:
    """A trigger that runs before each row is a warning; one that runs afterwards is not."""
    tables.execute(KEEPS.format(event="UPDATE").replace("BEFORE UPDATE", event))
    (finding,) = [finding for finding in postgres.check_up() if finding.name == "tables"]
    assert finding.level == level
    assert ("trigger keep" in finding.what) == (level == "warning")


@pytest.mark.parametrize("rule", ["ON DELETE", "ON UPDATE", "ON INSERT"])
@pytest.mark.parametrize("table", TABLES)
def test_table_with_replacing_rules_is_refused(
    postgres: PostgresTransport, tables: Tables, rule: str, table: str
) -> None:
    """A rule could turn a settlement into nothing; a rule for other statements is accepted."""
    unused = {("pg_queue_dead_letter", "ON DELETE"), ("pg_queue_dead_letter", "ON UPDATE")}
    unused |= {("pg_task_result", "ON DELETE")}
    tables.execute(f"CREATE RULE r AS {rule} TO {{schema}}.{table} DO INSTEAD NOTHING")
    if (table, rule) in unused:
        postgres.subscribe(["q"], lease=60).close()
        return
    with pytest.raises(TransportNotReady):
        postgres.subscribe(["q"], lease=60)
