"""Claims are exclusive, bounded and ordered, for one queue and for several."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, ShiftedClock, in_background, on_one_server
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport, claim_planner, expiry_planner, queue_inspector
from transports.postgres.claim_planner import Attempt, ClaimPlan, ClaimPlanner, ClaimResult, FirstReady, Scan
from transports.postgres.connection import Rows
from transports.postgres.expiry_planner import ExpiryPlanner
from transports.postgres.rows import RequeueRow
from transports.postgres.scan_budget import LONGEST_REST, SHARE, ScanBudget
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements
from transports.postgres.subscription import PostgresSubscription
from unstract_core import Consumer, Delivery, Settlement, TransportUnavailable, Verdict

Shared = tuple[PostgresTransport, Tables]


@pytest.mark.parametrize("queues", [1, 4], ids=["one queue", "several queues"])
def test_concurrent_claimers_never_share_a_message(shared: Shared, queues: int) -> None:
    """Eight subscriptions claim all messages, each once, and never more than their limit."""
    transport, tables = shared
    names = [queue_name() for _ in range(queues)]
    sent = transport.send([message("t", names[n % queues], n, priority=n % 10 + 1) for n in range(1200)])
    taken: Counter[str] = Counter()
    excesses: list[int] = []
    lock, barrier = threading.Lock(), threading.Barrier(8)

    def claimer(limit: int) -> None:
        subscription = transport.subscribe(names, lease=60)
        barrier.wait(10)
        while batch := subscription.receive(limit=limit, wait=0.3):
            with lock:
                taken.update(delivery.id for delivery in batch)
                if len(batch) > limit:
                    excesses.append(len(batch))
            assert all(subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in batch]))
        subscription.close()

    with in_background(*[lambda limit=limit: claimer(limit) for limit in (1, 2, 3, 5, 8, 13, 21, 34)]):
        pass
    assert taken == Counter(sent)
    assert not excesses
    assert all(tables.count(name) == 0 for name in names)


@settings(max_examples=25)
@given(
    sent=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10)), min_size=1, max_size=30),
    limits=st.lists(st.integers(1, 8), max_size=30),
    queues=st.integers(1, 4),
)
def test_claims_follow_priority_then_order_over_queues(
    shared: Shared, sent: list[tuple[int, int]], limits: list[int], queues: int
) -> None:
    """For any messages in any number of queues, batches and their messages come in one order."""
    transport, _ = shared
    names = [queue_name() for _ in range(queues)]
    rows = [(names[place % queues], priority) for place, priority in sent]
    ids = transport.send([message("t", name, priority=priority) for name, priority in rows])
    subscription = transport.subscribe(names, lease=60)
    received: list[Delivery] = []
    for limit in [*limits, len(sent)]:
        batch = subscription.receive(limit=limit, wait=0)
        assert len(batch) == min(limit, len(sent) - len(received))
        received += batch
    subscription.close()
    expected = sorted(zip(ids, rows, strict=True), key=lambda row: (-row[1][1], int(row[0])))
    assert [(delivery.id, (delivery.queue, delivery.priority)) for delivery in received] == expected


@pytest.mark.parametrize("analysed", [False, True])
@pytest.mark.parametrize("queues", [1, 3], ids=["one queue", "several queues"])
def test_claim_locks_only_its_own_rows(shared: Shared, queues: int, analysed: bool) -> None:
    """While one claim is uncommitted, another gets all other messages."""
    transport, tables = shared
    names = [queue_name() for _ in range(queues)]
    transport.send([message("t", names[n % queues]) for n in range(3000)])
    if analysed:
        tables.execute("ANALYZE {messages}")
    claim, parameters = Statements(tables.schema).claim(names)
    with tables.connect(autocommit=False) as first, tables.connect(autocommit=False) as second:
        mine = first.execute(claim.text, {**parameters, "limit": 7, "lease": 60}).fetchall()
        others = second.execute(claim.text, {**parameters, "limit": 5000, "lease": 60}).fetchall()
        first.rollback()
        second.rollback()
    assert (len(mine), len(others)) == (7, 2993)
    tables.execute("DELETE FROM {messages} WHERE queue_name = ANY (%s)", names)


@pytest.mark.parametrize("queues", [1, 3], ids=["one queue", "several queues"])
def test_claim_reads_only_its_own_rows(shared: Shared, queues: int) -> None:
    """A claim of ten messages reads its index in order and sorts nothing, also in a queue of ten thousand."""
    transport, tables = shared
    names = [queue_name() for _ in range(queues)]
    transport.send([message("t", names[n % queues]) for n in range(10_000)])
    tables.execute("ANALYZE {messages}")
    claim, parameters = Statements(tables.schema).claim(names)
    with tables.connect(autocommit=False) as connection:
        explain = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + claim.text
        ((plan,),) = connection.execute(explain, {**parameters, "limit": 10, "lease": 60}).fetchall()
        connection.rollback()
    tables.execute("DELETE FROM {messages} WHERE queue_name = ANY (%s)", names)
    nodes, widest = [plan[0]["Plan"]], 0.0
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        widest = max(widest, node["Actual Rows"])
    assert widest <= 20, plan


@on_one_server
@pytest.mark.parametrize("queues", [1, 3], ids=["one queue", "several queues"])
def test_locked_row_neither_stops_nor_spins_a_worker(
    postgres: PostgresTransport, tables: Tables, queue: str, queues: int, asked: list[str]
) -> None:
    """A receive still ends in time and on `wake`, runs few statements, and claims every other row."""
    names = [f"{queue}-{n}" for n in range(queues)]
    (locked, _) = postgres.send([message("t", names[0], priority=9), message("t", names[0])])
    subscription = postgres.subscribe(names, lease=60)
    with tables.locked("SELECT 1 FROM {messages} WHERE msg_id = %s FOR UPDATE", int(locked)):
        (other,) = subscription.receive(limit=1, wait=2)
        assert other.id != locked
        asked.clear()
        started = time.monotonic()
        assert subscription.receive(limit=1, wait=0.4) == ()
        assert 0.4 <= time.monotonic() - started < 10
        assert len(asked) <= 100
        with in_background(lambda: subscription.receive(limit=1, wait=30), timeout=10):
            time.sleep(0.1)
            subscription.wake()
    assert [delivery.id for delivery in subscription.receive(limit=1, wait=2)] == [locked]
    subscription.close()


def test_messages_sent_during_claims_are_not_lost(shared: Shared, queue: str) -> None:
    """With concurrent senders and claimers, every message is claimed once, also the last one."""
    transport, tables = shared
    taken: Counter[str] = Counter()
    sent: list[str] = []
    done = threading.Event()

    def sender() -> None:
        for n in range(150):
            sent.extend(transport.send([message("t", queue, n)]))

    def claimer() -> None:
        subscription = transport.subscribe([queue], lease=60)
        while not done.is_set():
            batch = subscription.receive(limit=10, wait=0.1)
            taken.update(delivery.id for delivery in batch)
            subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in batch])
        subscription.close()

    with in_background(claimer, claimer):
        with in_background(sender, sender):
            pass
        wait_until(lambda: tables.count(queue) == 0, what="the queue to be empty")
        done.set()
    assert taken == Counter(sent)


def test_changed_column_type_stops_no_consumer(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The product may migrate its table while consumers run; prepared statements continue to work."""
    subscription = postgres.subscribe([queue], lease=60)
    for n in range(12):
        postgres.send([message("t", queue, n)])
        (delivery,) = subscription.receive(limit=1, wait=0)
        subscription.settle([Settlement(delivery, Verdict.ACK)])
    tables.execute(
        "ALTER TABLE {messages} ALTER COLUMN queue_name TYPE varchar(300), ALTER COLUMN org_id TYPE varchar(80)"
    )
    postgres.send([message("t", queue, n) for n in range(3)])
    received: list[Delivery] = []

    def take() -> bool:
        try:
            received.extend(subscription.receive(limit=1, wait=0))
        except Exception:
            return False
        return len(received) == 3

    wait_until(take, what="messages to be received again")
    subscription.close()


