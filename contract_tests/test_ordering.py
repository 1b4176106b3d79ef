"""Order: first in, first out; by priority if claimed, in each queue or across queues."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit
from contract_tests.messages import first, message
from contract_tests.profiles import examples
from contract_tests.requires import requires

limits = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@examples(15)
@given(sends=st.lists(st.integers(1, 6), min_size=1, max_size=6), limits=limits)
def test_equal_priorities_come_first_in_first_out(kit: Kit, sends: list[int], limits: list[int]) -> None:
    """Messages of one queue arrive in send order: within a batch, from send to send, and from receive to receive."""
    with kit.open() as transport:
        queue, sent = kit.queue(), 0
        for size in sends:
            transport.send([message("t", queue, sent + n) for n in range(size)])
            sent += size
        subscription = transport.subscribe([queue], lease=60)
        received: list[object] = []
        for limit in [*limits, 100]:
            batch = kit.take(subscription, min(limit, sent - len(received)))
            received += map(first, batch)
            if len(received) == sent:
                break
        subscription.close()
        assert received == list(range(sent))


@requires("priority")
@examples(25)
@given(priorities=st.lists(st.integers(1, 10), min_size=1, max_size=30), limits=limits)
def test_higher_priority_first_then_first_in_first_out(kit: Kit, priorities: list[int], limits: list[int]) -> None:
    """Deliveries come by priority, then in send order, within a batch and from batch to batch."""
    with kit.open() as transport:
        queue = kit.queue()
        transport.send([message("t", queue, n, priority=priority) for n, priority in enumerate(priorities)])
        subscription = transport.subscribe([queue], lease=60)
        received: list[object] = []
        for limit in [*limits, 100]:
            batch = kit.take(subscription, min(limit, len(priorities) - len(received)), limit=limit)
            received += map(first, batch)
            if len(received) == len(priorities):
                break
        assert kit.nothing(subscription)
        subscription.close()
        assert received == sorted(range(len(priorities)), key=lambda n: (-priorities[n], n))


@requires("priority", "order_across_queues")
@examples(15)
@given(sent=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10)), min_size=1, max_size=30))
def test_priority_counts_across_the_queues_of_a_subscription(kit: Kit, sent: list[tuple[int, int]]) -> None:
    """A subscription to several queues receives the highest priority among them first, then the oldest."""
    with kit.open() as transport:
        queues = [kit.queue() for _ in range(3)]
        for n, (queue, priority) in enumerate(sent):
            transport.send([message("t", queues[queue], n, priority=priority)])
        subscription = transport.subscribe(queues, lease=60)
        received: list[object] = []
        while batch := subscription.receive(limit=7, wait=kit.moment):
            received += map(first, batch)
        subscription.close()
        assert received == sorted(range(len(sent)), key=lambda n: (-sent[n][1], n))


def test_a_full_queue_does_not_starve_another(kit: Kit, transport: CheckedTransport, subscribe: Subscribe) -> None:
    """A subscription to two queues receives the only message of one although the other holds many."""
    full, other = kit.queue(), kit.queue()
    transport.send([message("t", full, n) for n in range(40)])
    transport.send([message("t", other, "lone")])
    received = kit.take(subscribe(full, other), 41)
    assert "lone" in map(first, received)
