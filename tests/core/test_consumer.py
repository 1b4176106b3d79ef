"""The consumer in the midst of faults: of tasks, of logging, of a transport that refuses, hangs or goes away."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from consumers import running
from core.faulty import Faulty, FaultySubscription

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from transports.memory.harness import MemoryHarness
from unstract_core import (
    ConfigurationError,
    Consumer,
    Delivery,
    Dispatcher,
    NotSupported,
    QueueState,
    Reply,
    RetryLater,
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
    """The level and the name of each event that was logged."""
    return [(record.levelname, vars(record)["wire.event"]) for record in caplog.records]


# What a task or a log handler does.


def test_a_retry_of_a_users_own_kind_costs_no_thread() -> None:
    """A subclass of RetryLater that never called its parent asks to be run again, and the thread lives on."""

    class NotYet(RetryLater):
        def __init__(self, document: str) -> None:
            self.document = document

    ran: list[int] = []

    def task(number: int) -> int:
        ran.append(number)
        if ran.count(number) == 1:
            raise NotYet("d")
        return number

    transport = MemoryTransport()
    transport.send([message("t", QUEUE, number) for number in range(3)])
    assert Consumer(transport, {"t": task}, [QUEUE], backoff=0).drain(timeout=30) == 6


def test_a_request_without_attempts_left_is_logged_as_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """As long as it is granted it is an INFO; the last one is what `task_raised` is."""

    def task() -> None:
        raise RetryLater(0)

    caplog.set_level(logging.INFO)
    transport = MemoryTransport()
    transport.send([message("t", QUEUE)])
    Consumer(transport, {"t": task}, [QUEUE], max_attempts=3).drain(timeout=30)
    granted = ("INFO", "task_retry_asked")
    assert events(caplog) == [granted, granted, ("WARNING", "task_raised")]


def test_a_log_handler_that_raises_costs_no_thread() -> None:
    """A filter of somebody's that raises keeps no message from its end."""

    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("broken")

    broken = Broken()
    runner = logging.getLogger("unstract_wire.worker")
    runner.addFilter(broken)
    try:
        transport = MemoryTransport()
        transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(3)])
        consumer = Consumer(transport, {"t": lambda: 1 / 0}, [QUEUE])
        assert consumer.drain(timeout=30) == 3
        assert [transport.reply(str(number)) is not None for number in range(3)] == [True] * 3
    finally:
        runner.removeFilter(broken)


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("no name")


class NamelessError(Exception, metaclass=Nameless):
    """Its type cannot be named."""


def test_an_exception_whose_type_has_no_name_still_tells_its_text() -> None:
    """The real error arrives, and the run is counted."""

    def task() -> None:
        raise NamelessError("the real reason")

    transport = MemoryTransport()
    transport.send([message("t", QUEUE, reply_key="k")])
    assert Consumer(transport, {"t": task}, [QUEUE]).drain(timeout=30) == 1
    assert (transport.reply("k") or Reply("", "failed")).error == "Exception: the real reason"


TOLD = {"task_name": "told", "queue": "callbacks"}
UNFIT_ROWS: dict[str, dict[str, Any]] = {
    "returns": {"task_name": "t", "on_success": TOLD},
    "raises": {"task_name": "bad", "on_error": TOLD},
    "malformed": {"task_name": "t", "kwargs": 5, "on_error": TOLD},
}


@pytest.mark.parametrize("row", UNFIT_ROWS)
def test_a_foreign_id_that_no_text_may_be_costs_no_thread(row: str) -> None:
    """A lone surrogate in a task_id, which a broker can carry: its callback is sent all the same, others are run."""
    transport = MemoryTransport()
    transport._store.add(message("t", QUEUE), json.dumps({**UNFIT_ROWS[row], "queue": QUEUE, "task_id": "\ud800"}))
    transport.send([message("t", QUEUE)] * 3)
    consumer = Consumer(transport, {"t": lambda: 1, "bad": lambda: 1 / 0}, [QUEUE], concurrency=2)
    assert consumer.drain(timeout=30) >= 3
    assert [state.ready for state in transport.queues(["callbacks"])] == [1]


# What is held.


def test_after_a_burst_long_tasks_are_shared_with_idle_workers() -> None:
    """However fast the tasks before were: of long ones a worker keeps one for each thread, and gives back the rest."""
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