@settings(max_examples=25)
@given(
    sent=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 10)), min_size=1, max_size=60),
    limits=st.lists(st.integers(1, 8), max_size=30),
)
def test_subscription_to_many_queues_keeps_the_order(
    shared: Shared, sent: list[tuple[int, int]], limits: list[int]
) -> None:
    """Messages of more queues than one claim merges come in one order, for any batch size."""
    transport, _ = shared
    names = [queue_name() for _ in range(9)]
    ids = transport.send([message("t", names[place], priority=priority) for place, priority in sent])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim_planner, "MERGED", 4)
        patch.setattr(claim_planner, "_SIZES", (2, 4))
        subscription = transport.subscribe(names, lease=60)
        received: list[str] = []
        for limit in itertools.chain(limits, itertools.repeat(len(sent))):
            batch = subscription.receive(limit=limit, wait=0)
            assert len(batch) <= limit
            received += [delivery.id for delivery in batch]
            if not batch:
                break
        subscription.close()
    expected = sorted(zip(ids, sent, strict=True), key=lambda pair: (-pair[1][1], int(pair[0])))
    assert received == [id for id, _ in expected]


def test_consumer_serves_thousands_of_queues(shared: Shared) -> None:
    """Two thousand queues are served, and a message that another program sends to the last one is found."""
    transport, tables = shared
    prefix = queue_name()
    names = [f"{prefix}-{number:04}" for number in range(2000)]
    sent = transport.send([message("t", name) for name in names[::20]])
    consumer = Consumer(transport, {"t": lambda: None}, names)
    assert consumer.drain(timeout=60) == len(sent)
    tables.execute(
        "INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)"
        " SELECT queue_name, message, '', now(), now(), 0, 1, 'ready' FROM (VALUES (%s, %s::jsonb)) AS v"
        " (queue_name, message)",
        names[-1],
        '{"task_name": "t", "args": [], "kwargs": {}, "queue": "q", "fairness": null}',
    )
    assert consumer.drain(timeout=60) == 1


