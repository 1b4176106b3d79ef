"""`Consumer.drain`: when it returns, and which tasks it starts."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest
from core.faulty import Faulty
from virtual_clock import VirtualClock

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import (
    Consumer,
    QueueState,
    TransportUnavailable,
)

QUEUE = "q"


@pytest.mark.parametrize("inspection", [True, False])
def test_drain_starts_no_task_after_its_timeout(inspection: bool) -> None:
    """The task that runs at the timeout is finished and settled; waiting messages are released."""
    clock = VirtualClock()
    capabilities = attrs.evolve(MemoryTransport.capabilities, inspection=inspection)
    transport = Faulty(MemoryTransport(clock=clock), capabilities=capabilities)
    transport.send([message("t", QUEUE, number) for number in range(3)])
    started: list[int] = []

    def task(number: int) -> None:
        started.append(number)
        clock.sleep(80)

    consumer = clock.consumer(transport, {"t": task}, [QUEUE], prefetch=3)
    began = clock.monotonic()
    assert consumer.drain(timeout=30) == 1
    assert clock.monotonic() - began == pytest.approx(80, abs=0.01)
    assert started == [0]
    (state,) = transport.queues([QUEUE])
    assert (state.ready, state.in_flight) == (2, 0)


def test_drain_does_not_trust_an_estimate_of_zero() -> None:
    """A store that stopped counting before it found a message does not report an empty queue."""

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
def test_drain_waits_for_the_end_of_an_outage(inspection: bool) -> None:
    """A transport that is unavailable is not an empty queue."""
    clock = VirtualClock()
    capabilities = attrs.evolve(MemoryTransport.capabilities, inspection=inspection)
    transport = Faulty(MemoryTransport(clock=clock), capabilities=capabilities)
    transport.send([message("t", QUEUE)])
    transport.away = True
    clock.call_at(clock.monotonic() + 600, lambda: setattr(transport, "away", False))
    assert clock.consumer(transport, {"t": lambda: None}, [QUEUE]).drain() == 1


def test_drain_ends_in_time_during_an_outage() -> None:
    """It raises TransportUnavailable with the reason; leases bring back the messages that it could not settle."""
    clock = VirtualClock()
    transport = Faulty(MemoryTransport(clock=clock))
    transport.send([message("t", QUEUE)])
    consumer = clock.consumer(transport, {"t": lambda: setattr(transport, "away", True)}, [QUEUE])
    began = clock.monotonic()
    with pytest.raises(TransportUnavailable, match="1 messages could not be settled") as caught:
        consumer.drain(timeout=20)
    assert clock.monotonic() - began < 23
    assert isinstance(caught.value.__cause__, TransportUnavailable)