def test_what_is_given_back_has_not_used_an_attempt() -> None:
    """A message behind a long task may be given back by any number of stopping workers; it is still at attempt 1."""
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


def test_after_a_burst_tasks_of_some_length_are_shared_too() -> None:
    """A finish every 45 ms keeps no idle worker from what waits behind it."""
    transport = Faulty()
    ran = {"a": 0, "b": 0}

    def tasks(worker: str) -> dict[str, Callable[..., Any]]:
        def short() -> None:
            ran[worker] += 1
            time.sleep(0.045)

        return {"quick": lambda: None, "short": short}

    transport.send([message("quick", QUEUE)] * 3000 + [message("short", QUEUE)] * 60)
    first, second = (Consumer(transport, tasks(worker), [QUEUE]) for worker in "ab")
    with running(first):
        wait_until(lambda: ran["a"] > 0, what="the first worker to be at the longer tasks")
        with running(second):
            wait_until(lambda: sum(ran.values()) == 60, what="all to be run")
    assert ran["b"] > 10


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_far_transport_gets_batches_as_large_as_a_near_one(concurrency: int) -> None:
    """Where each call takes longer than a window, no-op tasks come in hundreds, and nothing is released unstarted."""
    asked: list[int] = []

    class FarSubscription(FaultySubscription):
        def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
            asked.append(limit)
            time.sleep(0.06)
            return super().receive(limit=limit, wait=wait)

        def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
            time.sleep(0.06)
            return super().settle(settlements)

    class Far(Faulty):
        def subscribe(self, queues: Sequence[str], *, lease: float) -> FaultySubscription:
            return FarSubscription(self, self.transport.subscribe(queues, lease=lease))

    transport = Far()
    transport.send([message("quick", QUEUE)] * 3000)
    consumer = Consumer(transport, {"quick": lambda: None}, [QUEUE], concurrency=concurrency)
    assert consumer.drain(timeout=60) == 3000
    assert consumer.counters["given_back"] == 0
    assert len(asked) < 40


def test_what_waits_while_its_lease_is_renewed_is_started_in_its_turn() -> None:
    """A message behind a task that is longer than its lease is kept, and run at its first attempt."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE, 0), message("t", QUEUE, 1)])
    consumer = Consumer(transport, {"t": lambda n: time.sleep(5) if n == 0 else None}, [QUEUE], prefetch=2, lease=2)
    assert consumer.drain(timeout=30) == 2
    assert (consumer.counters["given_back"], consumer.counters["lost"]) == (0, 0)


def test_what_was_lost_while_it_waited_is_not_started() -> None:
    """When another worker has taken a waiting message, running it here would pay for it twice."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE, 0), message("t", QUEUE, 1)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        for row in transport._store.rows.values():
            row.due = 0.0 if row.id == 2 else row.due
        thief = transport.subscribe([QUEUE], lease=60)
        assert [one.payload.args for one in thief.receive(limit=2, wait=0) if one.payload] == [[1]]
        time.sleep(2.0)

    consumer = Consumer(transport, {"t": task}, [QUEUE], prefetch=2, lease=3)
    with running(consumer):
        wait_until(lambda: consumer.counters["settled"] == 1, what="the first to be settled")
    assert started == [0]
    assert consumer.counters["lost"] == 1


def test_what_a_stopping_worker_gives_back_is_counted_as_that() -> None:
    """given_back is no retry: no task was run."""
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


def test_a_consumer_that_runs_is_not_run_a_second_time() -> None:
    """The second call is refused; the first goes on and can be stopped."""
    consumer = Consumer(MemoryTransport(), {"t": print}, [QUEUE])
    with running(consumer), pytest.raises(ConfigurationError, match="runs already"):
        consumer.drain(timeout=1)