@on_one_server
def test_idle_receive_costs_same_for_many_queues(
    make_postgres: Callable[..., PostgresTransport], tables: Tables, asked: list[str]
) -> None:
    """A receive that finds nothing runs as many statements for two thousand queues as for a hundred, each as short."""
    clock = ShiftedClock()
    postgres = make_postgres(clock=clock)
    costs = []
    for number in (100, 2000):
        subscription = postgres.subscribe([f"q-{place}" for place in range(number)], lease=600)
        postgres.send([message("t", "another queue")])
        subscription.receive(limit=10, wait=0)
        clock.ahead += LONGEST_REST  # each scan is due in both, however long the first receive took
        asked.clear()
        subscription.receive(limit=10, wait=0)
        costs.append((len(asked), subscription.claims.queues))
        subscription.close()
    assert costs[0] == costs[1]
    assert costs[0][0] <= 4


def rest(subscription: PostgresSubscription, scan: Scan, seconds: float = 3600.0) -> None:
    """Let a scan of the index appear to have taken so many seconds, so that it rests for 25 times as long, or 30 s."""
    plan = ClaimPlan(scan, time.monotonic() - seconds, 1, Statement(b""), {})
    subscription.claims.record(ClaimResult(plan, []))


def bounded(transport: PostgresTransport, names: Sequence[str]) -> PostgresSubscription:
    """Subscribe without scans of the whole index for 30 seconds, as if these took very long."""
    subscription = transport.subscribe(names, lease=60)
    rest(subscription, Scan.WHOLE)
    expiry = subscription.requeuer.planner
    scan = attrs.evolve(expiry.plan(0.0, 0), began=time.monotonic() - 3600.0)
    expiry.record(scan, RequeueRow(0, None, {}, None, None, None, 0, None, None))
    return subscription


@settings(max_examples=25)
@given(
    sent=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10)), min_size=1, max_size=30),
    limits=st.lists(st.integers(1, 8), max_size=30),
    queues=st.integers(1, 3),
    later=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10)), max_size=10),
)
def test_frontier_claims_keep_the_order(
    shared: Shared,
    sent: list[tuple[int, int]],
    limits: list[int],
    queues: int,
    later: list[tuple[int, int]],
) -> None:
    """The frontier is kept for each queue and priority, so a later message of higher priority comes first."""
    transport, _ = shared
    names = [queue_name() for _ in range(queues)]
    waiting: list[tuple[int, int]] = []

    def send(rows: list[tuple[int, int]]) -> None:
        if rows:
            ids = transport.send([message("t", names[place % queues], priority=priority) for place, priority in rows])
            waiting.extend((-priority, int(id)) for id, (_, priority) in zip(ids, rows, strict=True))

    subscription = bounded(transport, names)
    send(sent)
    for limit in [*limits, len(sent) + len(later)]:
        batch = subscription.receive(limit=limit, wait=0)
        waiting.sort()
        assert [(-delivery.priority, int(delivery.id)) for delivery in batch] == waiting[:limit]
        del waiting[: len(batch)]
        send(later)
        later = []
    assert len(subscription.receive(limit=100, wait=0)) == len(waiting)
    subscription.close()


