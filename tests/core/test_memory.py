"""Guarantees of the memory transport beyond those of the kit."""

from __future__ import annotations

from contract_tests.messages import message
from transports.memory import MemoryTransport


def test_a_delay_does_not_age_a_queue() -> None:
    """The age of a queue counts from the moment at which its oldest message was ready."""
    now = 0.0
    transport = MemoryTransport(clock=lambda: now)
    transport.send([message("t", "q", delay=100.0), message("t", "r")])
    now = 107.0
    assert [state.oldest for state in transport.queues(["q", "r"])] == [7.0, 107.0]
