"""Leases, back-off, deadlines and the time limit of `drain`, over hours of virtual time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
from core.faulty import Faulty, FaultySubscription
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_clock import VirtualClock

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import Delivery, Observer, current_delivery
from unstract_core.observability.observer import TaskFinished
from unstract_core.worker import consumer as consumer_module
from unstract_core.worker import loop as loop_module

DAY = 86400.0


@pytest.fixture(autouse=True, scope="module")
def long_waits() -> Iterator[None]:
    """An idle consumer waits for a day at a time, so that a day takes few steps."""
    with mock.patch.object(consumer_module, "LONGEST_WAIT", DAY), mock.patch.object(loop_module, "LONGEST_WAIT", DAY):
        yield


@settings(max_examples=25)
@given(lease=st.floats(10, 3600), length=st.floats(3600, 4 * 3600))
def test_a_lease_is_renewed_every_third_of_it(lease: float, length: float) -> None:
    """While a task of hours runs, a third of the lease passes between two renewals, and the lease is never lost."""
    clock = VirtualClock()
    renewals: list[float] = []

    class Recorded(FaultySubscription):
        def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
            renewals.append(clock.monotonic())
            return super().renew(deliveries)

    class Recording(Faulty):
        def subscribe(self, queues: Sequence[str], *, lease: float) -> FaultySubscription:
            return Recorded(self, self.transport.subscribe(queues, lease=lease))

    transport = Recording(MemoryTransport(clock=clock))
    transport.send([message("t", "q")])
    consumer = clock.consumer(transport, {"t": lambda: clock.sleep(length)}, ["q"], lease=lease)
    began = clock.monotonic()
    assert consumer.drain() == 1
    pauses = [later - earlier for earlier, later in itertools.pairwise([began, *renewals])]
    assert pauses == pytest.approx([lease / 3] * len(renewals), rel=1e-6)
    assert len(renewals) == pytest.approx(length / (lease / 3), abs=1.01)
    assert (consumer.counters["settled"], consumer.counters["lost"]) == (1, 0)


@settings(max_examples=25)
@given(attempts=st.integers(1, 14), backoff=st.floats(0, 600), longest=st.floats(0, DAY))
def test_each_attempt_waits_for_the_backoff(attempts: int, backoff: float, longest: float) -> None:
    """Each of its attempts starts exactly when the policy's delay after the one before has passed."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    started: list[tuple[float, Delivery]] = []

    def fail() -> None:
        delivery = current_delivery()
        assert delivery is not None
        started.append((clock.monotonic(), delivery))
        raise ValueError("no")

    transport.send([message("fail", "q")])
    consumer = clock.consumer(
        transport, {"fail": fail}, ["q"], max_attempts=attempts, backoff=backoff, backoff_max=longest
    )
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["buried"] == 1)
    assert [delivery.attempt for _, delivery in started] == list(range(1, attempts + 1))
    waits = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(started)]
    assert waits == pytest.approx([consumer.policy.delay(delivery) for _, delivery in started[:-1]], abs=1e-6)
    assert all(0.75 * min(backoff * 2**n, longest) - 1e-6 <= wait for n, wait in enumerate(waits))


@settings(max_examples=25)
@given(deadline=st.floats(0.01, DAY), before=st.floats(0, DAY))
def test_a_task_is_given_up_at_its_deadline(deadline: float, before: float) -> None:
    """A task that hangs fails when its deadline has passed: no moment earlier, and none later."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    hung = threading.Event()
    started: list[float] = []
    ended: list[float] = []

    class Recorder(Observer):
        def on_task_finished(self, event: TaskFinished) -> None:
            ended.extend((clock.monotonic(), event.seconds))

    def hang() -> None:
        started.append(clock.monotonic())
        clock.wait_until(hung.is_set)

    clock.advance(before)
    transport.send([message("hang", "q", reply_key="k")])
    consumer = clock.consumer(
        transport, {"hang": hang}, ["q"], task_deadline=deadline, lease=DAY * 4, observers=[Recorder()]
    )
    assert consumer.drain() == 0
    hung.set()
    assert ended == pytest.approx([started[0] + deadline, deadline], abs=1e-6)
    reply = transport.reply("k")
    assert reply is not None
    assert reply.error == f"DeadlineExceeded: deadline of {deadline:g} s exceeded"


@settings(max_examples=50)
@given(count=st.integers(0, 8), length=st.integers(1, 100), timeout=st.integers(1, 400))
def test_drain_starts_tasks_until_its_timeout(count: int, length: int, timeout: int) -> None:
    """Each task that starts within the time is finished and settled; `drain` returns with the last of them."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    transport.send([message("t", "q")] * count)
    consumer = clock.consumer(transport, {"t": lambda: clock.sleep(length)}, ["q"], prefetch=1)
    began = clock.monotonic()
    within = min(count, -(-timeout // length))
    assert consumer.drain(timeout=timeout) == consumer.counters["settled"] == within
    assert clock.monotonic() - began == pytest.approx(within * length)
    assert sum(state.ready for state in transport.queues(["q"])) == count - within


def test_time_stands_still_while_a_thread_works() -> None:
    """A task that takes real time takes no virtual time, so its deadline is as far away as before."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    transport.send([message("t", "q", reply_key="k")])
    worked = threading.Event()
    consumer = clock.consumer(transport, {"t": lambda: worked.wait(0.3)}, ["q"], task_deadline=0.001, lease=0.01)
    began = clock.monotonic()
    assert consumer.drain() == 1
    assert (clock.monotonic(), consumer.counters["overdue"], consumer.counters["lost"]) == (began, 0, 0)


def test_a_wait_ends_at_its_first_moment() -> None:
    """However fast the time of the consumers passes, a test sees the moment at which its condition became true."""
    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    consumer = clock.consumer(transport, {"t": lambda: clock.sleep(7)}, ["q"])
    began = clock.monotonic()
    with clock.running(consumer):
        clock.sleep(1000)
        transport.send([message("t", "q", delay=500.0, reply_key="k")])
        reply = transport.reply("k", timeout=DAY)
        assert reply is not None
        assert clock.monotonic() - began == pytest.approx(1507)
        clock.sleep(3)
        assert clock.monotonic() - began == pytest.approx(1510)
