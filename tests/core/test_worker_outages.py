"""A consumer while its transport is unavailable."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import pytest
from consumers import running
from core.faulty import Faulty

from contract_tests.kit import wait_until
from contract_tests.messages import message
from unstract_core import (
    Consumer,
    Reply,
    Settlement,
    TransportUnavailable,
    Verdict,
)

QUEUE = "q"


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The level and the name of each event that was logged."""
    return [(record.levelname, vars(record)["wire.event"]) for record in caplog.records]


@pytest.mark.parametrize("fails", ["settle", "renew"])
def test_trouble_is_met_with_patience_and_not_with_a_storm(fails: str) -> None:
    """Whether all threads are at long tasks or much is finished: what fails is asked a few times a second."""
    transport = Faulty()
    transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(20)])
    finish = threading.Event()
    consumer = Consumer(
        transport, {"t": lambda: finish.wait(60)}, [QUEUE], concurrency=20, lease=3 if fails == "renew" else 60
    )
    with running(consumer):
        wait_until(lambda: len(transport.subscriptions) == 1 and transport.subscriptions[0].held == 20)
        with transport.outage():
            if fails == "settle":
                finish.set()
            else:
                time.sleep(1.0)
            tries = transport.tries
            time.sleep(1.5)
            assert 1 <= transport.tries - tries < 40
        finish.set()
        wait_until(lambda: consumer.counters["settled"] == 20, what="everything to be settled")


def test_what_comes_after_an_outage_is_as_quick_as_before() -> None:
    """The pauses of an outage end with it."""
    transport = Faulty()
    consumer = Consumer(transport, {"t": lambda: None}, [QUEUE])
    with running(consumer):
        with transport.outage():
            time.sleep(1.5)
        for number in range(3):
            transport.send([message("t", QUEUE)])
            wait_until(lambda number=number: consumer.counters["settled"] > number)  # type: ignore[misc]
        began = time.monotonic()
        for number in range(3, 20):
            transport.send([message("t", QUEUE)])
            wait_until(lambda number=number: consumer.counters["settled"] > number)  # type: ignore[misc]
        assert time.monotonic() - began < 10


