"""The messages that a consumer has in flight: how many, who starts them, and when they are released."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from consumers import running
from core.faulty import Faulty, FaultySubscription
from virtual_clock import VirtualClock

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import (
    ConfigurationError,
    Consumer,
    Delivery,
    Settlement,
    Verdict,
)

QUEUE = "q"


def test_idle_workers_share_long_tasks_after_a_burst() -> None:
    """After a burst of quick tasks a worker keeps one long task for each thread, and releases the others."""
    transport = Faulty()
    started: dict[str, int] = {"a": 0, "b": 0}
    finish = threading.Event()

    def tasks(worker: str) -> dict[str, Callable[..., Any]]:
        def long() -> None:
            started[worker] += 1
            finish.wait(60)

        return {"quick": lambda: None, "long": long}

    transport.send([message("quick", QUEUE)] * 3000 + [message("long", QUEUE)] * 40)
    first, second = (Consumer(transport, tasks(worker), [QUEUE], concurrency=2) for worker in "ab")
    with running(first):
        wait_until(lambda: started["a"] == 2, what="the first worker to be at long tasks")
        with running(second):
            wait_until(lambda: started["b"] == 2, what="the second to have its share")
            wait_until(lambda: [one.held for one in transport.subscriptions] == [2, 2], what="no more to be held")
            finish.set()
            wait_until(lambda: not any(state.in_flight or state.ready for state in transport.queues([QUEUE])))


def test_a_released_message_keeps_its_attempt() -> None:
    """A message that eight stopping workers have released is still at attempt 1."""
    transport = MemoryTransport()
    attempts: list[int] = []
    for _ in range(8):
        started, stopped = threading.Event(), threading.Event()
        transport.send([message("long", QUEUE, priority=10)])

        def long(started: threading.Event = started, stopped: threading.Event = stopped) -> None:
            started.set()
            stopped.wait(60)

        consumer = Consumer(transport, {"long": long, "quick": print}, [QUEUE], prefetch=5, max_attempts=3)
        if not attempts:
            transport.send([message("quick", QUEUE)])
        with running(consumer, ends=True):
            assert started.wait(30)
            consumer.stop()
            stopped.set()
        assert transport.dead.find() == []
        subscription = transport.subscribe([QUEUE], lease=60)
        (given_back,) = subscription.receive(limit=5, wait=0)
        attempts.append(given_back.attempt)
        subscription.settle([Settlement(given_back, Verdict.RETRY, counted=False)])
        subscription.close()
    assert attempts == [1] * 8


def test_idle_workers_share_short_tasks_after_a_burst() -> None:
    """A worker whose tasks take 45 ms each releases the messages that wait behind them to an idle worker."""
    clock = VirtualClock()
    transport = Faulty(MemoryTransport(clock=clock))
    ran = {"a": 0, "b": 0}

    def tasks(worker: str) -> dict[str, Callable[..., Any]]:
        def short() -> None:
            ran[worker] += 1
            clock.sleep(0.045)

        return {"quick": lambda: None, "short": short}

    transport.send([message("quick", QUEUE)] * 3000 + [message("short", QUEUE)] * 60)
    first, second = (clock.consumer(transport, tasks(worker), [QUEUE]) for worker in "ab")
    with clock.running(first):
        clock.wait_until(lambda: ran["a"] > 0, "the first worker to run short tasks")
        with clock.running(second):
            clock.wait_until(lambda: sum(ran.values()) == 60, "all tasks to run")
    assert ran["b"] > 10


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_slow_transport_gets_large_batches(concurrency: int) -> None:
    """Where each call takes longer than a window, no-op tasks come in hundreds, and no message is released."""
    clock = VirtualClock()
    asked: list[int] = []

    class FarSubscription(FaultySubscription):
        def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
            asked.append(limit)
            clock.sleep(0.06)
            return super().receive(limit=limit, wait=wait)

        def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
            clock.sleep(0.06)
            return super().settle(settlements)

    class Far(Faulty):
        def subscribe(self, queues: Sequence[str], *, lease: float) -> FaultySubscription:
            return FarSubscription(self, self.transport.subscribe(queues, lease=lease))

    transport = Far(MemoryTransport(clock=clock))
    transport.send([message("quick", QUEUE)] * 3000)
    consumer = clock.consumer(transport, {"quick": lambda: None}, [QUEUE], concurrency=concurrency)
    assert consumer.drain(timeout=60) == 3000
    assert consumer.counters["given_back"] == 0
    assert len(asked) < 40


def test_a_waiting_message_keeps_its_renewed_lease() -> None:
    """A message behind a task that is longer than its lease is not released, and starts at its first attempt."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    transport.send([message("t", QUEUE, 0), message("t", QUEUE, 1)])
    tasks = {"t": lambda number: clock.sleep(600) if number == 0 else None}
    consumer = clock.consumer(transport, tasks, [QUEUE], prefetch=2, lease=60)
    assert consumer.drain() == 2
    assert (consumer.counters["given_back"], consumer.counters["lost"]) == (0, 0)


def test_a_lost_waiting_message_never_starts() -> None:
    """If another worker has taken a waiting message, this one does not run it a second time."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    transport.send([message("t", QUEUE, 0), message("t", QUEUE, 1)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        for row in transport._store.rows.values():
            row.due = 0.0 if row.id == 2 else row.due
        thief = transport.subscribe([QUEUE], lease=600)
        assert [one.payload.args for one in thief.receive(limit=2, wait=0) if one.payload] == [[1]]
        clock.sleep(45)

    consumer = clock.consumer(transport, {"t": task}, [QUEUE], prefetch=2, lease=60)
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["settled"] == 1, "the first to be settled")
    assert started == [0]
    assert consumer.counters["lost"] == 1


def test_released_messages_are_counted_as_given_back() -> None:
    """A stopping worker counts unstarted messages in given_back, not in retried."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE, number) for number in range(5)])
    started, stopped = threading.Event(), threading.Event()

    def task(number: int) -> None:
        started.set()
        stopped.wait(60)

    consumer = Consumer(transport, {"t": task}, [QUEUE], prefetch=5)
    with running(consumer, ends=True):
        assert started.wait(30)
        consumer.stop()
        stopped.set()
    assert {name: consumer.counters[name] for name in ("ran", "settled", "given_back", "retried")} == {
        "ran": 1,
        "settled": 1,
        "given_back": 4,
        "retried": 0,
    }


def test_a_running_consumer_refuses_a_second_run() -> None:
    """The second call raises; the first run continues and can be stopped."""
    consumer = Consumer(MemoryTransport(), {"t": print}, [QUEUE])
    with running(consumer), pytest.raises(ConfigurationError, match="runs already"):
        consumer.drain(timeout=1)
