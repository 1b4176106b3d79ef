"""The product's own consumer on the same tables: no message is lost, runs twice, or is visible too early."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from consumers import running
from pg_tables import Tables
from postgres import product
from postgres.product import Product
from postgres.support import in_background, on_one_server, transport_on

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, RetryLater, Settlement, Verdict, from_wire


@pytest.fixture
def beside(tables: Tables) -> Product:
    """The product, with tables that it has made itself and that we have migrated."""
    product.make_tables(tables, "text")
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
    return Product(tables)


@pytest.fixture
def transport(beside: Product, postgres: PostgresTransport) -> PostgresTransport:
    return postgres


def test_product_and_package_share_a_queue(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """With product workers, its reaper and this package's consumer on one queue, every message runs once."""
    ran: Counter[int] = Counter()
    lock, over = threading.Lock(), threading.Event()

    def note(number: int) -> None:
        with lock:
            ran[number] += 1

    def product_worker() -> None:
        while not over.is_set():
            for id, _, payload in beside.claim(queue, limit=5):
                note(from_wire(payload).args[0])  # type: ignore[arg-type]
                beside.acknowledge(id)

    def product_reaper() -> None:
        while not over.wait(0.02):
            beside.reap()

    ours = Consumer(transport, {"t": note}, [queue], concurrency=2, lease=5)
    with in_background(product_worker, product_worker, product_reaper), running(ours):
        try:
            for start in range(0, 600, 50):
                transport.send([message("t", queue, n) for n in range(start, start + 50)])
            wait_until(lambda: len(ran) == 600, timeout=60, what="600 messages to be run")
            wait_until(lambda: beside.tables.count(queue) == 0, what="the queue to be empty")
        finally:
            over.set()
    assert set(ran.values()) == {1}