@on_one_server
@pytest.mark.parametrize("queues", [1, 3], ids=["one queue", "several queues"])
def test_late_committed_id_is_found_within_a_second(
    make_postgres: Callable[..., PostgresTransport], tables: Tables, queue: str, queues: int
) -> None:
    """A message that commits after higher ids were claimed is found in about a second, also with many dead rows."""
    names = [f"{queue}-{n}" for n in range(queues)]
    postgres = make_postgres(poll_interval=LONG_POLL)
    subscription = bounded(postgres, names)
    with tables.connect(autocommit=False) as slow:
        (late,) = postgres.send([message("t", names[0])], within=slow.cursor())
        (early,) = postgres.send([message("t", names[0])])
        assert int(late) < int(early)
        assert [delivery.id for delivery in subscription.receive(limit=10, wait=10)] == [early]
        slow.commit()
    committed = time.monotonic()
    assert [delivery.id for delivery in subscription.receive(limit=10, wait=30)] == [late]
    assert time.monotonic() - committed < 1.0 + AT_ONCE
    subscription.close()


@on_one_server
@pytest.mark.parametrize("late", [0.5, 5.0], ids=["just missed", "long missed"])
def test_late_committed_delay_is_found_within_a_second(
    make_postgres: Callable[..., PostgresTransport], tables: Tables, queue: str, late: float
) -> None:
    """A delayed message whose time ended before its commit is found in about a second."""
    postgres = make_postgres(poll_interval=LONG_POLL)
    subscription = bounded(postgres, [queue])
    with tables.connect(autocommit=False) as slow:
        (sent,) = postgres.send([message("t", queue, delay=0.2)], within=slow.cursor())
        assert subscription.receive(limit=1, wait=0.2 + late) == ()
        slow.commit()
    committed = time.monotonic()
    received: list[Delivery] = []
    while not received and time.monotonic() < committed + 30:
        received += subscription.receive(limit=1, wait=1)
    assert [delivery.id for delivery in received] == [sent]
    assert time.monotonic() - committed < 2.0 + AT_ONCE
    subscription.close()


@on_one_server
def test_immediate_retry_is_claimed_at_once(postgres: PostgresTransport, queue: str) -> None:
    """A retry without delay lies below the frontier, and the next claim finds it."""
    subscription = bounded(postgres, [queue])
    sent = postgres.send([message("t", queue) for _ in range(5)])
    first, *others = subscription.receive(limit=5, wait=0)
    assert all(subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in others]))
    rest(subscription, Scan.RECENT)
    assert subscription.settle([Settlement(first, Verdict.RETRY)]) == [True]
    assert [(delivery.id, delivery.attempt) for delivery in subscription.receive(limit=5, wait=0)] == [(sent[0], 2)]
    subscription.close()


