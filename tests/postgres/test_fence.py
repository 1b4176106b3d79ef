"""The fence, if the database hands out ids again."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator

import pytest
from consumers import running
from hypothesis import given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres.support import transport_on
from psycopg.conninfo import make_conninfo
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Settlement, Verdict

RESTART = "TRUNCATE {messages}, {results}, {dead} RESTART IDENTITY"
EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)

stored_times = st.one_of(
    st.sampled_from(["infinity", "-infinity"]),
    st.datetimes(timezones=st.just(datetime.UTC)).map(str),
    st.integers(-(10**15), 10**15).map(lambda us: str(EPOCH + datetime.timedelta(microseconds=us))),
    st.integers(10_000, 290_000).map(lambda year: f"{year}-06-30 23:59:59.999999+00"),
    st.integers(1, 4700).map(lambda year: f"{year:04}-02-28 12:00:00.000001+00 BC"),
)


@pytest.mark.parametrize("workers", [1, 2])
def test_reused_id_is_settled_by_its_own_run(
    postgres: PostgresTransport, tables: Tables, queue: str, workers: int
) -> None:
    """After TRUNCATE ... RESTART IDENTITY the old run changes nothing, also in the worker that runs the new message."""
    go = {"old": threading.Event(), "new": threading.Event()}
    started: list[str] = []

    def work(which: str) -> str:
        started.append(which)
        assert go[which].wait(60)
        return which

    after = then("done", f"{queue}-cb")
    consumers = [Consumer(postgres, {"t": work}, [queue], lease=5, concurrency=2) for _ in range(workers)]
    with running(*consumers):
        (old_id,) = postgres.send([message("t", queue, "old", on_success=after)])
        wait_until(lambda: started == ["old"], what="the old message to run")
        tables.execute(RESTART)
        (new_id,) = postgres.send([message("t", queue, "new", on_success=after)])
        assert new_id == old_id
        wait_until(lambda: started == ["old", "new"], what="the new message to run")
        go["old"].set()
        wait_until(lambda: sum(consumer.counters["lost"] for consumer in consumers) == 1, what="the old run to be lost")
        assert tables.rows("SELECT queue_name, read_ct FROM {messages}") == [(queue, 1)]
        go["new"].set()
        wait_until(lambda: tables.count(queue) == 0, what="the new message to be settled")
    assert tables.rows("SELECT queue_name, message->'args' FROM {messages}") == [(f"{queue}-cb", ["new"])]


@pytest.mark.parametrize("verdict", Verdict)
def test_restored_message_is_settled_once(
    postgres: PostgresTransport, tables: Tables, queue: str, verdict: Verdict
) -> None:
    """After a restore of the same row, one of its two holders settles it, and one follow-up is sent."""
    postgres.send([message("t", queue)])
    early, late = postgres.subscribe([queue], lease=60), postgres.subscribe([queue], lease=60)
    (first,) = early.receive(limit=1, wait=5)
    tables.execute("UPDATE {messages} SET read_ct = 0, state = 'ready'")
    (second,) = late.receive(limit=1, wait=5)
    follow_ups = [message("f", f"{queue}-cb", n) for n in range(2)]
    assert early.settle([Settlement(first, Verdict.ACK, follow_up=follow_ups[0])]) == [True]
    assert late.settle([Settlement(second, verdict, follow_up=follow_ups[1])]) == [False]
    assert tables.count(f"{queue}-cb") == 1
    early.close()
    late.close()


ODD_SESSIONS = [
    "",
    "-c DateStyle=SQL,DMY -c TimeZone=Asia/Kolkata",
    "-c bytea_output=escape -c extra_float_digits=-15",
]


@pytest.fixture(scope="module")
def odd(shared: tuple[PostgresTransport, Tables]) -> Iterator[dict[str, PostgresTransport]]:
    """Transports whose sessions write times and bytes in other ways, by these settings."""
    _, tables = shared
    with contextlib.ExitStack() as opened:
        yield {
            options: opened.enter_context(transport_on(make_conninfo(tables.url, options=options), tables.schema))
            for options in ODD_SESSIONS
        }


@settings(max_examples=25)
@given(stored=stored_times, options=st.sampled_from(ODD_SESSIONS))
def test_any_enqueue_time_passes_the_fence(
    shared: tuple[PostgresTransport, Tables], odd: dict[str, PostgresTransport], stored: str, options: str
) -> None:
    """A delivery with any time of enqueueing can be renewed and settled; a difference of a microsecond fails."""
    transport, tables = shared
    queue = queue_name()
    transport.send([message("t", queue), message("t", queue)])
    tables.execute("UPDATE {messages} SET enqueued_at = %s::timestamptz WHERE queue_name = %s", stored, queue)
    subscription = odd[options].subscribe([queue], lease=60)
    deliveries = subscription.receive(limit=2, wait=5)
    assert subscription.renew(deliveries) == [True, True]
    tables.execute(
        "UPDATE {messages} SET enqueued_at = enqueued_at + interval '1 microsecond' WHERE msg_id = %s",
        int(deliveries[1].id),
    )
    followed = [Settlement(delivery, Verdict.ACK, follow_up=message("f", f"{queue}-cb")) for delivery in deliveries]
    moved = "infinity" not in stored
    assert subscription.settle(followed) == [True, not moved]
    assert tables.count(f"{queue}-cb") == 2 - moved
    subscription.close()
