"""Tasks that exceed their deadline, and tasks that never run twice, in a consumer over the memory transport."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import attrs
import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st
from virtual_clock import VirtualClock

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
from unstract_core.continuation import fallbacks, rejection, settle
from unstract_core.observability.observer import TaskFinished, WorkerHeartbeat
from unstract_core.outcomes import (
    Ignored,
    Outcome,
    Raised,
    Rejected,
    RetryAsked,
    RetryPolicy,
    Returned,
    outcome_of,
    overdue,
)

EXCEEDED = "DeadlineExceeded: deadline of 600 s exceeded"
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


def settlement_and_fallbacks(settlement: Settlement) -> Iterator[Settlement]:
    yield settlement
    yield from fallbacks(settlement, "TransportRefused: no")


@given(some.deliveries(), outcomes, once)
def test_a_never_rerun_task_is_never_retried(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> None:
    """For each outcome, and each settlement that a transport refuses, no settlement is a RETRY."""
    verdicts = {one.verdict for one in settlement_and_fallbacks(settle(delivery, outcome, policy))}
    assert Verdict.RETRY not in verdicts


@given(some.deliveries(), once, st.integers(2, 2**31 - 1))
def test_a_never_rerun_task_starts_at_attempt_one(delivery: Delivery, policy: RetryPolicy, attempt: int) -> None:
    """A later delivery is rejected with WorkerLost, for every max_attempts."""
    assert delivery.payload is not None
    known = {delivery.payload.task_name}
    assert rejection(attrs.evolve(delivery, attempt=1), known, policy, NOW) is None
    rejected = rejection(attrs.evolve(delivery, attempt=attempt), known, policy, NOW)
    assert rejected is not None
    assert rejected.error.startswith("WorkerLost: ")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def transport(clock: VirtualClock) -> MemoryTransport:
    return MemoryTransport(clock=clock)


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    """An event for which hanging tasks wait. It is set after the test, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


def test_an_overdue_task_fails_and_frees_its_place(
    clock: VirtualClock, transport: MemoryTransport, hung: threading.Event
) -> None:
    """Its sender gets the error while the task still runs; with one thread, the next task runs on another one."""
    tasks = {"hang": lambda: clock.wait_until(hung.is_set), "t": lambda: "ran"}
    consumer = clock.consumer(transport, tasks, ["q"], task_deadline=600)
    transport.send([message("hang", "q", reply_key="a"), message("t", "q", reply_key="b")])
    with clock.running(consumer):
        first, second = transport.reply("a", timeout=900), transport.reply("b", timeout=60)
    assert first is not None
    assert second is not None
    assert (first.status, first.error) == ("failed", EXCEEDED)
    assert (second.status, second.result) == ("completed", "ran")
    assert consumer.counters["overdue"] == 1
    assert transport.queues() == []


def test_an_overdue_task_sends_its_error_callback(
    clock: VirtualClock, transport: MemoryTransport, hung: threading.Event
) -> None:
    """on_error gets the dispatch's id, and the status names the deadline."""
    got: list[tuple[object, ...]] = []
    tasks = {"hang": lambda: clock.wait_until(hung.is_set), "cb": lambda *args: got.append(args)}
    consumer = clock.consumer(transport, tasks, ["q"], task_deadline=600)
    transport.send([message("hang", "q", task_id="d-1", on_error=then("cb", "q"))])
    with clock.running(consumer):
        clock.wait_until(lambda: got, "the callback")
    status = transport.reply("d-1")
    assert got == [("d-1",)]
    assert status is not None
    assert status.error == EXCEEDED


def test_an_observer_can_stop_an_overdue_worker(
    clock: VirtualClock, transport: MemoryTransport, hung: threading.Event
) -> None:
    """No further task starts: waiting messages are released. The overdue task is reported as failed, once."""
    started, finished = list[int](), list[tuple[str, str | None]]()

    class Owner(Observer):
        def on_heartbeat(self, event: WorkerHeartbeat) -> None:
            if consumer.counters["overdue"]:
                consumer.stop()

        def on_task_finished(self, event: TaskFinished) -> None:
            finished.append((event.end, event.error_type))

    def work(number: int) -> None:
        started.append(number)
        clock.wait_until(hung.is_set)

    transport.send([message("work", "q", number, on_error=then("none", "elsewhere")) for number in range(3)])
    settings: dict[str, Any] = {"task_deadline": 600, "prefetch": 2, "observers": [Owner()]}
    consumer = clock.consumer(transport, {"work": work}, ["q"], **settings)
    consumer.run()
    assert started == [0]
    assert finished == [("raised", "DeadlineExceeded")]
    assert (consumer.counters["settled"], consumer.counters["given_back"]) == (1, 1)
    hung.set()
    clock.wait_until(lambda: consumer.counters["ran"] == 1, "the end of its thread")
    assert finished == [("raised", "DeadlineExceeded")]


