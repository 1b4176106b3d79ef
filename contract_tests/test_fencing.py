"""Fencing: a holder that lost its lease, or settled its delivery, cannot change the message."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from contract_tests.checking import CheckedSubscription, CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit, timed
from contract_tests.messages import first, make_settlement, message
from contract_tests.requires import requires
from unstract_core import Delivery, Reply, Verdict


class LostLease(NamedTuple):
    """A message whose first holder lost its lease, and that a second one holds now."""

    late: CheckedSubscription
    old: Delivery
    successor: CheckedSubscription
    new: Delivery


def lose_lease(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, *, lease: float = 60.0
) -> LostLease:
    """Let a lease expire, and claim the message again for `lease` seconds."""
    transport.send([message("t", queue)])
    late, successor = subscribe(queue), subscribe(queue, lease=lease)
    old = kit.take_one(late)
    kit.expire(transport, queue)
    (new,) = successor.receive(limit=1, wait=10)
    assert (old.id, old.attempt, new.attempt) == (new.id, 1, 2)
    return LostLease(late, old, successor, new)


@requires("fencing")
@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_settlement_changes_nothing(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict
) -> None:
    """A settlement after a lost lease returns False; the new holder keeps the message and settles it."""
    late, old, successor, new = lose_lease(kit, transport, queue, subscribe)
    assert list(late.settle([make_settlement(old, verdict, reason="late")])) == [False]
    assert kit.nothing(subscribe(queue))
    if kit.capabilities.dead_letters:
        assert not transport.dead.find(queue=queue)
    assert list(successor.renew([new])) == [True]
    assert list(successor.settle([make_settlement(new, Verdict.ACK)])) == [True]
    assert not kit.remaining(transport, queue)


@requires("fencing")
@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_settlement_sends_no_follow_up(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict
) -> None:
    """A settlement after a lost lease sends no follow-up: the new holder will send it."""
    late, old, _, _ = lose_lease(kit, transport, queue, subscribe)
    elsewhere = kit.queue()
    assert list(late.settle([make_settlement(old, verdict, follow_up=message("f", elsewhere))])) == [False]
    assert kit.nothing(subscribe(elsewhere))


@requires("fencing", "replies")
@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_settlement_writes_no_reply(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict
) -> None:
    """A settlement after a lost lease writes no reply: it would win over the new holder's reply."""
    late, old, successor, new = lose_lease(kit, transport, queue, subscribe)
    kit.ask(transport, key := kit.queue())
    assert list(late.settle([make_settlement(old, verdict, reply=Reply(key, "failed", error="late"))])) == [False]
    assert transport.reply(key) is None
    assert list(successor.settle([make_settlement(new, Verdict.ACK, reply=Reply(key, "completed", result=1))])) == [
        True
    ]
    assert kit.answered(transport, key).result == 1


