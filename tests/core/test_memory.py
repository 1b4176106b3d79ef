"""What the memory transport does beyond what the kit asks of every transport."""

from __future__ import annotations

from contract_tests.messages import message
from transports.memory import MemoryTransport


def test_a_queue_is_as_old_as_its_longest_wait() -> None:
    """A message has waited since it could be taken: its delay is no part of that."""
    now = 0.0
    transport = MemoryTransport(clock=lambda: now)
    transport.send([message("t", "q", delay=100.0), message("t", "r")])
    now = 107.0
    assert [state.oldest for state in transport.queues(["q", "r"])] == [7.0, 107.0]
