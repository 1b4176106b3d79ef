"""What `receive` promises: order, exclusiveness, limits, and waking up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import Harness, message, timed
from hypothesis import given, settings
from hypothesis import strategies as st

from unstract_core import Settlement, Subscription, Verdict

Subscribe = Callable[..., Subscription]


@pytest.mark.needs("priority")
@settings(max_examples=25)
@given(
    priorities=st.lists(st.integers(1, 10), min_size=1, max_size=30),
    limits=st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_higher_priority_first_then_first_in_first_out(
    harness: Harness, priorities: list[int], limits: list[int]
) -> None:
    """Deliveries come by priority, then in the order of sending, inside a batch and from batch to batch."""
    with harness.transport() as transport:
        queue = harness.queue()
        transport.send([message("t", queue, n, priority=priority) for n, priority in enumerate(priorities)])
        subscription = transport.subscribe([queue], lease=60)
        received: list[object] = []
        for limit in [*limits, 100]:
            batch = harness.take(subscription, min(limit, len(priorities) - len(received)), limit=limit)
            assert len(batch) <= limit
            received += [delivery.payload.args[0] for delivery in batch if delivery.payload]
            if len(received) == len(priorities):
                break
        assert harness.has_nothing(subscription)
        subscription.close()
        assert received == sorted(range(len(priorities)), key=lambda n: (-priorities[n], n))


@pytest.mark.needs("priority", "order across queues")
@settings(max_examples=15)
@given(sent=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10)), min_size=1, max_size=30))
def test_priority_counts_across_the_queues_of_a_subscription(harness: Harness, sent: list[tuple[int, int]]) -> None:
    """A subscription to several queues takes the highest priority among them, then the one sent first."""
    with harness.transport() as transport:
        queues = [harness.queue() for _ in range(3)]
        for n, (queue, priority) in enumerate(sent):
            transport.send([message("t", queues[queue], n, priority=priority)])
        subscription = transport.subscribe(queues, lease=60)
        received = []
        while batch := subscription.receive(limit=7, wait=0):
            received += [delivery.payload.args[0] for delivery in batch]
        subscription.close()
        assert received == sorted(range(len(sent)), key=lambda n: (-sent[n][1], n))


@pytest.mark.parametrize("queues", [1, 3])
def test_concurrent_claimers_never_share_a_message(transport: Any, harness: Harness, queues: int) -> None:
    """Claims are exclusive: of many claimers at once each message goes to one, and nobody exceeds its limit."""
    names = [harness.queue() for _ in range(queues)]
    sent = [id for name in names for id in transport.send([message("t", name) for _ in range(120)])]
    together = threading.Barrier(4)
    seen: list[str] = []

    def claim(number: int) -> list[str]:
        subscription = transport.subscribe(names, lease=60)
        together.wait()
        mine: list[str] = []
        empty, until = 0, time.monotonic() + 3 * harness.patience
        while empty < 3 or (len(seen) < len(sent) and time.monotonic() < until):
            batch = subscription.receive(limit=number + 3, wait=0.01)
            assert len(batch) <= number + 3
            mine += [delivery.id for delivery in batch]
            seen.extend(delivery.id for delivery in batch)
            empty = 0 if batch else empty + 1
        together.wait()
        subscription.close()
        return mine

    with ThreadPoolExecutor(4) as pool:
        claimed = Counter(id for mine in pool.map(claim, range(4)) for id in mine)
    assert claimed == Counter(sent)


def test_a_subscription_takes_only_from_its_queues(transport: Any, harness: Harness, subscribe: Subscribe) -> None:
    """A message of another queue is left where it is."""
    mine, other = harness.queue(), harness.queue()
    transport.send([message("t", other)])
    assert harness.has_nothing(subscribe(mine))
    assert len(harness.take(subscribe(other), 1, limit=10)) == 1


def test_a_waiting_receive_gets_what_is_sent_meanwhile(transport: Any, queue: str, subscribe: Subscribe) -> None:
    """`receive` waits up to `wait` seconds, and returns as soon as there is a message."""
    subscription = subscribe(queue)
    sender = threading.Timer(0.2, lambda: transport.send([message("t", queue)]))
    sender.start()
    with timed() as elapsed:
        assert len(subscription.receive(limit=1, wait=10)) == 1
        assert elapsed() < 5
    sender.join()


def test_an_empty_receive_returns_when_its_time_is_up(queue: str, subscribe: Subscribe) -> None:
    """Nothing there: an empty sequence, after `wait` seconds and not before."""
    subscription = subscribe(queue)
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=0.3)
        assert 0.25 < elapsed() < 5


@pytest.mark.parametrize("limit", [0, 1])
def test_wake_ends_a_wait(queue: str, subscribe: Subscribe, limit: int) -> None:
    """`wake` from another thread makes a waiting receive return at once."""
    subscription = subscribe(queue)
    waker = threading.Timer(0.2, subscription.wake)
    waker.start()
    with timed() as elapsed:
        assert not subscription.receive(limit=limit, wait=10)
        assert elapsed() < 5
    waker.join()


def test_a_wake_before_the_wait_is_not_lost(queue: str, subscribe: Subscribe) -> None:
    """`wake` called while nobody waits ends the next wait."""
    subscription = subscribe(queue)
    subscription.wake()
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=10)
        assert elapsed() < 5


def test_a_limit_of_zero_only_waits(harness: Harness, transport: Any, queue: str, subscribe: Subscribe) -> None:
    """`limit=0` takes nothing, whatever is there."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    assert not subscription.receive(limit=0, wait=0.05)
    assert len(harness.take(subscription, 1)) == 1


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", '{"task_name": "t", "queue": "q", "kwargs": null}', '{"task_name": 1}']
)
def test_a_message_that_cannot_be_read_is_delivered_with_its_problem(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe, text: str
) -> None:
    """Malformed JSON shapes arrive with `payload` None and a `problem`; their neighbours arrive as ever."""
    transport.send([message("t", queue, 1)])
    harness.inject(transport, queue, text)
    transport.send([message("t", queue, 2)])
    first, broken, last = harness.take(subscribe(queue), 3, limit=10)
    assert (broken.payload, bool(broken.problem)) == (None, True)
    assert first.payload is not None
    assert last.payload is not None