# A transport that refuses.


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


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_costs_only_itself(what: str) -> None:
    """Of callback, status and kept result each arrives unless it is what the transport refuses; no other is touched."""
    condition, (called, answered, kept) = REFUSED[what]
    transport = Faulty(before=refused_when(condition))
    spec = then("told", "callbacks")
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
def test_an_error_that_nobody_foresaw_ends_neither_the_consumer_nor_another_message(error: Exception) -> None:
    """A driver's own error out of `settle` refuses this message: it is buried with its result, and the rest goes on."""

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
def test_a_settlement_that_is_refused_in_every_form_costs_no_other_message(
    concurrency: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One CRITICAL says that nothing could be written; the next messages are run, and this one after its lease."""
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

    transport = Faulty(before=refuse)
    chained = {"on_success": then("done", "callbacks"), "on_error": then("failed", "callbacks")}
    transport.send([message("t", QUEUE, n, task_id=f"id-{n}", **chained) for n in range(4)])
    consumer = Consumer(transport, {"t": task}, [QUEUE], lease=0.5, concurrency=concurrency, prefetch=4)
    assert consumer.drain(timeout=30) == 5
    assert sorted(ran) == [0, 1, 1, 2, 3]
    assert ran[-1] == 1
    assert events(caplog) == [("ERROR", "settlement_refused"), ("CRITICAL", "settlement_impossible")]
    assert [one.verdict for one in tried] == [Verdict.ACK, *[Verdict.BURY] * (len(tried) - 1)]
    assert (tried[-1].follow_up, tried[-1].reply, tried[-1].result) == (None, None, None)
    assert (consumer.counters["refused"], consumer.counters["settled"], consumer.counters["buried"]) == (1, 4, 0)
    assert [state.ready for state in transport.queues(["callbacks"])] == [4]


def test_a_transport_without_delays_retries_at_once() -> None:
    """Where a delay is not supported a retry is made without it, rather than not at all."""

    def no_delay(settlements: Sequence[Settlement]) -> None:
        if any(one.delay for one in settlements):
            raise NotSupported("this transport has no delay")

    capabilities = attrs.evolve(MemoryTransport.capabilities, delay=False)
    transport = Faulty(before=no_delay, capabilities=capabilities)
    transport.send([message("t", QUEUE)])
    consumer = Consumer(transport, {"t": lambda: 1 / 0}, [QUEUE], max_attempts=3, backoff=60)
    assert consumer.drain(timeout=30) == 3
    assert [letter.attempts for letter in transport.dead.find()] == [3]


# A transport that is away, or times out.


def test_a_settlement_that_always_times_out_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits behind the others, and in the end its sender is told without the part that cannot be written."""
    monkeypatch.setattr(settler, "PATIENCE", 0.5)

    def time_out(settlements: Sequence[Settlement]) -> None:
        if any(one.result == "huge" or (one.reply and one.reply.result == "huge") for one in settlements):
            raise TransportUnavailable("statement timeout; nothing took effect")

    transport = Faulty(before=time_out)
    transport.send([message("huge", QUEUE, reply_key="k"), *[message("t", QUEUE)] * 5])
    consumer = Consumer(transport, {"huge": lambda: "huge", "t": lambda: None}, [QUEUE])
    with running(consumer):
        wait_until(lambda: consumer.counters["settled"] == 5, what="the others to be settled")
        reply = transport.reply("k", timeout=30)
        assert reply is not None
        assert reply.error == "result delivery failed: TransportUnavailable: statement timeout; nothing took effect"


def test_dead_letters_that_nothing_takes_hold_up_nobody_else() -> None:
    """Three messages cannot be buried: they are kept, and the others are run as if they were not there."""
    refusing = [True]

    def refuse(settlements: Sequence[Settlement]) -> None:
        if refusing and any(one.verdict is Verdict.BURY for one in settlements):
            raise TransportNotReady("no queue for dead letters")

    transport = Faulty(before=refuse)
    transport.send([message("nobody has it", QUEUE)] * 3)
    transport.send([message("t", QUEUE)] * 50)
    consumer = Consumer(transport, {"t": lambda: time.sleep(0.02)}, [QUEUE])
    with running(consumer):
        wait_until(lambda: consumer.counters["settled"] == 50, what="the others to be settled")
        assert consumer.counters["buried"] == 0
        refusing.clear()
        wait_until(lambda: consumer.counters["buried"] == 3, what="the dead letters to be taken")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_settlements_that_fail_alone_do_not_stop_the_others(concurrency: int) -> None:
    """Ten messages whose settlement is not allowed hold up none of those that can be settled."""
    transport = Faulty()

    def deny(settlements: Sequence[Settlement]) -> None:
        if concerned(settlements, "denied"):
            raise TransportNotReady("policy")

    transport.before = deny
    transport.send([message("denied", QUEUE)] * 10 + [message("t", QUEUE)] * 20)
    consumer = Consumer(transport, {"t": lambda: None, "denied": lambda: None}, [QUEUE], concurrency=concurrency)
    with running(consumer):
        wait_until(lambda: consumer.counters["settled"] == 20, timeout=60, what="the others to be settled")
        transport.before = lambda settlements: None
        wait_until(lambda: consumer.counters["settled"] == 30, timeout=60, what="all to be settled")


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


# drain.


@pytest.mark.parametrize("inspection", [True, False])
def test_drain_starts_nothing_after_its_time(inspection: bool) -> None:
    """What runs when the time is up is finished and settled; what waits for a thread is given back."""
    transport = Faulty(capabilities=attrs.evolve(MemoryTransport.capabilities, inspection=inspection))
    transport.send([message("t", QUEUE, number) for number in range(3)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        time.sleep(0.8)

    count = 0
    while not started:
        began = time.monotonic()
        count = Consumer(transport, {"t": task}, [QUEUE], prefetch=3).drain(timeout=0.3)
    assert count == 1
    assert 0.7 < time.monotonic() - began < 10
    assert started == [0]
    (state,) = transport.queues([QUEUE])
    assert (state.ready, state.in_flight) == (2, 0)


def test_drain_takes_no_estimate_for_an_empty_queue() -> None:
    """A store that stopped counting, and found nothing until then, does not say that nothing is there."""

    class Estimating(MemoryTransport):
        looks = 0

        def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
            self.looks += 1
            if self.looks == 1:
                self.send([message("t", QUEUE)])
                return [QueueState(QUEUE, 0, 0, 0, None, 0, estimated=True)]
            return super().queues(names)

    assert Consumer(Estimating(), {"t": lambda: None}, [QUEUE]).drain(timeout=30) == 1


@pytest.mark.parametrize("inspection", [True, False])
def test_drain_outlasts_an_outage(inspection: bool) -> None:
    """A transport that is away is not an empty queue."""
    transport = Faulty(capabilities=attrs.evolve(MemoryTransport.capabilities, inspection=inspection))
    transport.send([message("t", QUEUE)])
    transport.away = True
    threading.Timer(0.5, lambda: setattr(transport, "away", False)).start()
    assert Consumer(transport, {"t": lambda: None}, [QUEUE]).drain(timeout=30) == 1


def test_drain_ends_in_time_although_nothing_can_be_settled() -> None:
    """It raises TransportUnavailable with the reason; the leases bring back what could not be settled."""
    transport = Faulty()
    transport.send([message("t", QUEUE)])
    consumer = Consumer(transport, {"t": lambda: setattr(transport, "away", True)}, [QUEUE])
    began = time.monotonic()
    with pytest.raises(TransportUnavailable, match="1 messages could not be settled") as caught:
        consumer.drain(timeout=2)
    assert time.monotonic() - began < 10
    assert isinstance(caught.value.__cause__, TransportUnavailable)


# Settings.

SENSELESS: dict[str, dict[str, Any]] = {
    "concurrency a float": {"concurrency": 1.5},
    "concurrency a str": {"concurrency": "2"},
    "concurrency 0": {"concurrency": 0},
    "max_attempts 0": {"max_attempts": 0},
    "lease 0": {"lease": 0},
    "lease inf": {"lease": float("inf")},
    "lease nan": {"lease": float("nan")},
    "lease a str": {"lease": "60"},
    "backoff inf": {"backoff": float("inf")},
    "backoff negative": {"backoff": -1},
    "backoff_max inf": {"backoff_max": float("inf")},
    "prefetch 0": {"prefetch": 0},
    "prefetch below the concurrency": {"prefetch": 1, "concurrency": 2},
    "tasks empty": {"tasks": {}},
    "status_payload unknown": {"status_payload": "all"},
    "status_payload empty": {"status_payload": ""},
    "returned_failure unknown": {"returned_failure": "none"},
    "returned_failure None": {"returned_failure": None},
    "allow_continuations a str": {"allow_continuations": "callbacks"},
    "allow_continuations a number": {"allow_continuations": 7},
    "allow_continuations without a queue": {"allow_continuations": [":task"]},
    "allow_continuations without a task": {"allow_continuations": ["queue:"]},
    "allow_continuations of an empty tuple": {"allow_continuations": [()]},
    "allow_continuations of numbers": {"allow_continuations": [("q", 7)]},
    "tasks None": {"tasks": None},
    "tasks a list": {"tasks": ["t"]},
    "task of no callable": {"tasks": {"t": 7}},
    "queues empty": {"queues": []},
    "queues a str": {"queues": "q"},
}


@pytest.mark.parametrize("name", SENSELESS)
def test_settings_that_cannot_work_are_refused_at_once(name: str) -> None:
    """Misconfiguration fails at start, with the name of the setting, not at the first message."""
    settings: dict[str, Any] = {"tasks": {"t": print}, "queues": [QUEUE], **SENSELESS[name]}
    with pytest.raises(ConfigurationError, match=name.split()[0]):
        Consumer(MemoryTransport(), settings.pop("tasks"), settings.pop("queues"), **settings)


def test_an_endless_call_is_answered() -> None:
    """`call(timeout=inf)` waits for as long as it takes; nothing is sent that cannot be waited for."""
    transport = MemoryTransport()
    with running(Consumer(transport, {"t": lambda: 7}, [QUEUE])):
        assert Dispatcher(transport).call("t", queue=QUEUE, timeout=float("inf")) == 7


def test_a_delivery_whose_id_came_again_is_kept_apart_from_the_old_one() -> None:
    """After a restore one consumer holds two deliveries of the same id and attempt: each is renewed and settled."""
    transport, go, started = MemoryTransport(), threading.Event(), list[str]()

    def work(which: str) -> None:
        started.append(which)
        assert go.wait(30)

    (old_id,) = transport.send([message("t", QUEUE, "old", on_success=then("done", "cb"))])
    consumer = Consumer(transport, {"t": work}, [QUEUE], concurrency=2, lease=0.6)
    with running(consumer):
        wait_until(lambda: started == ["old"])
        (new_id,) = transport.send([message("t", "elsewhere", "new", on_success=then("done", "cb"))])
        MemoryHarness().reissue(transport, new_id, old_id)
        with transport._store.using():
            row = transport._store.rows[int(old_id)]
            row.queue = QUEUE
            transport._store.postpone(row, 0)
            transport._store.changed.notify_all()
        wait_until(lambda: started == ["old", "new"] and consumer.counters["lost"] == 1)
        renewed_from = time.monotonic()
        wait_until(lambda: time.monotonic() - renewed_from > 1.2)
        go.set()
        wait_until(lambda: consumer.counters["settled"] == 1)
    assert started == ["old", "new"]
    (follow_up,) = transport.subscribe(["cb"], lease=60).receive(limit=5, wait=0)
    assert follow_up.id == "3"
    assert consumer.counters["ran"] == 2


@pytest.mark.parametrize(
    "allowed", [["cb:done"], ["cb"], [("cb", "done")], [("cb", None)], ["other", "cb:done"], {"cb": None}]
)
def test_an_allowed_continuation_is_sent(allowed: Any) -> None:
    """A callback whose queue, or queue and task, is in the list is sent as without a list."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE, on_success=then("done", "cb"))])
    Consumer(transport, {"t": lambda: 1}, [QUEUE], allow_continuations=allowed).drain(timeout=10)
    assert transport.queues(["cb"])[0].ready == 1


@pytest.mark.parametrize("allowed", [[], ["cb:another"], ["another"], [("done", "cb")]])
def test_a_task_whose_callback_is_not_allowed_does_not_run(allowed: Any) -> None:
    """The task costs nothing; its status is failed, its dead letter has the reason, and no callback is sent."""
    transport, ran = MemoryTransport(), []
    transport.send([message("t", QUEUE, task_id="i", on_success=then("done", "cb"), on_error=then("failed", "cb"))])
    Consumer(transport, {"t": lambda: ran.append(1)}, [QUEUE], allow_continuations=allowed).drain(timeout=10)
    assert ran == []
    assert transport.queues(["cb"])[0].ready == 0
    (letter,) = transport.dead.find()
    assert letter.reason.startswith("ContinuationNotAllowed: on_success names task 'done' on queue 'cb'")
    status = transport.reply("i")
    assert status is not None
    assert (status.status, status.error) == ("failed", letter.reason)