def test_an_overdue_tasks_late_result_is_dropped(clock: VirtualClock, transport: MemoryTransport) -> None:
    """The first outcome counts: a result after the deadline is not written, and the thread ends."""
    release = threading.Event()
    hanging: list[threading.Thread] = []

    def hang() -> str:
        hanging.append(threading.current_thread())
        clock.wait_until(release.is_set)
        return "late"

    before = threading.active_count()
    consumer = clock.consumer(transport, {"hang": hang}, ["q"], task_deadline=600)
    transport.send([message("hang", "q", reply_key="a")])
    with clock.running(consumer):
        reply = transport.reply("a", timeout=900)
        assert len(hanging) == 1
        release.set()
        clock.wait_until(lambda: consumer.counters["ran"] == 1, "the task to end after all")
        clock.wait_until(lambda: not hanging[0].is_alive(), "its thread to end")
    wait_until(lambda: threading.active_count() <= before, what="every thread to end")
    assert reply is not None
    assert transport.reply("a") == reply
    assert (consumer.counters["settled"], consumer.counters["overdue"]) == (1, 1)


def test_a_stopping_consumer_gives_up_overdue_tasks(
    clock: VirtualClock, transport: MemoryTransport, hung: threading.Event
) -> None:
    """After `stop` while a task hangs, the run ends at the deadline, and the sender gets the error."""
    started = threading.Event()

    def hang() -> None:
        started.set()
        clock.wait_until(hung.is_set)

    consumer = clock.consumer(transport, {"hang": hang}, ["q"], task_deadline=600)
    transport.send([message("hang", "q", reply_key="a")])
    with clock.running(consumer, ends=True):
        clock.wait_until(started.is_set)
        consumer.stop()
        reply = transport.reply("a", timeout=900)
    assert reply is not None
    assert reply.error == EXCEEDED


def test_a_deadline_changes_no_task_within_it(clock: VirtualClock, transport: MemoryTransport) -> None:
    """Tasks that end in time settle as without a deadline."""

    def task(number: int) -> int:
        clock.sleep(599)
        return number

    consumer = clock.consumer(transport, {"t": task}, ["q"], concurrency=4, task_deadline=600)
    transport.send([message("t", "q", number, reply_key=f"r{number}") for number in range(8)])
    assert consumer.drain() == 8
    assert consumer.counters["overdue"] == 0
    assert [getattr(transport.reply(f"r{number}"), "result", None) for number in range(8)] == list(range(8))


@pytest.mark.parametrize("raised", [ValueError("no"), RetryLater(0)], ids=["raises", "asks"])
def test_a_never_rerun_task_runs_once(transport: MemoryTransport, raised: Exception) -> None:
    """A task that raises, or asks for another run, is dead-lettered after its first run."""

    def task() -> NoReturn:
        raise raised

    consumer = Consumer(transport, {"t": task}, ["q"], max_attempts=9, backoff=0, never_rerun=True)
    transport.send([message("t", "q")])
    assert consumer.drain(timeout=60) == 1
    (letter,) = transport.dead.find()
    assert letter.attempts == 1


class StopsInTime(MemoryTransport):
    """Stops a consumer after it has received a message and before it starts its task."""

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


def test_a_released_never_rerun_message_runs_later() -> None:
    """A stopping consumer releases unstarted messages without an attempt, so the next never-rerun one runs them."""
    transport = StopsInTime()
    transport.consumer = Consumer(transport, {"t": print}, ["q"], concurrency=2, never_rerun=True)
    transport.send([message("t", "q") for _ in range(3)])
    transport.consumer.run()
    assert (transport.consumer.counters["ran"], transport.consumer.counters["given_back"]) == (0, 2)
    later = Consumer(transport, {"t": print}, ["q"], never_rerun=True)
    transport.consumer = Consumer(transport, {"t": print}, ["q"])
    assert later.drain(timeout=60) == 3
    assert transport.queues() == []


def test_never_rerun_needs_counted_crashes() -> None:
    """A transport without counts_crashes is refused at the start, and so is any prefetch."""

    class Forgetful(MemoryTransport):
        capabilities = attrs.evolve(MemoryTransport.capabilities, counts_crashes=False, fencing=False)

    with pytest.raises(NotSupported, match="counts_crashes"):
        Consumer(Forgetful(), {"t": print}, ["q"], never_rerun=True)
    with pytest.raises(ConfigurationError, match="leave prefetch out"):
        Consumer(MemoryTransport(), {"t": print}, ["q"], never_rerun=True, prefetch=2)
    with pytest.raises(ConfigurationError, match="task_deadline must be a positive number"):
        Consumer(MemoryTransport(), {"t": print}, ["q"], task_deadline=0)
