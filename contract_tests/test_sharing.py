"""Two transports that share one store, like two processes, or like one process after a restart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from contract_tests.checking import CheckedTransport
from contract_tests.kit import Kit
from contract_tests.messages import first, make_settlement, message
from contract_tests.requires import requires, skip_not_claimed
from contract_tests.time_limits import start
from unstract_core import Reply, Verdict


@contextlib.contextmanager
def two(kit: Kit) -> Iterator[tuple[CheckedTransport, CheckedTransport]]:
    """Open two transports; skip the test if each has messages of its own."""
    if not kit.harness.shared:
        skip_not_claimed("each transport of this harness has messages of its own")
    with kit.open() as one, kit.open() as other:
        yield one, other


def test_one_transport_settles_messages_of_another(kit: Kit) -> None:
    """Producer, worker and callback worker may be three processes, and the sender may be gone."""
    with two(kit) as (one, other):
        queue, elsewhere = kit.queue(), kit.queue()
        one.send([message("t", queue, 1)])
        one.close()
        subscription = other.subscribe([queue], lease=60)
        settlement = make_settlement(kit.take_one(subscription), Verdict.ACK, follow_up=message("f", elsewhere, 2))
        assert list(subscription.settle([settlement])) == [True]
        other.close()
        with kit.open() as third:
            assert [first(found) for found in kit.remaining(third, elsewhere, count=1)] == [2]


def test_claims_are_exclusive_between_transports(kit: Kit) -> None:
    """Two transports never claim the same message."""
    with two(kit) as (one, other):
        queue = kit.queue()
        one.send([message("t", queue, n) for n in range(10)])
        mine, theirs = one.subscribe([queue], lease=60), other.subscribe([queue], lease=60)
        held = kit.take(mine, 5)
        rest = kit.take(theirs, 10 - len(held), limit=20)
        assert sorted(map(first, [*held, *rest])) == list(range(10))
        mine.close()
        theirs.close()


@requires("fencing")
def test_the_fence_holds_between_transports(kit: Kit) -> None:
    """A settlement by a transport that lost its lease to another transport has no effect."""
    with two(kit) as (one, other):
        queue = kit.queue()
        one.send([message("t", queue)])
        late, successor = one.subscribe([queue], lease=60), other.subscribe([queue], lease=60)
        old = kit.take_one(late)
        kit.expire(one, queue)
        new = kit.take_one(successor)
        assert list(late.settle([make_settlement(old, Verdict.ACK)])) == [False]
        assert list(successor.settle([make_settlement(new, Verdict.ACK)])) == [True]
        late.close()
        successor.close()


@requires("status")
def test_a_status_is_readable_from_another_transport(kit: Kit) -> None:
    """A transport can read the status of a dispatch that another transport sent."""
    with two(kit) as (one, other):
        key = kit.queue()
        kit.answer(one, Reply(key, "completed", result={"n": 1}))
        assert other.reply(key, timeout=20) == Reply(key, "completed", result={"n": 1})


def test_a_waiting_receive_is_woken_by_another_transport(kit: Kit) -> None:
    """A message sent by another transport ends the wait long before its time."""
    with two(kit) as (one, other):
        queue = kit.queue()
        subscription = one.subscribe([queue], lease=60)
        waiting = start(lambda: other.send([message("t", queue)]))
        assert len(subscription.receive(limit=1, wait=20)) == 1
        waiting(20)
        subscription.close()
