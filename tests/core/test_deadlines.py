"""Tasks that are given up when they run for too long, and tasks that are started once, in a consumer over memory."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import attrs
import consumers
import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from transports.memory.subscription import MemorySubscription
from unstract_core import (
    ConfigurationError,
    Consumer,
    Delivery,
    NotSupported,
    Observer,
    RetryLater,
    Settlement,
    Verdict,
)
from unstract_core.continuation import (
    Ignored,
    Outcome,
    Raised,
    Rejected,
    RetryAsked,
    RetryPolicy,
    Returned,
    fallbacks,
    outcome_of,
    overdue,
    rejection,
    settle,
)
from unstract_core.observability.observer import TaskFinished, WorkerHeartbeat

EXCEEDED = "DeadlineExceeded: deadline of 0.5 s exceeded"
errors = st.sampled_from(["ValueError: no", "KeyError", "OSError: gone"])
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(Returned, some.json_values),
    st.builds(Raised, errors),
    st.builds(RetryAsked, st.none() | st.floats(0, 1e6), errors),
    st.builds(Rejected, errors),
    st.just(Ignored()),
    st.builds(lambda seconds: outcome_of(overdue(seconds)), st.floats(0.1, 1e6)),
)
NOW = datetime.datetime.now(datetime.UTC)
once = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 9),
    backoff=st.floats(0, 100),
    asked_attempts=st.integers(0, 9),
    never_rerun=st.just(True),
)


def all_that_follows(settlement: Settlement) -> Iterator[Settlement]:
    yield settlement
    yield from fallbacks(settlement, "TransportRefused: no")


@given(some.deliveries(), outcomes, once)
def test_what_is_never_rerun_has_no_settlement_that_brings_it_back(
    delivery: Delivery, outcome: Outcome, policy: RetryPolicy
) -> None:
    """Whatever a task did, and whatever of it a transport refuses, no settlement is a RETRY."""
    verdicts = {one.verdict for one in all_that_follows(settle(delivery, outcome, policy))}
    assert Verdict.RETRY not in verdicts


@given(some.deliveries(), once, st.integers(2, 2**31 - 1))
def test_what_is_never_rerun_is_started_at_its_first_delivery_alone(
    delivery: Delivery, policy: RetryPolicy, attempt: int
) -> None:
    """A later delivery is rejected as lost with its worker, however many attempts there are to be."""
    assert delivery.payload is not None
    known = {delivery.payload.task_name}
    assert rejection(attrs.evolve(delivery, attempt=1), known, policy, NOW) is None
    rejected = rejection(attrs.evolve(delivery, attempt=attempt), known, policy, NOW)
    assert rejected is not None
    assert rejected.error.startswith("WorkerLost: ")


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    """What tasks wait for that hang; set at the end, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_task_past_its_deadline_fails_and_its_place_is_taken(
    transport: MemoryTransport, hung: threading.Event
) -> None:
    """Its sender hears of the deadline while it still runs; with one thread, the next task runs on another one."""
    consumer = Consumer(transport, {"hang": hung.wait, "t": lambda: "ran"}, ["q"], task_deadline=0.5)
    transport.send([message("hang", "q", reply_key="a"), message("t", "q", reply_key="b")])
    with consumers.running(consumer):
        first, second = transport.reply("a", timeout=60), transport.reply("b", timeout=60)
    assert first is not None
    assert second is not None
    assert (first.status, first.error) == ("failed", EXCEEDED)
    assert (second.status, second.result) == ("completed", "ran")
    assert consumer.counters["overdue"] == 1
    assert transport.queues() == []


def test_an_overdue_tasks_callback_gets_the_error(transport: MemoryTransport, hung: threading.Event) -> None:
    """on_error is sent with the dispatch's id, and the status says what was exceeded."""
    got: list[tuple[object, ...]] = []
    consumer = Consumer(transport, {"hang": hung.wait, "cb": lambda *a: got.append(a)}, ["q"], task_deadline=0.5)
    transport.send([message("hang", "q", task_id="d-1", on_error=then("cb", "q"))])
    with consumers.running(consumer):
        wait_until(lambda: got, what="the callback")
    status = transport.reply("d-1")
    assert got == [("d-1",)]
    assert status is not None
    assert status.error == EXCEEDED


def test_whoever_is_told_of_an_overdue_task_can_stop_its_worker_before_more_is_started(
    transport: MemoryTransport, hung: threading.Event
) -> None:
    """What waits behind it is given back and not started; it is told as a failure once, when it is given up."""
    started, told = list[int](), list[tuple[str, str | None]]()

    class Owner(Observer):
        def on_heartbeat(self, event: WorkerHeartbeat) -> None:
            if consumer.counters["overdue"]:
                consumer.stop()

        def on_task_finished(self, event: TaskFinished) -> None:
            told.append((event.end, event.error_type))

    def work(number: int) -> None:
        started.append(number)
        hung.wait(60)

    transport.send([message("work", "q", number, on_error=then("none", "elsewhere")) for number in range(3)])
    consumer = Consumer(transport, {"work": work}, ["q"], task_deadline=0.5, prefetch=2, observers=[Owner()])
    consumer.run()
    assert started == [0]
    assert told == [("raised", "DeadlineExceeded")]
    assert (consumer.counters["settled"], consumer.counters["given_back"]) == (1, 1)
    hung.set()
    wait_until(lambda: consumer.counters["ran"] == 1, what="the end of its thread")
    assert told == [("raised", "DeadlineExceeded")]


