"""A consumer over a transport that refuses its settlements, or fails for some of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import pytest
from core.faulty import Faulty
from virtual_clock import VirtualClock

from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from unstract_core import (
    Consumer,
    NotSupported,
    Reply,
    Settlement,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)
from unstract_core.worker import settler

QUEUE = "q"


def concerned(settlements: Sequence[Settlement], task_name: str) -> bool:
    return any(one.delivery.payload is not None and one.delivery.payload.task_name == task_name for one in settlements)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and the name of each logged event."""
    return [(record.levelname, vars(record)["wire.event"]) for record in caplog.records]


def refused_when(condition: Callable[[Settlement], bool]) -> Callable[[Sequence[Settlement]], None]:
    def refuse(settlements: Sequence[Settlement]) -> None:
        if any(map(condition, settlements)):
            raise TransportRefused("no")

    return refuse


REFUSED: dict[str, tuple[Callable[[Settlement], bool], tuple[bool, bool, bool]]] = {
    "the result": (lambda one: one.result is not None or _carries_a_result(one), (True, True, False)),
    "the callback": (lambda one: one.follow_up is not None, (False, True, True)),
    "the status": (lambda one: one.reply is not None, (True, False, True)),
    "all of it": (lambda one: bool(one.follow_up or one.reply or one.result is not None), (False, False, False)),
}


def _carries_a_result(one: Settlement) -> bool:
    return one.verdict is Verdict.ACK and one.delivery.payload is not None and one.delivery.payload.args == [7]


@pytest.mark.parametrize("part", REFUSED)
def test_a_refused_part_costs_no_other_part(part: str) -> None:
    """Callback, status and kept result arrive unless the transport refuses them; other messages are unaffected."""
    condition, (called, answered, kept) = REFUSED[part]
    transport = Faulty(before=refused_when(condition))
    spec = then("callback", "callbacks")
    transport.send([message("t", QUEUE, 7, task_id="id", on_success=spec, on_error=spec), message("plain", QUEUE)])
    consumer = Consumer(transport, {"t": lambda n: n, "plain": lambda: None}, [QUEUE])
    assert consumer.drain(timeout=30) == 2
    (letter,) = transport.dead.find()
    assert letter.reason == "result delivery failed: TransportRefused: no"
    assert (letter.result == 7) is kept
    assert [state.ready for state in transport.queues(["callbacks"])] == [int(called)]
    status = transport.reply("id")
    assert (status == Reply("id", "failed", error=letter.reason, ttl=86400.0)) is answered
    assert (status is None) is not answered
    assert consumer.counters["refused"] == 1


