"""Operations that the database refuses for good or for now: no message is lost, and no task runs twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from consumers import running
from pg_tables import Tables
from postgres.support import named, on_one_server, transport_on
from psycopg import sql
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import (
    Consumer,
    Reply,
    Settlement,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)

Make = Callable[..., PostgresTransport]

CHECK = "ALTER TABLE {messages} ADD CONSTRAINT closed CHECK (queue_name !~ '-closed$')"
TRIGGER = """
CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.queue_name ~ '-closed$' THEN RAISE EXCEPTION 'the queue is closed'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER closed BEFORE INSERT ON {messages} FOR EACH ROW EXECUTE FUNCTION {schema}.refuse()
"""


@pytest.fixture(params=[CHECK, TRIGGER], ids=["check constraint", "trigger"])
def closed(request: pytest.FixtureRequest, postgres: PostgresTransport, tables: Tables, queue: str) -> str:
    """A queue whose messages the database refuses."""
    for statement in request.param.split(";\nCREATE TRIGGER"):
        tables.execute(
            statement if statement.lstrip().startswith(("ALTER", "CREATE")) else "CREATE TRIGGER" + statement
        )
    return queue + "-closed"


def test_rejected_send_is_refused(postgres: PostgresTransport, queue: str, closed: str) -> None:
    """The error is TransportRefused, not an outage, and nothing of the batch was sent."""
    with pytest.raises(TransportRefused):
        postgres.send([message("t", queue), message("t", closed)])
    with pytest.raises(TransportRefused):
        postgres.send([message("t", closed)])
    assert postgres.queues([queue])[0].ready == 0


def test_refused_follow_up_keeps_the_result(
    postgres: PostgresTransport, tables: Tables, queue: str, closed: str
) -> None:
    """The sender gets "result delivery failed", the dead letter has the result, and the task runs once."""
    outcomes: list[Any] = []
    ran: list[int] = []

    def pay(number: int) -> dict[str, int]:
        ran.append(number)
        return {"paid": number}

    tasks: dict[str, Callable[..., Any]] = {
        "pay": pay,
        "done": lambda result, **kwargs: outcomes.append(("done", result, kwargs)),
        "failed": lambda id, **kwargs: outcomes.append(("failed", id, kwargs)),
    }
    good, bad = then("done", queue, callback_kwargs={}), then("done", closed)
    failed = then("failed", queue, callback_kwargs={"k": 1})
    postgres.send(
        [
            message("pay", queue, n, task_id=f"{queue}-{n}", on_success=bad if n == 7 else good, on_error=failed)
            for n in range(15)
        ]
    )
    consumer = Consumer(postgres, tasks, [queue], prefetch=20, lease=5)
    with running(consumer):
        wait_until(lambda: len(outcomes) == 15 and tables.count(queue) == 0, what="the callbacks of all senders")
    assert sorted(ran) == list(range(15))
    assert sorted(result["paid"] for kind, result, _ in outcomes if kind == "done") == [n for n in range(15) if n != 7]
    ((_, id, kwargs),) = [outcome for outcome in outcomes if outcome[0] == "failed"]
    assert id == f"{queue}-7"
    assert kwargs["callback_kwargs"]["k"] == 1
    assert kwargs["callback_kwargs"]["error"].startswith("result delivery failed: ")
    (letter,) = postgres.dead.find()
    assert (letter.result, letter.queue, letter.attempts) == ({"paid": 7}, queue, 1)
    assert letter.reason.startswith("result delivery failed: ")
    status = postgres.reply(f"{queue}-7")
    assert status is not None
    assert (status.status, status.error) == ("failed", letter.reason)
    assert consumer.counters["refused"] == 1


def test_release_survives_a_refused_settlement(postgres: PostgresTransport, queue: str, closed: str) -> None:
    """The refusal of another settlement costs a released message neither its attempt nor its lease."""
    postgres.send([message("pay", queue, on_success=then("done", closed)), message("t", queue), message("t", queue)])
    subscription = postgres.subscribe([queue], lease=60)
    paid, *others = subscription.receive(limit=3, wait=5)
    follow_up = Settlement(paid, Verdict.ACK, follow_up=message("done", closed))
    back = [Settlement(delivery, Verdict.RETRY, counted=False) for delivery in others]
    with pytest.raises(TransportRefused):
        subscription.settle([follow_up, *back])
    assert subscription.settle(back) == [True, True]
    assert [delivery.attempt for delivery in subscription.receive(limit=3, wait=5)] == [1, 1]
    subscription.close()


def test_refused_on_error_leaves_a_dead_letter(postgres: PostgresTransport, queue: str, closed: str) -> None:
    """If on_error is refused too, the dead letter remains, with the result."""
    payload = message("pay", queue, on_success=then("done", closed), on_error=then("failed", closed), task_id=queue)
    postgres.send([payload])
    consumer = Consumer(postgres, {"pay": lambda: {"paid": 1}}, [queue], lease=5)
    with running(consumer):
        wait_until(lambda: postgres.dead.find(), what="the burial")
    (letter,) = postgres.dead.find()
    assert letter.result == {"paid": 1}
    assert letter.reason.startswith("result delivery failed: ")


def test_refused_result_fails_the_call(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The rejected reply becomes a failed one, so that the caller does not run into its timeout."""
    tables.execute("ALTER TABLE {results} ADD CHECK (NOT (result ? 'forbidden'))")
    postgres.send([message("t", queue, reply_key=queue)])
    Consumer(postgres, {"t": lambda: {"forbidden": 1}}, [queue], lease=5).drain(timeout=10)
    reply = postgres.reply(queue)
    assert reply is not None
    assert reply.status == "failed"
    assert reply.error.startswith("result delivery failed: ")
    (letter,) = postgres.dead.find()
    assert letter.result == {"forbidden": 1}