@requires("fencing")
def test_a_late_renewal_changes_nothing(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A renewal after a lost lease returns False, and the new holder keeps the message."""
    late, old, successor, new = lose_lease(kit, transport, queue, subscribe)
    assert list(late.renew([old])) == [False]
    assert list(successor.settle([make_settlement(new, Verdict.ACK)])) == [True]


@requires("fencing")
def test_a_late_renewal_extends_no_other_lease(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """The new holder's lease expires on time, however often the earlier holder renews."""
    late, old, successor, _ = lose_lease(kit, transport, queue, subscribe, lease=0.6)
    successor.close()
    third = subscribe(queue)
    with timed() as elapsed:
        while not (found := third.receive(limit=1, wait=0.1)):
            assert elapsed() < 20, "a late renewal has extended the new holder's lease"
            assert list(late.renew([old])) == [False]
    assert found[0].attempt == 3


@requires("fencing")
def test_an_earlier_holder_cannot_settle_after_its_successor(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """After the new holder has settled, the earlier holder can neither settle nor renew."""
    late, old, successor, new = lose_lease(kit, transport, queue, subscribe)
    assert list(successor.settle([make_settlement(new, Verdict.ACK)])) == [True]
    elsewhere = kit.queue()
    assert list(late.settle([make_settlement(old, Verdict.ACK, follow_up=message("f", elsewhere))])) == [False]
    assert list(late.renew([old])) == [False]
    assert kit.nothing(subscribe(elsewhere))


@requires("fencing")
def test_a_batch_settles_only_deliveries_still_held(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """In one batch, lost deliveries have no effect and the others take full effect."""
    transport.send([message("t", queue, n) for n in range(4)])
    late, successor = subscribe(queue), subscribe(queue)
    held = kit.take(late, 4)
    kit.expire(transport, queue)
    taken = {delivery.id for delivery in successor.receive(limit=2, wait=10)}
    elsewhere = kit.queue()
    settlements = [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, one.id)) for one in held]
    assert list(late.settle(settlements)) == [one.id not in taken for one in held]
    kept = [one.id for one in held if one.id not in taken]
    assert sorted(map(first, kit.take(subscribe(elsewhere), len(kept), limit=10))) == sorted(kept)


@requires("fencing")
def test_the_fence_separates_attempts_of_one_holder(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A holder that lost a message and received it again can settle only the latest attempt."""
    transport.send([message("t", queue)])
    holder, elsewhere = subscribe(queue), kit.queue()
    old = kit.take_one(holder)
    kit.expire(transport, queue)
    (new,) = holder.receive(limit=1, wait=10)
    assert list(holder.renew([old, new])) == [False, True]
    both = [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, one.attempt)) for one in (old, new)]
    assert list(holder.settle(both)) == [False, True]
    assert list(map(first, kit.take(subscribe(elsewhere), 1, limit=5))) == [2]


@requires("fencing")
def test_a_delivery_of_another_subscription_cannot_be_settled(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """After an uncounted release, the earlier subscription cannot settle the same attempt of the new holder."""
    transport.send([message("t", queue)])
    early, successor = subscribe(queue), subscribe(queue)
    old = kit.take_one(early)
    assert list(early.settle([make_settlement(old, Verdict.RETRY, counted=False)])) == [True]
    new = kit.take_one(successor)
    assert (new.id, new.attempt) == (old.id, old.attempt)
    assert list(early.settle([make_settlement(old, Verdict.ACK)])) == [False]
    assert list(successor.settle([make_settlement(new, Verdict.ACK)])) == [True]


@requires("fencing")
@pytest.mark.parametrize("same_holder", [False, True], ids=["another holder", "the same holder"])
@pytest.mark.parametrize("verdict", Verdict)
def test_an_old_fence_rejects_a_reused_id(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict, same_holder: bool
) -> None:
    """After a restore, an old delivery cannot settle or renew a new message with the same id and attempt."""
    (old_id,) = transport.send([message("t", queue, "old")])
    holder = subscribe(queue)
    old = kit.take_one(holder)
    (new_id,) = transport.send([message("t", queue, "new")])
    kit.reissue(transport, new_id, old_id)
    successor, elsewhere = holder if same_holder else subscribe(queue), kit.queue()
    new = kit.take_one(successor)
    assert (new.id, new.attempt, first(new)) == (old.id, old.attempt, "new")
    assert list(holder.renew([old])) == [False]
    late = make_settlement(old, verdict, reason="late", follow_up=message("f", elsewhere))
    assert list(holder.settle([late])) == [False]
    assert list(successor.renew([new])) == [True]
    both = [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, first(one))) for one in (old, new)]
    assert list(successor.settle(both)) == [False, True]
    assert list(map(first, kit.take(subscribe(elsewhere), 1, limit=5))) == ["new"]
    assert not kit.remaining(transport, queue)


@pytest.mark.parametrize("delay", [0.0, 30.0])
@pytest.mark.parametrize("verdict", Verdict)
def test_a_delivery_is_settled_once(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict, delay: float
) -> None:
    """Settling or renewing a settled delivery again returns False and has no effect."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    delivery = kit.take_one(holder)
    elsewhere = kit.queue()
    delay = delay if kit.capabilities.delay and verdict is Verdict.RETRY else 0.0
    assert list(holder.settle([make_settlement(delivery, verdict, delay=delay, reason="r")])) == [True]
    again = make_settlement(delivery, Verdict.ACK, follow_up=message("f", elsewhere))
    assert list(holder.settle([again])) == [False]
    assert list(holder.renew([delivery])) == [False]
    assert kit.nothing(subscribe(elsewhere))


def test_a_batch_settles_a_repeated_delivery_once(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Of two settlements of one delivery in a batch, only the first takes effect."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    delivery = kit.take_one(holder)
    elsewhere = kit.queue()
    twice = [make_settlement(delivery, Verdict.ACK, follow_up=message("f", elsewhere, n)) for n in range(2)]
    assert list(holder.settle(twice)) == [True, False]
    assert list(map(first, kit.take(subscribe(elsewhere), 1, limit=5))) == [0]


@requires("fencing")
def test_renew_extends_only_deliveries_still_held(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """One lost delivery in a renewal does not stop the renewal of the others."""
    transport.send([message("t", queue, n) for n in range(3)])
    holder, successor = subscribe(queue), subscribe(queue)
    held = kit.take(holder, 3)
    kit.expire(transport, queue)
    (taken,) = successor.receive(limit=1, wait=10)
    assert list(holder.renew(held)) == [one.id != taken.id for one in held]
    assert kit.nothing(subscribe(queue))