@pytest.mark.parametrize("error", [UnicodeEncodeError("latin-1", "\u20ac", 0, 1, "no"), TypeError("odd"), KeyError()])
def test_an_unexpected_settle_error_costs_one_message(error: Exception) -> None:
    """A driver error from `settle` dead-letters the message with its result, and the others run."""

    def fail(settlements: Sequence[Settlement]) -> None:
        if concerned(settlements, "paid") and any(one.verdict is Verdict.ACK for one in settlements):
            raise error

    transport = Faulty(before=fail)
    transport.send([message("paid", QUEUE, reply_key="k"), *[message("t", QUEUE)] * 5])
    consumer = Consumer(transport, {"paid": lambda: "5", "t": lambda: None}, [QUEUE], prefetch=6)
    assert consumer.drain(timeout=30) == 6
    (letter,) = transport.dead.find()
    assert letter.result == "5"
    assert type(error).__name__ in (transport.reply("k") or Reply("", "failed")).error


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_wholly_refused_settlement_costs_no_other(concurrency: int, caplog: pytest.LogCaptureFixture) -> None:
    """One CRITICAL says that nothing could be written; other messages run, and this one returns after its lease."""
    tried: list[Settlement] = []
    ran: list[int] = []

    def refuse(settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            if one.delivery.attempt == 1 and one.delivery.payload and one.delivery.payload.args == [1]:
                tried.extend(settlements if len(settlements) == 1 else [])
                raise TransportRefused("refused for good")

    def task(number: int) -> dict[str, int]:
        ran.append(number)
        return {"paid": number}

    clock = VirtualClock()
    transport = Faulty(MemoryTransport(clock=clock), before=refuse)
    chained = {"on_success": then("done", "callbacks"), "on_error": then("failed", "callbacks")}
    transport.send([message("t", QUEUE, n, task_id=f"id-{n}", **chained) for n in range(4)])
    consumer = clock.consumer(transport, {"t": task}, [QUEUE], lease=60, concurrency=concurrency, prefetch=4)
    assert consumer.drain() == 5
    assert sorted(ran) == [0, 1, 1, 2, 3]
    assert ran[-1] == 1
    assert events(caplog) == [("ERROR", "settlement_refused"), ("CRITICAL", "settlement_impossible")]
    assert [one.verdict for one in tried] == [Verdict.ACK, *[Verdict.BURY] * (len(tried) - 1)]
    assert (tried[-1].follow_up, tried[-1].reply, tried[-1].result) == (None, None, None)
    assert (consumer.counters["refused"], consumer.counters["settled"], consumer.counters["buried"]) == (1, 4, 0)
    assert [state.ready for state in transport.queues(["callbacks"])] == [4]


def test_a_transport_without_delays_retries_at_once() -> None:
    """Where a transport has no delay, a retry is made without it."""

    def no_delay(settlements: Sequence[Settlement]) -> None:
        if any(one.delay for one in settlements):
            raise NotSupported("this transport has no delay")

    capabilities = attrs.evolve(MemoryTransport.capabilities, delay=False)
    transport = Faulty(before=no_delay, capabilities=capabilities)
    transport.send([message("t", QUEUE)])
    consumer = Consumer(transport, {"t": lambda: 1 / 0}, [QUEUE], max_attempts=3, backoff=60)
    assert consumer.drain(timeout=30) == 3
    assert [letter.attempts for letter in transport.dead.find()] == [3]


def test_a_settlement_that_times_out_delays_no_other() -> None:
    """It waits behind the others; after the settler's patience its sender gets the error without its result."""
    clock = VirtualClock()

    def time_out(settlements: Sequence[Settlement]) -> None:
        if any(one.result == "huge" or (one.reply and one.reply.result == "huge") for one in settlements):
            raise TransportUnavailable("statement timeout; nothing took effect")

    transport = Faulty(MemoryTransport(clock=clock), before=time_out)
    transport.send([message("huge", QUEUE, reply_key="k"), *[message("t", QUEUE)] * 5])
    consumer = clock.consumer(transport, {"huge": lambda: "huge", "t": lambda: None}, [QUEUE])
    began = clock.monotonic()
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["settled"] == 5, "the others to be settled")
        assert clock.monotonic() - began < 5
        reply = transport.reply("k", timeout=2 * settler.PATIENCE)
        assert reply is not None
        assert reply.error == "result delivery failed: TransportUnavailable: statement timeout; nothing took effect"
        assert settler.PATIENCE <= clock.monotonic() - began < settler.PATIENCE + 60


def test_unwritable_dead_letters_delay_no_other() -> None:
    """Three messages cannot be dead-lettered: they are kept, and the others are run as if they were not there."""
    clock = VirtualClock()
    refusing = [True]

    def refuse(settlements: Sequence[Settlement]) -> None:
        if refusing and any(one.verdict is Verdict.BURY for one in settlements):
            raise TransportNotReady("no queue for dead letters")

    transport = Faulty(MemoryTransport(clock=clock), before=refuse)
    transport.send([message("unknown", QUEUE)] * 3)
    transport.send([message("t", QUEUE)] * 50)
    consumer = clock.consumer(transport, {"t": lambda: clock.sleep(0.02)}, [QUEUE])
    began = clock.monotonic()
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["settled"] == 50, "the others to be settled")
        assert consumer.counters["buried"] == 0
        assert clock.monotonic() - began < 60
        refusing.clear()
        clock.wait_until(lambda: consumer.counters["buried"] == 3, "the dead letters to be written")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_settlements_that_fail_alone_stop_no_others(concurrency: int) -> None:
    """Ten messages whose settlement is not allowed delay none of those that can be settled."""
    clock = VirtualClock()
    transport = Faulty(MemoryTransport(clock=clock))

    def deny(settlements: Sequence[Settlement]) -> None:
        if concerned(settlements, "denied"):
            raise TransportNotReady("policy")

    transport.before = deny
    transport.send([message("denied", QUEUE)] * 10 + [message("t", QUEUE)] * 20)
    tasks = {"t": lambda: None, "denied": lambda: None}
    consumer = clock.consumer(transport, tasks, [QUEUE], concurrency=concurrency)
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["settled"] == 20, "the others to be settled")
        transport.before = lambda settlements: None
        clock.wait_until(lambda: consumer.counters["settled"] == 30, "all to be settled")