def test_what_an_overdue_task_returns_in_the_end_is_nothing(transport: MemoryTransport) -> None:
    """The first outcome counts: its late result is written nowhere, and its thread ends."""
    let_go, started = threading.Event(), threading.Event()

    hanging: list[threading.Thread] = []

    def hang() -> str:
        hanging.append(threading.current_thread())
        started.set()
        let_go.wait()
        return "late"

    before = threading.active_count()
    consumer = Consumer(transport, {"hang": hang}, ["q"], task_deadline=0.5)
    transport.send([message("hang", "q", reply_key="a")])
    with consumers.running(consumer):
        assert started.wait(60)
        reply = transport.reply("a", timeout=60)
        let_go.set()
        wait_until(lambda: consumer.counters["ran"] == 1, what="the task to end after all")
        wait_until(lambda: not serves(hanging), what="its thread to end")
    wait_until(lambda: threading.active_count() <= before, what="every thread to end")
    assert reply is not None
    assert transport.reply("a") == reply
    assert (consumer.counters["settled"], consumer.counters["overdue"]) == (1, 1)


def serves(threads: Sequence[threading.Thread]) -> bool:
    return any(thread.is_alive() for thread in threads)


def test_a_stopping_consumer_does_not_wait_for_what_is_overdue(
    transport: MemoryTransport, hung: threading.Event
) -> None:
    """`stop` while a task hangs: the run ends when the deadline has passed, and its sender is told."""
    started = threading.Event()

    def hang() -> None:
        started.set()
        hung.wait()

    consumer = Consumer(transport, {"hang": hang}, ["q"], task_deadline=0.5)
    transport.send([message("hang", "q", reply_key="a")])
    with consumers.running(consumer, ends=True):
        assert started.wait(60)
        consumer.stop()
        reply = transport.reply("a", timeout=60)
    assert reply is not None
    assert reply.error == EXCEEDED


def test_a_task_within_its_deadline_is_left_alone(transport: MemoryTransport) -> None:
    """A deadline that is not reached changes nothing."""
    consumer = Consumer(transport, {"t": lambda n: n}, ["q"], concurrency=4, task_deadline=60.0)
    transport.send([message("t", "q", number, reply_key=f"r{number}") for number in range(50)])
    assert consumer.drain(timeout=60) == 50
    assert consumer.counters["overdue"] == 0
    assert [getattr(transport.reply(f"r{number}"), "result", None) for number in range(50)] == list(range(50))


@pytest.mark.parametrize("raised", [ValueError("no"), RetryLater(0)], ids=["raises", "asks"])
def test_what_is_never_rerun_runs_once(transport: MemoryTransport, raised: Exception) -> None:
    """A task that raises, or asks for another run, is buried after its first."""

    def task() -> NoReturn:
        raise raised

    consumer = Consumer(transport, {"t": task}, ["q"], max_attempts=9, backoff=0, never_rerun=True)
    transport.send([message("t", "q")])
    assert consumer.drain(timeout=60) == 1
    (letter,) = transport.dead.find()
    assert letter.attempts == 1


class StopsInTime(MemoryTransport):
    """Stops a consumer between the moment in which it has taken a message and that in which it would start it."""

    consumer: Consumer

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        stop = self.consumer.stop

        class Stopping(MemorySubscription):
            def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
                deliveries = super().receive(limit=limit, wait=wait)
                if deliveries:
                    stop()
                return deliveries

        return Stopping(self._store, queues, lease)


def test_what_was_given_back_is_run_later() -> None:
    """A stop gives back what was not started, uncounted: to the next never-rerun consumer it is new."""
    transport = StopsInTime()
    transport.consumer = Consumer(transport, {"t": print}, ["q"], concurrency=2, never_rerun=True)
    transport.send([message("t", "q") for _ in range(3)])
    transport.consumer.run()
    assert (transport.consumer.counters["ran"], transport.consumer.counters["given_back"]) == (0, 2)
    later = Consumer(transport, {"t": print}, ["q"], never_rerun=True)
    transport.consumer = Consumer(transport, {"t": print}, ["q"])
    assert later.drain(timeout=60) == 3
    assert transport.queues() == []


def test_never_rerun_needs_crashes_to_be_counted() -> None:
    """NotSupported at the start, and not a second run one day; nor may anything be prefetched."""

    class Forgetful(MemoryTransport):
        capabilities = attrs.evolve(MemoryTransport.capabilities, counts_crashes=False, fencing=False)

    with pytest.raises(NotSupported, match="counts_crashes"):
        Consumer(Forgetful(), {"t": print}, ["q"], never_rerun=True)
    with pytest.raises(ConfigurationError, match="leave prefetch out"):
        Consumer(MemoryTransport(), {"t": print}, ["q"], never_rerun=True, prefetch=2)
    with pytest.raises(ConfigurationError, match="task_deadline must be a positive number"):
        Consumer(MemoryTransport(), {"t": print}, ["q"], task_deadline=0)