@on_one_server
def test_requeued_message_is_claimed_at_once(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A message with an expired lease lies below the frontier, and is claimed as soon as it is requeued."""
    subscription = bounded(postgres, [queue])
    sent = postgres.send([message("t", queue) for _ in range(5)])
    assert len(subscription.receive(limit=5, wait=0)) == 5
    rest(subscription, Scan.RECENT)
    tables.execute("UPDATE {messages} SET vt = now() WHERE msg_id = %s", int(sent[1]))
    assert [(delivery.id, delivery.attempt) for delivery in subscription.receive(limit=5, wait=20)] == [(sent[1], 2)]
    subscription.close()


@on_one_server
def test_whole_claim_finds_rows_that_others_made_ready(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A ready row for which the frontier was not lowered is found by the next WHOLE claim."""
    subscription = bounded(postgres, [queue])
    (low, _) = postgres.send([message("t", queue), message("t", queue)])
    assert len(subscription.receive(limit=2, wait=0)) == 2
    tables.execute("UPDATE {messages} SET state = 'ready' WHERE msg_id = %s", int(low))
    rest(subscription, Scan.RECENT)
    assert subscription.receive(limit=2, wait=0) == ()
    rest(subscription, Scan.WHOLE, seconds=0.012)  # due again in 0.3 s
    assert [delivery.id for delivery in subscription.receive(limit=2, wait=20)] == [low]
    subscription.close()


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20), st.floats(0, 5))
def test_slow_scans_take_a_small_part_of_time(durations: list[float], shortest: float) -> None:
    """The rest after a scan is proportional to its time, at most 30 s; one slow scan changes nothing."""
    pace, now, before = ScanBudget(shortest), 0.0, math.inf
    for seconds in durations:
        now = max(now, pace.due_at)
        pace.record(now, now + seconds)
        now += seconds
        rest = pace.due_at - now
        assert rest == pytest.approx(min(max(min(seconds, before) / SHARE, shortest), LONGEST_REST), abs=1e-6)
        before = seconds


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10), st.floats(0, 100))
def test_cancelled_scans_run_more_and_more_rarely(durations: list[float], seconds: float) -> None:
    """The rest doubles after each cancelled scan beyond 30 s; a success ends that."""
    pace, now = ScanBudget(), 0.0
    for number, failing in enumerate(durations):
        now = max(now, pace.due_at)
        pace.record_failure(now, now + failing)
        now += failing
        assert pace.due_at - now == pytest.approx(min(failing / SHARE, LONGEST_REST * 2 ** min(number, 4)), abs=1e-6)
    pace.record(now, now)
    pace.record_failure(now, now + seconds)
    assert pace.due_at - (now + seconds) == pytest.approx(min(seconds / SHARE, LONGEST_REST), abs=1e-6)