def test_an_outage_however_long_costs_no_settlement() -> None:
    """While nothing answers, failing says nothing about a settlement: it is made when the transport is back."""
    transport = Faulty()
    transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(4)])
    finish = threading.Event()

    def task() -> str:
        finish.wait(60)
        return "paid"

    consumer = Consumer(transport, {"t": task}, [QUEUE], concurrency=4, lease=1.2)
    with running(consumer):
        wait_until(lambda: len(transport.subscriptions) == 1 and transport.subscriptions[0].held == 4)
        with transport.outage():
            finish.set()
            tries = transport.tries
            wait_until(lambda: transport.tries > tries + 30, timeout=60, what="many tries")
        for number in range(4):
            reply = transport.reply(str(number), timeout=30)
            assert reply is not None
            assert reply.result == "paid"
    assert (consumer.counters["settled"], consumer.counters["refused"], consumer.counters["lost"]) == (4, 0, 0)


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING with the reason when it begins, one INFO when it is over, however many tries lie between."""
    transport = Faulty()
    with caplog.at_level(logging.INFO), running(Consumer(transport, {"t": print}, [QUEUE])):
        wait_until(lambda: transport.tries > 0)
        for _ in range(2):
            with transport.outage():
                for subscription in transport.subscriptions:
                    subscription.wake()
                enough = transport.tries + 4
                wait_until(lambda enough=enough: transport.tries > enough, timeout=10)  # type: ignore[misc]
            wait_until(lambda: caplog.messages[-1:] and "transport_back" in caplog.messages[-1], timeout=10)
    assert events(caplog) == [("WARNING", "transport_away"), ("INFO", "transport_back")] * 2
    assert vars(caplog.records[0])["wire.error"] == "TransportUnavailable: away"


def test_a_settlement_that_fails_for_a_while_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """While the transport answers everything else: one WARNING for all of the tries, and one INFO when it is made."""
    failures = iter(range(4))

    def fail(settlements: Sequence[Settlement]) -> None:
        if next(failures, None) is not None:
            raise TransportUnavailable("not now")

    transport = Faulty(before=fail)
    transport.send([message("t", QUEUE)])
    consumer = Consumer(transport, {"t": lambda: None}, [QUEUE])
    with caplog.at_level(logging.INFO):
        assert consumer.drain(timeout=30) == 1
    assert consumer.counters["settled"] == 1
    assert events(caplog) == [("WARNING", "transport_away"), ("INFO", "transport_back")]


def test_after_stop_nothing_is_started_although_the_transport_is_away() -> None:
    """What waits for a thread when a worker stops is not started any more, outage or not."""
    transport = Faulty()
    transport.send([message("t", QUEUE, number) for number in range(6)])
    started, stopped = list[int](), threading.Event()

    def task(number: int) -> None:
        started.append(number)
        stopped.wait(60)

    consumer = Consumer(transport, {"t": task}, [QUEUE], prefetch=6)
    with running(consumer, ends=True) as (thread,):
        wait_until(lambda: bool(started))
        transport.away = True
        consumer.stop()
        stopped.set()
        time.sleep(1.2)
        transport.away = False
        thread.join(60)
    assert started == [0]


def test_what_has_waited_beyond_its_lease_is_not_started() -> None:
    """When leases could not be renewed, what has not been started belongs to whoever takes it next."""
    transport = Faulty()
    transport.send([message("t", QUEUE, number) for number in range(4)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        if number == 0:
            time.sleep(1.5)

    consumer = Consumer(transport, {"t": task}, [QUEUE], prefetch=4, lease=0.6)
    with running(consumer):
        wait_until(lambda: bool(started))
        with transport.outage():
            time.sleep(1.0)
            heir = transport.transport.subscribe([QUEUE], lease=60)
            assert len(heir.receive(limit=4, wait=2)) == 4
            time.sleep(1.0)
        wait_until(lambda: consumer.counters["lost"] == 1, what="the one that ran to be noticed as lost")
    assert started == [0]
    assert consumer.counters["settled"] == 0


def test_a_settlement_whose_fate_is_unknown_is_not_called_lost(caplog: pytest.LogCaptureFixture) -> None:
    """It took effect, its answer was lost: renewing or settling it again tells INFO settled_or_lost, no lost lease."""
    failed: list[int] = []

    def answer_lost(settlements: Sequence[Settlement]) -> None:
        if not failed:
            failed.append(1)
            time.sleep(0.3)
            raise TransportUnavailable("the answer was lost", fate_unknown=True)

    transport = Faulty(after=answer_lost)
    transport.send([message("t", QUEUE, reply_key="k")])
    consumer = Consumer(transport, {"t": lambda: "paid"}, [QUEUE], lease=0.6)
    with caplog.at_level(logging.INFO), running(consumer):
        wait_until(lambda: any("settled_or_lost" in text for text in caplog.messages))
    assert consumer.counters["lost"] == 0
    assert not any("lease_lost" in text for text in caplog.messages)
    assert (transport.reply("k") or Reply("", "failed")).result == "paid"


def test_a_settlement_that_changes_nothing_is_a_lost_lease(caplog: pytest.LogCaptureFixture) -> None:
    """Where it cannot have been made before, a False is one WARNING that the lease was lost."""
    transport = Faulty()

    def steal(settlements: Sequence[Settlement]) -> None:
        ours = transport.subscriptions[0].subscription
        assert list(ours.settle([Settlement(settlements[0].delivery, Verdict.RETRY)])) == [True]
        thief = transport.transport.subscribe([QUEUE], lease=60)
        (stolen,) = thief.receive(limit=1, wait=0)
        thief.settle([Settlement(stolen, Verdict.ACK)])

    transport.before = steal
    transport.send([message("t", QUEUE)])
    consumer = Consumer(transport, {"t": lambda: None}, [QUEUE], lease=5)
    assert consumer.drain(timeout=30) == 1
    assert events(caplog) == [("WARNING", "lease_lost")]
    assert (consumer.counters["lost"], consumer.counters["settled"]) == (1, 0)