@on_one_server
def test_unknown_states_are_reported(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """No consumer of this package claims a row in an unknown state; `queues` and doctor report it."""
    transport.send([message("t", queue), message("t", queue)])
    beside.tables.execute(
        "ALTER TABLE {messages} ADD available_at timestamptz NOT NULL DEFAULT now();"
        "UPDATE {messages} SET state = 'scheduled' WHERE msg_id = (SELECT max(msg_id) FROM {messages})"
    )
    ran: list[int] = []
    Consumer(transport, {"t": lambda: ran.append(1)}, [queue]).drain(timeout=60)
    assert ran == [1]
    (state,) = transport.queues([queue])
    assert (state.ready, state.in_flight, state.delayed, state.unknown) == (0, 0, 0, 1)
    (finding,) = [finding for finding in transport.check_up() if finding.name == "waiting"]
    assert finding.level == "warning"
    assert f"1 'scheduled' in '{queue}'" in finding.what


@on_one_server
def test_product_sees_delayed_message_on_time(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """Neither the product's claim nor its reaper touches a delayed message before its time."""
    sent = time.monotonic()
    transport.send([message("t", queue, delay=3.0)])
    assert_invisible_until(beside, queue, sent + 3.0)
    (claimed,) = beside.claim(queue)
    assert claimed[1] == 1


@on_one_server
def test_product_sees_delayed_retry_on_time(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """A delayed retry waits for the product's claim as for this package's, and counts as an attempt there."""
    transport.send([message("t", queue)])
    subscription = transport.subscribe([queue], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=0)
    asked = time.monotonic()
    assert subscription.settle([Settlement(delivery, Verdict.RETRY, delay=3.0)]) == [True]
    assert_invisible_until(beside, queue, asked + 3.0)
    (claimed,) = beside.claim(queue)
    assert claimed[1] == 2
    subscription.close()


def assert_invisible_until(beside: Product, queue: str, due: float) -> None:
    looks = 0
    while True:
        beside.reap()
        if beside.tables.rows("SELECT 1 FROM {messages} WHERE queue_name = %s AND state = 'ready'", queue):
            break
        assert beside.claim(queue) == []
        assert time.monotonic() < due + 20, "it never became ready"
        looks += 1
    assert time.monotonic() >= due
    assert looks


def test_expired_product_claim_runs_here(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """An expired claim of the product is the next attempt of this package's consumer, without the product's reaper."""
    transport.send([message("t", queue)])
    assert len(beside.claim(queue, lease=0.2)) == 1
    subscription = transport.subscribe([queue], lease=60)
    assert [delivery.attempt for delivery in subscription.receive(limit=1, wait=5)] == [2]
    subscription.close()


def test_late_settlement_respects_product_claim(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """The fence holds against a claim of the product: its row stays, and no follow-up is sent."""
    transport.send([message("t", queue)])
    subscription = transport.subscribe([queue], lease=0.1)
    (delivery,) = subscription.receive(limit=1, wait=0)
    wait_until(lambda: beside.reap() == 1, what="our lease to end")
    (claimed,) = beside.claim(queue)
    late = Settlement(delivery, Verdict.ACK, follow_up=message("after", queue))
    assert subscription.settle([late]) == [False]
    assert beside.tables.rows("SELECT msg_id, read_ct FROM {messages}") == [(claimed[0], 2)]
    subscription.close()


def test_reaped_message_can_still_be_renewed(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """If the reaper made a message ready and no worker claimed it, a renewal takes it back."""
    transport.send([message("t", queue)])
    subscription = transport.subscribe([queue], lease=0.2)
    (delivery,) = subscription.receive(limit=1, wait=0)
    wait_until(lambda: beside.reap() == 1, what="our lease to end")
    assert subscription.renew([delivery]) == [True]
    assert beside.claim(queue) == []
    assert subscription.settle([Settlement(delivery, Verdict.ACK)]) == [True]
    subscription.close()


def test_product_reads_our_follow_ups(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """The product's consumer claims and reads a follow-up: the result first, then the callback's kwargs."""
    transport.send([message("t", queue, on_success=then("done", queue + "-cb", callback_kwargs={"a": 1}))])
    Consumer(transport, {"t": lambda: {"ok": True}}, [queue]).drain(timeout=10)
    ((_, _, payload),) = beside.claim(queue + "-cb")
    assert (payload["task_name"], payload["args"], payload["kwargs"], payload["queue"], payload["fairness"]) == (
        "done",
        [{"ok": True}],
        {"callback_kwargs": {"a": 1}},
        queue + "-cb",
        None,
    )


def test_product_messages_run_here(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """The five keys that the product's backend writes are a task; a retried one keeps its place."""
    ran: list[object] = []

    def task(*args: object, **kwargs: object) -> None:
        ran.append((args, kwargs))
        if len(ran) == 1:
            raise RetryLater(delay=0)

    beside.enqueue(
        queue, f'{{"task_name": "t", "args": [1], "kwargs": {{"k": 2}}, "queue": "{queue}", "fairness": null}}'
    )
    Consumer(transport, {"t": task}, [queue]).drain(timeout=10)
    assert ran == [((1,), {"k": 2})] * 2
    assert beside.tables.count(queue) == 0


def test_lease_renewal_is_a_hot_update(beside: Product, transport: PostgresTransport, queue: str) -> None:
    """A renewal changes no indexed column, so most renewals write no index entry, also on the product's tables."""
    transport.send([message("t", queue, number) for number in range(20)])
    subscription = transport.subscribe([queue], lease=60)
    held = subscription.receive(limit=20, wait=5)
    for _ in range(20):
        assert all(subscription.renew(held))
    subscription.close()
    counts = (
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE schemaname = %s AND relname = 'pg_queue_message'"
    )

    def updates() -> tuple[int, int]:
        ((all_of_them, hot),) = beside.tables.rows(counts, beside.tables.schema)
        return all_of_them, hot

    wait_until(lambda: updates()[0] >= 420, what="the statistics of the updates")
    assert updates()[1] >= 300


@pytest.mark.parametrize("text", ["text", "varchar", "varchar(255)"])
def test_many_queues_are_served_from_the_products_tables(tables: Tables, queue: str, text: str) -> None:
    """A subscription to more queues than one claim merges takes from tables that Django made."""
    product.make_tables(tables, text)
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
        names = [f"{queue}-{number}" for number in range(100)]
        sent = transport.send([message("t", name) for name in names[::9]])
        assert Consumer(transport, {"t": lambda: None}, names).drain(timeout=30) == len(sent)
