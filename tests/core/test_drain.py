"""`Consumer.drain`: when it returns, and which tasks it starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import attrs
import pytest
from core.faulty import Faulty

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import (
    Consumer,
    QueueState,
    TransportUnavailable,
)

QUEUE = "q"


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
