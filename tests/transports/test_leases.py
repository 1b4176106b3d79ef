"""Leases, renewal and the fence: who has lost a message can change nothing about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import Harness, message

from unstract_core import Delivery, Reply, Settlement, Subscription, Verdict

Subscribe = Callable[..., Subscription]


@pytest.fixture
def two_holders(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> tuple[Subscription, Delivery, Subscription, Delivery]:
    """A message whose first holder let its lease expire, and that a second one holds now."""
    transport.send([message("t", queue)])
    late, heir = subscribe(queue), subscribe(queue)
    (old,) = late.receive(limit=1, wait=0)
    harness.expire(transport, queue)
    (new,) = heir.receive(limit=1, wait=1)
    return late, old, heir, new


@pytest.mark.needs("fencing")
def test_an_expired_message_is_delivered_again_with_the_next_attempt(two_holders: Any) -> None:
    """When a lease ends the message comes back, and its attempt counts up."""
    _, old, _, new = two_holders
    assert (old.id, old.attempt) == (new.id, 1)
    assert new.attempt == 2


@pytest.mark.needs("fencing")
def test_a_lease_ends_by_itself(transport: Any, queue: str, subscribe: Subscribe) -> None:
    """Nothing but time is needed: a message whose holder is silent comes back after its lease."""
    transport.send([message("t", queue)])
    subscribe(queue, lease=0.3).receive(limit=1, wait=0)
    heir = subscribe(queue)
    assert not heir.receive(limit=1, wait=0.05)
    (delivery,) = heir.receive(limit=1, wait=5)
    assert delivery.attempt == 2


@pytest.mark.needs("fencing")
@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_settlement_of_a_lost_lease_changes_nothing(
    transport: Any, harness: Harness, subscribe: Subscribe, two_holders: Any, verdict: Verdict
) -> None:
    """A settlement by who lost the lease answers False: no verdict, no follow-up, no reply, no dead letter."""
    late, old, heir, new = two_holders
    elsewhere, key = harness.queue(), harness.queue()
    settlement = Settlement(
        old, verdict, follow_up=message("f", elsewhere), reply=Reply(key, "completed", result=1), reason="late"
    )
    assert list(late.settle([settlement])) == [False]
    assert not subscribe(elsewhere).receive(limit=1, wait=0)
    assert transport.reply(key) is None
    assert transport.dead.find(queue=old.queue) in ([], ())
    assert list(heir.renew([new])) == [True]
    assert list(heir.settle([Settlement(new, Verdict.ACK)])) == [True]


@pytest.mark.needs("fencing")
def test_a_late_renewal_of_a_lost_lease_changes_nothing(two_holders: Any) -> None:
    """A renewal by who lost the lease answers False, and the heir keeps the message."""
    late, old, heir, new = two_holders
    assert list(late.renew([old])) == [False]
    assert list(heir.settle([Settlement(new, Verdict.ACK)])) == [True]


@pytest.mark.needs("fencing")
def test_of_a_batch_only_what_is_still_held_is_settled(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """In one batch, nothing of the lost ones takes effect and everything of the others does."""
    transport.send([message("t", queue, n) for n in range(4)])
    late, heir = subscribe(queue), subscribe(queue)
    held = late.receive(limit=4, wait=0)
    harness.expire(transport, queue)
    taken = {delivery.id for delivery in heir.receive(limit=2, wait=1)}
    elsewhere = harness.queue()
    settlements = [
        Settlement(
            d, Verdict.ACK, follow_up=message("f", elsewhere, d.id), reply=Reply(f"{elsewhere}{d.id}", "completed")
        )
        for d in held
    ]
    assert list(late.settle(settlements)) == [delivery.id not in taken for delivery in held]
    kept = sorted(delivery.id for delivery in held if delivery.id not in taken)
    arrived = subscribe(elsewhere).receive(limit=10, wait=0)
    assert sorted(str(delivery.payload.args[0]) for delivery in arrived if delivery.payload) == kept
    for delivery in held:
        assert (transport.reply(f"{elsewhere}{delivery.id}") is None) == (delivery.id in taken)


def test_a_renewed_message_is_not_delivered_again(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """A renewal extends the lease by its full length from now."""
    transport.send([message("t", queue)])
    holder, other = subscribe(queue, lease=0.6), subscribe(queue)
    (delivery,) = harness.take(holder, 1)
    for _ in range(4):
        assert not other.receive(limit=1, wait=0.25)
        assert list(holder.renew([delivery])) == [True]
    assert list(holder.settle([Settlement(delivery, Verdict.ACK)])) == [True]


@pytest.mark.needs("fencing")
def test_an_expired_lease_that_nobody_took_still_counts(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """Work is not thrown away: until somebody else holds the message, its last holder may renew and settle it."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    (delivery,) = holder.receive(limit=1, wait=0)
    harness.expire(transport, queue)
    assert list(holder.renew([delivery])) == [True]
    assert not subscribe(queue).receive(limit=1, wait=0)
    harness.expire(transport, queue)
    assert list(holder.settle([Settlement(delivery, Verdict.ACK)])) == [True]
    assert not subscribe(queue).receive(limit=1, wait=0)


@pytest.mark.needs("fencing")
def test_the_fence_holds_between_two_attempts_of_one_holder(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """Who lost a message and received it again holds its latest attempt alone, also inside one batch."""
    transport.send([message("t", queue)])
    holder, elsewhere = subscribe(queue), harness.queue()
    (old,) = holder.receive(limit=1, wait=0)
    harness.expire(transport, queue)
    (new,) = holder.receive(limit=1, wait=1)
    assert list(holder.renew([old, new])) == [False, True]
    both = [
        Settlement(d, Verdict.ACK, follow_up=message("f", elsewhere, d.attempt), reply=Reply(elsewhere, "completed"))
        for d in (old, new)
    ]
    assert list(holder.settle(both)) == [False, True]
    (follow_up,) = subscribe(elsewhere).receive(limit=5, wait=0)
    assert follow_up.payload is not None
    assert follow_up.payload.args == [2]


@pytest.mark.parametrize("delay", [0.0, 30.0])
@pytest.mark.parametrize("verdict", Verdict)
def test_a_delivery_is_settled_once(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe, verdict: Verdict, delay: float
) -> None:
    """Who has settled a message has let go of it: settling or renewing it again answers False and does nothing."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    (delivery,) = harness.take(holder, 1)
    elsewhere = harness.queue()
    assert list(holder.settle([Settlement(delivery, verdict, delay=delay, reason="r")])) == [True]
    again = Settlement(delivery, Verdict.ACK, follow_up=message("f", elsewhere))
    assert list(holder.settle([again])) == [False]
    assert list(holder.renew([delivery])) == [False]
    assert harness.has_nothing(subscribe(elsewhere))


def test_the_same_delivery_twice_in_a_batch_is_settled_once(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """Of two settlements of one delivery in a batch the first counts."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    (delivery,) = harness.take(holder, 1)
    elsewhere = harness.queue()
    twice = [Settlement(delivery, Verdict.ACK, follow_up=message("f", elsewhere, n)) for n in range(2)]
    assert list(holder.settle(twice)) == [True, False]
    (follow_up,) = harness.take(subscribe(elsewhere), 1, limit=5)
    assert follow_up.payload is not None
    assert follow_up.payload.args == [0]