@on_one_server
def test_missing_right_delays_settlements(limited: tuple[str, str], tables: Tables, queue: str) -> None:
    """A worker that cannot write pg_task_result keeps its results and settles them when the right is granted.

    Meanwhile the leases are renewed, so that no other worker runs the same tasks.
    """
    conninfo, role = limited
    ran: list[str] = []
    with transport_on(conninfo, tables.schema) as first, transport_on(conninfo, tables.schema) as second:
        consumers = [
            Consumer(transport, {"t": lambda who=who: ran.append(who)}, [queue], lease=0.9)
            for who, transport in (("first", first), ("second", second))
        ]
        with running(*consumers):
            tables.execute(f"REVOKE INSERT ON {{results}} FROM {role}")
            first.send([message("t", queue, task_id=queue, on_success=then("done", queue + "-cb"))])
            wait_until(lambda: ran, what="the task to run")
            threading.Event().wait(3 * 0.9)
            assert len(ran) == 1
            tables.execute(f"GRANT INSERT ON {{results}} TO {role}")
            wait_until(lambda: tables.count(queue) == 0, what="the settlement")
    assert len(ran) == 1
    assert tables.count(queue + "-cb") == 1


@on_one_server
def test_failing_settlement_delays_no_renewals(limited: tuple[str, str], tables: Tables, queue: str) -> None:
    """A settlement that fails for now does not cost other tasks their leases."""
    conninfo, role = limited
    ran: list[str] = []
    release = threading.Event()

    def long_task() -> None:
        ran.append("long")
        release.wait(10)

    with transport_on(conninfo, tables.schema) as first, transport_on(conninfo, tables.schema) as second:
        tasks: dict[str, Callable[..., Any]] = {"long": long_task, "short": lambda: ran.append("short")}
        both = Consumer(first, tasks, [queue], lease=0.9, concurrency=2)
        rival = second.subscribe([queue], lease=0.9)
        with running(both):
            tables.execute(f"REVOKE INSERT ON {{results}} FROM {role}")
            first.send(
                [message("long", queue), message("short", queue, task_id=queue, on_success=then("d", queue + "-cb"))]
            )
            wait_until(lambda: sorted(ran) == ["long", "short"], what="both tasks to run")
            assert rival.receive(limit=2, wait=3 * 0.9) == ()
            release.set()
            tables.execute(f"GRANT INSERT ON {{results}} TO {role}")
            wait_until(lambda: tables.count(queue) == 0, what="both settlements")
        rival.close()
    assert sorted(ran) == ["long", "short"]


@on_one_server
@pytest.mark.parametrize(
    ("right", "table", "act"),
    [
        ("INSERT", "messages", lambda transport: transport.send([message("t", queue_name())])),
        ("SELECT", "results", lambda transport: transport.reply("key")),
        ("SELECT", "messages", lambda transport: transport.subscribe(["q"], lease=1)),
        ("UPDATE", "messages", lambda transport: transport.subscribe(["q"], lease=1).receive(limit=1, wait=0)),
        ("SELECT", "dead", lambda transport: transport.dead.find()),
    ],
)
def test_missing_right_is_not_ready(
    limited: tuple[str, str], tables: Tables, right: str, table: str, act: Callable[[PostgresTransport], object]
) -> None:
    """TransportNotReady names the role's rights, so that an operator can grant them."""
    conninfo, role = limited
    tables.execute(f"REVOKE {right} ON {{{table}}} FROM {role}")
    with transport_on(conninfo, tables.schema) as transport, pytest.raises(TransportNotReady, match="right"):
        act(transport)


@on_one_server
def test_cancelled_statement_has_known_fate(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """A timeout on the server (here a lock timeout) is an outage with a known fate."""
    transport = make_named()
    tables.execute(sql.SQL("ALTER ROLE postgres IN DATABASE postgres SET lock_timeout = '200ms'").as_string())
    try:
        with transport_on(named(tables.url, name), tables.schema) as hurried:
            with tables.locked("LOCK TABLE {messages}"), pytest.raises(TransportUnavailable) as caught:
                hurried.send([message("t", queue)])
            assert not caught.value.fate_unknown
            hurried.send([message("t", queue)])
    finally:
        tables.execute("ALTER ROLE postgres IN DATABASE postgres RESET lock_timeout")
    assert transport.queues([queue])[0].ready == 1


def test_error_texts_never_quote_payloads(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The server's detail about a refused row is left out, because it may quote the row."""
    tables.execute("ALTER TABLE {messages} ADD CHECK (org_id <> 'blocked')")
    patient = "patient-4711"
    with pytest.raises(TransportRefused) as caught:
        postgres.send([message("t", queue, patient, org_id="blocked")])
    assert patient not in str(caught.value)
    subscription = postgres.subscribe([queue], lease=60)
    postgres.send([message("t", queue)])
    (delivery,) = subscription.receive(limit=1, wait=0)
    follow_up = message("f", queue, patient, org_id="blocked")
    with pytest.raises(TransportRefused) as caught:
        subscription.settle([Settlement(delivery, Verdict.ACK, follow_up=follow_up, reply=Reply("k", "completed"))])
    assert patient not in str(caught.value)
    subscription.close()
