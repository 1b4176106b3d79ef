"""A consumer over the transport: long tasks, shutdown, drain timeouts, and many workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import attrs

from contract_tests.checking import CheckedSubscription, CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import SOON, Kit, timed, wait_until
from contract_tests.messages import first, message
from contract_tests.requires import requires
from contract_tests.time_limits import start, together
from unstract_core import Consumer, Delivery


def test_a_long_task_keeps_its_message(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """While a task runs for more than two leases, its message is not delivered to others; the task runs once."""
    lease = 1.5
    started, finish, runs = threading.Event(), threading.Event(), []

    def slow() -> None:
        runs.append(1)
        started.set()
        finish.wait(20)

    transport.send([message("slow", queue)])
    with kit.running(transport, {"slow": slow}, queue, lease=lease) as consumer:
        assert started.wait(20)
        assert not subscribe(queue).receive(limit=3, wait=2.2 * lease)
        finish.set()
        wait_until(lambda: consumer.counters["settled"] == 1, what="the settlement")
    assert runs == [1]
    assert not kit.remaining(transport, queue)


def test_stop_finishes_running_tasks_and_releases_the_rest(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """stop() settles the running task after its end, and releases waiting messages to other workers at once."""
    started, finish, runs = threading.Event(), threading.Event(), []

    def slow(number: int) -> None:
        runs.append(number)
        started.set()
        finish.wait(30)

    transport.send([message("slow", queue, n) for n in range(3)])
    consumer = Consumer(transport, {"slow": slow}, [queue], prefetch=3)
    ended = start(consumer.run)
    try:
        assert started.wait(20)
        other = subscribe(queue)
        if not kit.capabilities.inspection:
            time.sleep(5 * kit.moment)
        consumer.stop()
        given_back: list[Delivery] = []
        with timed() as elapsed:
            while len(given_back) < 2 and elapsed() < 20:
                given_back += other.receive(limit=3, wait=5)
    finally:
        consumer.stop()
        finish.set()
        ended(30)
    assert sorted(map(first, given_back)) == [1, 2]
    assert runs == [0]
    assert consumer.counters["settled"] == 1


def test_drain_stops_at_its_timeout_despite_new_messages(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """drain(timeout=0.5) on a queue that keeps refilling returns after about 0.5 s, with the number of tasks run."""
    ran: list[int] = []

    def again(number: int) -> None:
        ran.append(number)
        transport.send([message("again", queue, number + 1)])

    transport.send([message("again", queue, 0)])
    consumer, count = Consumer(transport, {"again": again}, [queue]), 0
    while len(ran) < 2:  # the time counts from the call, and a broker may take some of it to connect
        with timed() as elapsed:
            count += consumer.drain(timeout=0.5)
            assert 0.5 <= elapsed() < SOON or not ran
        assert count == len(ran)
    assert ran == list(range(len(ran)))
    assert list(map(first, kit.remaining(transport, queue, count=1))) == [len(ran)]


@requires("delay")
def test_drain_does_not_wait_for_delayed_messages(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """drain(timeout=0.5) returns 0 after about 0.5 s if the only message is delayed for longer."""
    transport.send([message("t", queue, "late", delay=60)])
    with timed() as elapsed:
        assert Consumer(transport, {"t": print}, [queue]).drain(timeout=0.5) == 0
        assert elapsed() < SOON
    if kit.capabilities.fencing:
        assert list(map(first, kit.remaining(transport, queue, count=1))) == ["late"]


def test_drain_settles_the_running_task_after_timeout(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """A task that outlasts drain(timeout=) is settled and counted before drain returns; the next task is not run."""
    ran: list[str] = []

    def slow() -> None:
        time.sleep(2.0)
        ran.append("slow")

    transport.send([message("slow", queue), message("next", queue, "next")])
    consumer = Consumer(transport, {"slow": slow, "next": ran.append}, [queue])
    while not consumer.counters["ran"]:  # the time counts from the call, and a broker may take some of it to connect
        with timed() as elapsed:
            count = consumer.drain(timeout=1.0)
    assert count == 1
    assert 2.0 <= elapsed() < SOON
    assert ran == ["slow"]
    assert consumer.counters["settled"] == 1
    assert list(map(first, kit.remaining(transport, queue, count=1))) == ["next"]


@attrs.frozen
class Woken:
    """A transport whose new subscriptions have already been woken."""

    transport: CheckedTransport

    def subscribe(self, queues: Sequence[str], *, lease: float) -> CheckedSubscription:
        subscription = self.transport.subscribe(queues, lease=lease)
        subscription.wake()
        return subscription

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@requires("delay")
def test_a_late_wake_does_not_end_drain(transport: CheckedTransport, queue: str) -> None:
    """A wake from before the first receive does not end drain: a message that arrives soon after is run."""
    transport.send([message("t", queue, 1, delay=0.1)])
    assert Consumer(Woken(transport), {"t": lambda _: None}, [queue]).drain(timeout=20) == 1


def test_many_workers_run_each_message_once(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """Several consumers with several threads each run and settle every message of one queue once."""
    counted: list[int] = []
    transport.send([message("count", queue, n) for n in range(300)])
    consumers = [Consumer(transport, {"count": counted.append}, [queue], concurrency=3) for _ in range(3)]
    together(*(lambda one=one: one.drain(timeout=30) for one in consumers))
    assert sorted(counted) == list(range(300))
    assert sum(consumer.counters["settled"] for consumer in consumers) == 300
    assert not kit.remaining(transport, queue)