@on_one_server
def test_cancelled_whole_scan_stops_no_work(
    postgres: PostgresTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a WHOLE scan exceeds the time limit of a statement, rows beyond the frontier are still claimed."""
    subscription = postgres.subscribe([queue], lease=3)
    slow = Statement(b"SELECT pg_sleep(30)")
    execute = subscription._listener.execute

    def execute_slowly(operation: str, statement: Statement, parameters: dict[str, Any]) -> Rows:
        scans = (subscription._statements["requeue_expired"], subscription._statements.claim([queue])[0])
        return execute(operation, slow if statement in scans else statement, {} if statement in scans else parameters)

    monkeypatch.setattr(subscription._listener, "execute", execute_slowly)
    sent = postgres.send([message("t", queue), message("t", queue)])
    failures, taken = 0, list[str]()
    while len(taken) < len(sent):
        try:
            for delivery in subscription.receive(limit=1, wait=1):
                taken.append(delivery.id)
        except TransportUnavailable:
            failures += 1
            assert failures <= 2, "the whole was looked at again and again"
    assert taken == sent
    assert [list(subscription.receive(limit=1, wait=0.1)) for _ in range(3)] == [[], [], []]
    subscription.close()


@on_one_server
def test_lost_connection_delays_no_scan(
    make_postgres: Callable[..., PostgresTransport], tables: Tables, queue: str
) -> None:
    """Only a scan that took too long runs more rarely; a lost connection changes nothing."""
    clock = ShiftedClock()
    postgres = make_postgres(clock=clock)
    subscription = postgres.subscribe([queue], lease=600)
    assert subscription.receive(limit=1, wait=0) == ()
    clock.ahead += LONGEST_REST
    due_at = subscription.claims.due_at, subscription.requeuer.planner.full_due_at
    tables.execute("SELECT pg_terminate_backend(%s)", subscription._listener.backend_pid)
    with pytest.raises(TransportUnavailable):
        subscription.receive(limit=1, wait=0)
    assert (subscription.claims.due_at, subscription.requeuer.planner.full_due_at) == due_at
    subscription.close()


@pytest.mark.parametrize("queues", [1, 3, 70])
def test_delay_ends_on_time_among_many_claimed_rows(
    make_postgres: Callable[..., PostgresTransport],
    tables: Tables,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
    queues: int,
) -> None:
    """Many claimed rows are read in parts; new and known delays still end on time."""
    monkeypatch.setattr(expiry_planner, "PART", 20)
    monkeypatch.setattr(expiry_planner, "NEW", 10)
    postgres = make_postgres(poll_interval=LONG_POLL)
    ids = postgres.send([message("t", queue, delay=3600) for _ in range(400)])
    subscription = postgres.subscribe([f"{queue}-{number}" for number in range(1, queues)] + [queue], lease=60)
    assert subscription.receive(limit=1, wait=0) == ()
    for delay in (0.2, 1.0):
        (sent,) = postgres.send([message("t", queue, delay=delay)])
        started = time.monotonic()
        assert [delivery.id for delivery in subscription.receive(limit=1, wait=30)] == [sent]
        assert delay <= time.monotonic() - started + 0.01 < delay + AT_ONCE
    tables.execute("UPDATE {messages} SET vt = now() WHERE msg_id = %s", int(ids[200]))
    assert [delivery.id for delivery in subscription.receive(limit=1, wait=30)] == [ids[200]]
    subscription.close()


def test_retry_is_on_time_despite_old_id() -> None:
    """The subscription knows when its own retries are due, and finds them without a scan of all claimed rows."""
    clock = ShiftedClock()
    planner = ExpiryPlanner(["q"], clock=clock)
    scan = planner.plan(0.0, 0)
    assert planner.record(scan, RequeueRow(0, None, {}, None, None, 2**40, 0, None, None)) == math.inf
    planner.is_due_soon([(7, 0.3)])
    recent = planner.plan(0.2, 0, recent=True)
    assert (recent.parameters["known"], recent.parameters["afters"]) == ([], [2**40])
    assert planner.record(recent, RequeueRow(0, None, None, None, None, None, 0, None, None)) <= 0.3
    clock.ahead += 0.2
    assert planner.plan(0.2, 0, recent=True).parameters["known"] == [7]


@pytest.mark.parametrize("queues", [1, 64])
def test_claimed_rows_of_other_queues_delay_no_lease(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch, queues: int
) -> None:
    """An expired lease is found by the first look, however many rows of other queues are claimed before it."""
    monkeypatch.setattr(expiry_planner, "PART", 20)
    postgres.send([message("t", f"{queue}-other", delay=3600) for _ in range(100)])
    (sent,) = postgres.send([message("t", queue, delay=3600)])
    postgres.send([message("t", f"{queue}-other", delay=3600)])
    tables.execute("UPDATE {messages} SET vt = now() WHERE msg_id = %s", int(sent))
    subscription = postgres.subscribe([queue, *(f"{queue}-{n}" for n in range(1, queues))], lease=60)
    assert [delivery.id for delivery in subscription.receive(limit=1, wait=0)] == [sent]
    subscription.close()


def test_unprepared_claims_merge_only_queues_with_rows() -> None:
    """Without prepared statements, a claim of many queues merges only those with ready rows."""
    names = [f"q-{number}" for number in range(64)]
    assert not ClaimPlanner(Statements("s"), names).reads_queues_first
    planner = ClaimPlanner(Statements("s"), names, prepared=False)
    first = planner.plan(10)
    assert first is not None
    assert first.needs_ready_queues
    plan = planner.plan(10, ready=[("q-7", 5), ("other", 5), ("q-3", 1)])
    assert plan.parameters == {"queue_0": "q-7", "queue_1": "q-3", "limit": 10}
    assert not ClaimPlanner(Statements("s"), names[:8], prepared=False).reads_queues_first


def test_unprepared_claims_of_many_queues_keep_order(
    make_postgres: Callable[..., PostgresTransport], queue: str
) -> None:
    """A subscription without prepared statements claims from 20 queues by priority, then in the order of sending."""
    postgres = make_postgres(listen=False, poll_interval=0.1)
    names = [f"{queue}-{number}" for number in range(20)]
    ids = postgres.send([message("t", names[n % 20], priority=1 + n % 3) for n in range(60)])
    (later,) = postgres.send([message("t", names[3], delay=0.2)])
    subscription = postgres.subscribe(names, lease=60)
    assert subscription.claims.reads_queues_first
    received = [delivery.id for _ in range(6) for delivery in subscription.receive(limit=10, wait=0)]
    assert received == sorted(ids, key=lambda id: (-(ids.index(id) % 3), int(id)))
    assert [delivery.id for delivery in subscription.receive(limit=10, wait=10)] == [later]
    subscription.close()


class VirtualClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def planned(planner: ClaimPlanner, limit: int, attempt: Attempt = Attempt.FIRST) -> ClaimPlan:
    plan = planner.plan(limit, attempt)
    assert plan is not None
    return plan


def taken(msg_id: int, priority: int = 5) -> Delivery:
    return Delivery(str(msg_id), "q", 1, None, "{}", None, "", priority)


def test_frontier_rises_in_priorities_without_ready_rows() -> None:
    """Rows of such a priority that others have claimed are dead as well; rows that may still commit are not skipped."""
    clock = VirtualClock()
    planner = ClaimPlanner(Statements("s"), ["q", "r"], clock=clock)
    for moment in (100.0, 111.0, 122.0):
        clock.now = moment
        slow = attrs.evolve(planned(planner, 2), scan=Scan.WHOLE, began=moment - 3600.0)
        planner.record(ClaimResult(slow, []))
        planner.record(ClaimResult(attrs.evolve(slow, scan=Scan.RECENT), [taken(70), taken(90)]))
    planner.record(FirstReady({"q": 5}))
    clock.now = 123.0
    plan = planned(planner, 2)
    assert plan.scan is Scan.FRONTIER
    assert plan.parameters["priorities"] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert plan.parameters["frontier_0"] == [90] * 6 + [0] * 4
    assert plan.parameters["frontier_1"] == [90] * 10


def test_whole_claim_repeats_after_finding_rows_below_frontier() -> None:
    """Rows that others made ready again may be many, of every priority: they do not wait a rest for each of them."""
    clock = VirtualClock()
    planner = ClaimPlanner(Statements("s"), ["q"], clock=clock)

    def claim(limit: int, claimed: list[Delivery], moment: float) -> Scan:
        """Record a WHOLE claim of one second that ends at `moment`; return the scan of the next one."""
        clock.now = moment - 1.0
        plan = planned(planner, limit, Attempt.WHOLE)
        clock.now = moment
        planner.record(ClaimResult(plan, claimed))
        clock.now = moment + 0.1
        return planned(planner, 1).scan

    claim(2, [taken(100, 10), taken(200, 5)], 1.0)
    assert claim(1, [taken(300, 5)], 3.0) is not Scan.WHOLE
    assert claim(1, [taken(50, 10)], 41.0) is Scan.WHOLE
    assert claim(1, [taken(60, 5)], 42.1) is Scan.WHOLE
    assert claim(1, [taken(301, 5)], 43.2) is not Scan.WHOLE


def test_queue_is_counted_beside_claimed_rows_of_others(
    postgres: PostgresTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed rows of another queue hide none of this one: it is listed and counted, and `drain` waits for it."""
    monkeypatch.setattr(queue_inspector, "_MOST_COUNTED", 1000)
    monkeypatch.setattr(queue_inspector, "_FEWEST_COUNTED", 1000)
    postgres.send([message("t", f"{queue}-other", delay=3600) for _ in range(1500)])
    postgres.send([message("t", queue, delay=1.0)])
    mine, other = postgres.queues()
    assert (mine.queue, mine.delayed, mine.estimated) == (queue, 1, False)
    assert (other.delayed, other.estimated) == (1000, True)
    assert postgres.queues([queue]) == [mine]
    assert Consumer(postgres, {"t": lambda: None}, [queue]).drain(timeout=30) == 1


def test_long_queue_is_estimated_and_says_so(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`queues` counts rows up to its limit, and uses the planner's estimate if that is higher."""
    names = [f"{queue}-short", f"{queue}-{'x' * 5}"]
    postgres.send([message("t", names[1], priority=n % 10 + 1) for n in range(3000)])
    postgres.send([message("t", names[0]), message("t", names[0], delay=60)])
    short, long = postgres.queues()
    assert (short.ready, short.delayed, short.estimated) == (1, 1, False)
    assert (long.ready, long.estimated) == (3000, False)
    monkeypatch.setattr(queue_inspector, "_MOST_COUNTED", 100)
    tables.execute("ANALYZE {messages}")
    short, long = postgres.queues()
    assert (short.ready, short.delayed, short.estimated) == (1, 1, False)
    assert 2700 <= long.ready <= 3300
    assert long.estimated
    assert long.oldest is not None
    assert long.oldest >= (short.oldest or 0)