def test_extra_keys_of_a_newer_writer_are_ignored(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """Unknown keys do not keep a message from being read."""
    harness.inject(
        transport, queue, '{"task_name":"t","args":[],"kwargs":{},"queue":"q","fairness":null,"new":{"x":1}}'
    )
    (delivery,) = harness.take(subscribe(queue), 1)
    assert delivery.problem is None


def test_many_threads_send_at_once(harness: Harness, transport: Any, queue: str, subscribe: Subscribe) -> None:
    """`send` is thread-safe: whatever was accepted arrives, once."""

    def send(number: int) -> list[str]:
        return [id for n in range(20) for id in transport.send([message("t", queue, number, n)])]

    with ThreadPoolExecutor(6) as pool:
        sent = [id for ids in pool.map(send, range(6)) for id in ids]
    received = harness.take(subscribe(queue), 120, limit=1000)
    assert sorted(delivery.id for delivery in received) == sorted(sent)


def test_what_was_acknowledged_does_not_come_back(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """An acknowledged message is gone, also after its lease."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    (delivery,) = harness.take(subscription, 1)
    assert list(subscription.settle([Settlement(delivery, Verdict.ACK)])) == [True]
    harness.expire(transport, queue)
    time.sleep(0.01)
    assert harness.has_nothing(subscribe(queue))


def test_what_its_holder_left_comes_back_to_others(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """A message whose holder closed its subscription without a settlement is delivered to somebody else."""
    (id,) = transport.send([message("t", queue, 1)])
    holder = subscribe(queue)
    (held,) = harness.take(holder, 1)
    holder.close()
    harness.expire(transport, queue)
    (again,) = harness.take(subscribe(queue), 1)
    assert (held.id, again.id) == (id, id)
    assert again.payload == held.payload
