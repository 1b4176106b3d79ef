"""A consumer while its transport is unavailable, on virtual time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest
from core.faulty import Faulty
from virtual_clock import VirtualClock

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import (
    Reply,
    Settlement,
    TransportUnavailable,
    Verdict,
)

QUEUE = "q"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def transport(clock: VirtualClock) -> Faulty:
    return Faulty(MemoryTransport(clock=clock))


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and the name of each logged event."""
    return [(record.levelname, vars(record)["wire.event"]) for record in caplog.records]


@pytest.mark.parametrize("fails", ["settle", "renew"])
def test_an_outage_brings_few_calls_a_second(clock: VirtualClock, transport: Faulty, fails: str) -> None:
    """Whether every thread runs a long task or many have finished, a failing call is repeated a few times a second."""
    transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(20)])
    finish = threading.Event()
    tasks = {"t": lambda: clock.wait_until(finish.is_set)}
    consumer = clock.consumer(transport, tasks, [QUEUE], concurrency=20, lease=3 if fails == "renew" else 60)
    with clock.running(consumer):
        clock.wait_until(lambda: [one.held for one in transport.subscriptions] == [20])
        with transport.outage():
            if fails == "settle":
                finish.set()
            else:
                clock.sleep(1.0)
            tries = transport.tries
            clock.sleep(10)
            assert 1 <= transport.tries - tries < 40
        finish.set()
        clock.wait_until(lambda: consumer.counters["settled"] == 20, "every task to be settled")


def test_pauses_end_with_the_outage(clock: VirtualClock, transport: Faulty) -> None:
    """A message that comes after an outage is received at once."""
    consumer = clock.consumer(transport, {"t": lambda: None}, [QUEUE])
    with clock.running(consumer):
        with transport.outage():
            clock.sleep(60)
        for number in range(3):
            transport.send([message("t", QUEUE)])
            clock.wait_until(lambda number=number: consumer.counters["settled"] > number)  # type: ignore[misc]
        began = clock.monotonic()
        for number in range(3, 20):
            transport.send([message("t", QUEUE)])
            clock.wait_until(lambda number=number: consumer.counters["settled"] > number)  # type: ignore[misc]
        assert clock.monotonic() - began < 0.1


def test_an_outage_however_long_costs_no_settlement(clock: VirtualClock, transport: Faulty) -> None:
    """The consumer keeps each settlement while nothing answers, and makes it when the transport is available again."""
    transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(4)])
    finish = threading.Event()

    def task() -> str:
        clock.wait_until(finish.is_set)
        return "paid"

    consumer = clock.consumer(transport, {"t": task}, [QUEUE], concurrency=4, lease=60)
    with clock.running(consumer):
        clock.wait_until(lambda: [one.held for one in transport.subscriptions] == [4])
        with transport.outage():
            finish.set()
            clock.sleep(900)
        for number in range(4):
            reply = transport.reply(str(number), timeout=30)
            assert reply is not None
            assert reply.result == "paid"
    assert (consumer.counters["settled"], consumer.counters["refused"], consumer.counters["lost"]) == (4, 0, 0)


