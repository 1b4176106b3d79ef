"""Claims: a claimed message belongs to one subscription only."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit, timed
from contract_tests.messages import make_settlement, message
from contract_tests.time_limits import together
from unstract_core import ConfigurationError, PayloadError, Verdict


@pytest.mark.parametrize("queues", [1, 3])
def test_concurrent_claimers_never_share_a_message(kit: Kit, transport: CheckedTransport, queues: int) -> None:
    """Concurrent subscriptions receive every message exactly once, and none of them more than its limit at a time."""
    names = [kit.queue() for _ in range(queues)]
    sent = [id for name in names for id in transport.send([message("t", name) for _ in range(120)])]
    ready = threading.Barrier(4)
    seen: list[str] = []

    def claim(number: int) -> list[str]:
        subscription = transport.subscribe(names, lease=60)
        ready.wait(20)
        mine: list[str] = []
        empty, until = 0, time.monotonic() + kit.max_wait
        while empty < 3 or (len(seen) < len(sent) and time.monotonic() < until):
            batch = subscription.receive(limit=number + 3, wait=0.01)
            mine += [delivery.id for delivery in batch]
            seen.extend(delivery.id for delivery in batch)
            empty = 0 if batch else empty + 1
        ready.wait(20)
        subscription.close()
        return mine

    claimed = Counter(id for mine in together(*(lambda n=n: claim(n) for n in range(4))) for id in mine)
    assert claimed == Counter(sent)


def test_a_claimed_message_is_not_delivered_again(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A claimed message is delivered neither to another subscription nor again to its holder."""
    transport.send([message("t", queue)])
    holder, other = subscribe(queue), subscribe(queue)
    kit.take_one(holder)
    assert kit.nothing(other)
    assert kit.nothing(holder)


def test_a_subscription_claims_only_from_its_queues(
    kit: Kit, transport: CheckedTransport, subscribe: Subscribe
) -> None:
    """A subscription does not receive messages of other queues."""
    mine, other = kit.queue(), kit.queue()
    transport.send([message("t", other)])
    assert kit.nothing(subscribe(mine))
    assert len(kit.take(subscribe(other), 1, limit=10)) == 1


def test_receive_returns_at_most_limit_messages(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`receive` claims at most `limit` messages and leaves the rest to other subscriptions."""
    transport.send([message("t", queue, n) for n in range(5)])
    holder, other = subscribe(queue), subscribe(queue)
    assert len(kit.take(holder, 2)) == 2
    assert len(kit.take(other, 3, limit=10)) == 3


def test_receive_with_limit_zero_only_waits(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`receive(limit=0)` waits for its full time and claims nothing, even if messages are ready."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    with timed() as elapsed:
        assert not subscription.receive(limit=0, wait=0.3)
        assert elapsed() > 0.25
    assert len(kit.take(subscription, 1)) == 1


def test_receive_accepts_a_very_large_limit(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A limit far above the number of ready messages returns all of them."""
    transport.send([message("t", queue, n) for n in range(3)])
    assert len(kit.take(subscribe(queue), 3, limit=100_000)) == 3


def test_an_acknowledged_message_is_gone(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """An acknowledged message is not delivered again, also not after its lease."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    delivery = kit.take_one(subscription)
    assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]
    kit.expire(transport, queue)
    time.sleep(0.01)
    assert kit.nothing(subscribe(queue))


def test_closing_a_subscription_returns_its_messages_to_others(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A claimed message whose subscription was closed without settling it is delivered to another subscription."""
    (id,) = transport.send([message("t", queue, 1)])
    holder = subscribe(queue)
    held = kit.take_one(holder)
    holder.close()
    kit.expire(transport, queue)
    again = kit.take_one(subscribe(queue))
    assert (held.id, again.id) == (id, id)
    assert again.payload == held.payload


def test_a_queue_named_twice_delivers_once(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A subscription that names a queue twice receives each of its messages once."""
    transport.send([message("t", queue)])
    assert len(kit.take(subscribe(queue, queue), 1, limit=5)) == 1


@pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf")])
def test_an_invalid_lease_is_refused(transport: CheckedTransport, queue: str, lease: float) -> None:
    """`subscribe` raises ConfigurationError for a lease that is not a positive, finite number of seconds."""
    with pytest.raises(ConfigurationError):
        transport.subscribe([queue], lease=lease)


def test_subscribing_to_no_queue_is_refused(transport: CheckedTransport) -> None:
    """`subscribe` raises ConfigurationError without queues, and PayloadError for an empty queue name."""
    with pytest.raises(ConfigurationError):
        transport.subscribe([], lease=60)
    with pytest.raises(PayloadError):
        transport.subscribe([""], lease=60)