def test_an_outage_is_logged_once(clock: VirtualClock, transport: Faulty, caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING with the reason when it begins, and one INFO when it ends, however many calls fail in between."""
    with caplog.at_level(logging.INFO), clock.running(clock.consumer(transport, {"t": print}, [QUEUE])):
        clock.wait_until(lambda: transport.tries > 0)
        for _ in range(2):
            with transport.outage():
                clock.sleep(60)
            clock.wait_until(lambda: caplog.messages[-1:] and "transport_back" in caplog.messages[-1])
    assert events(caplog) == [("WARNING", "transport_away"), ("INFO", "transport_back")] * 2
    assert vars(caplog.records[0])["wire.error"] == "TransportUnavailable: away"


def test_a_failing_settlement_is_logged_once(
    clock: VirtualClock, transport: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    """While the transport answers other calls: one WARNING for all attempts, and one INFO after the settlement."""
    failures = iter(range(4))

    def fail(settlements: Sequence[Settlement]) -> None:
        if next(failures, None) is not None:
            raise TransportUnavailable("not now")

    transport.before = fail
    transport.send([message("t", QUEUE)])
    consumer = clock.consumer(transport, {"t": lambda: None}, [QUEUE])
    with caplog.at_level(logging.INFO):
        assert consumer.drain() == 1
    assert consumer.counters["settled"] == 1
    assert events(caplog) == [("WARNING", "transport_away"), ("INFO", "transport_back")]


def test_no_task_starts_after_stop_during_an_outage(clock: VirtualClock, transport: Faulty) -> None:
    """A message that waits for a thread when a worker stops never starts, outage or not."""
    transport.send([message("t", QUEUE, number) for number in range(6)])
    started, stopped = list[int](), threading.Event()

    def task(number: int) -> None:
        started.append(number)
        clock.wait_until(stopped.is_set)

    consumer = clock.consumer(transport, {"t": task}, [QUEUE], prefetch=6)
    with clock.running(consumer, ends=True):
        clock.wait_until(lambda: started)
        with transport.outage():
            consumer.stop()
            stopped.set()
            clock.sleep(120)
    assert started == [0]


def test_a_message_never_starts_after_its_lease(clock: VirtualClock, transport: Faulty) -> None:
    """If leases cannot be renewed, a message that has not started belongs to its next receiver."""
    transport.send([message("t", QUEUE, number) for number in range(4)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        if number == 0:
            clock.sleep(150)

    consumer = clock.consumer(transport, {"t": task}, [QUEUE], prefetch=4, lease=60)
    with clock.running(consumer):
        clock.wait_until(lambda: started)
        with transport.outage():
            clock.sleep(100)
            heir = transport.transport.subscribe([QUEUE], lease=6000)
            assert len(heir.receive(limit=4, wait=0)) == 4
            clock.sleep(100)
        clock.wait_until(lambda: consumer.counters["lost"] == 1, "the loss of the lease to be noticed")
    assert started == [0]
    assert consumer.counters["settled"] == 0


def test_a_settlement_in_doubt_is_not_called_lost(
    clock: VirtualClock, transport: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    """It took effect, and its answer was lost: the next attempt logs INFO settled_or_lost, and no lost lease."""
    failed: list[int] = []

    def lose_answer(settlements: Sequence[Settlement]) -> None:
        if not failed:
            failed.append(1)
            clock.sleep(30)
            raise TransportUnavailable("the answer was lost", fate_unknown=True)

    transport.after = lose_answer
    transport.send([message("t", QUEUE, reply_key="k")])
    consumer = clock.consumer(transport, {"t": lambda: "paid"}, [QUEUE], lease=60)
    with caplog.at_level(logging.INFO), clock.running(consumer):
        clock.wait_until(lambda: any("settled_or_lost" in text for text in caplog.messages))
    assert consumer.counters["lost"] == 0
    assert not any("lease_lost" in text for text in caplog.messages)
    assert (transport.reply("k") or Reply("", "failed")).result == "paid"


def test_a_settlement_without_effect_is_a_lost_lease(
    clock: VirtualClock, transport: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    """If no earlier attempt can have made it, a settlement without effect is one WARNING that the lease was lost."""

    def steal(settlements: Sequence[Settlement]) -> None:
        ours = transport.subscriptions[0].subscription
        assert list(ours.settle([Settlement(settlements[0].delivery, Verdict.RETRY)])) == [True]
        thief = transport.transport.subscribe([QUEUE], lease=60)
        (stolen,) = thief.receive(limit=1, wait=0)
        thief.settle([Settlement(stolen, Verdict.ACK)])

    transport.before = steal
    transport.send([message("t", QUEUE)])
    consumer = clock.consumer(transport, {"t": lambda: None}, [QUEUE], lease=5)
    assert consumer.drain() == 1
    assert events(caplog) == [("WARNING", "lease_lost")]
    assert (consumer.counters["lost"], consumer.counters["settled"]) == (1, 0)
