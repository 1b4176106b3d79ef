"""Atomic settlements: all parts take effect together if claimed; else follow-ups come before acknowledgements."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial

from contract_tests.checking import CheckedSubscription, CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit, retry_outages
from contract_tests.messages import first, make_settlement, message
from contract_tests.requires import requires
from contract_tests.time_limits import start
from unstract_core import Reply, Settlement, TransportError, Verdict


@requires("atomic_settle", "replies")
def test_visible_reply_implies_follow_up_and_acknowledgement(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """As soon as a reply can be read, its follow-up is visible and its message is acknowledged."""
    for _ in range(10):
        key, elsewhere = kit.queue(), kit.queue()
        transport.send([message("t", queue, reply_key=key)])
        holder = subscribe(queue)
        settlement = make_settlement(
            kit.take_one(holder), Verdict.ACK, follow_up=message("f", elsewhere), reply=Reply(key, "completed")
        )
        follower, successor = subscribe(elsewhere), subscribe(queue)
        settling = start(partial(holder.settle, [settlement]))
        assert transport.reply(key, timeout=20) is not None
        assert len(follower.receive(limit=5, wait=0)) == 1
        kit.expire(transport, queue)
        assert not successor.receive(limit=5, wait=0)
        assert settling(20) == [True]


@requires("atomic_settle", "replies")
def test_visible_follow_up_implies_reply(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """As soon as a follow-up can be received, the reply of the same settlement can be read."""
    for _ in range(10):
        key, elsewhere = kit.queue(), kit.queue()
        transport.send([message("t", queue, reply_key=key)])
        holder, follower = subscribe(queue), subscribe(elsewhere)
        settlement = make_settlement(
            kit.take_one(holder), Verdict.ACK, follow_up=message("f", elsewhere), reply=Reply(key, "completed")
        )
        settling = start(partial(holder.settle, [settlement]))
        assert len(follower.receive(limit=5, wait=20)) == 1
        assert transport.reply(key) is not None
        settling(20)


@requires("atomic_settle", "dead_letters")
def test_visible_follow_up_implies_dead_letter(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """As soon as the follow-up of a dead-lettered message can be received, the dead letter can be found."""
    for n in range(10):
        elsewhere = kit.queue()
        transport.send([message("t", queue, n)])
        holder, follower = subscribe(queue), subscribe(elsewhere)
        settlement = make_settlement(
            kit.take_one(holder), Verdict.BURY, follow_up=message("f", elsewhere), reason=f"reason {n}"
        )
        settling = start(partial(holder.settle, [settlement]))
        assert len(follower.receive(limit=5, wait=20)) == 1
        assert f"reason {n}" in [letter.reason for letter in transport.dead.find(queue=queue)]
        settling(20)


def settled(subscription: CheckedSubscription, batch: Sequence[Settlement]) -> Sequence[bool] | None:
    """Settle; return None if the connection was cut and the outcome is unknown."""
    try:
        return subscription.settle(batch)
    except TransportError:
        return None


def test_a_cut_while_settling_loses_no_follow_up(kit: Kit, transport: CheckedTransport, subscribe: Subscribe) -> None:
    """After a cut, the message is redelivered or its follow-up arrives; both only if settle is not atomic."""
    chance = random.Random(4)
    for _ in range(12):
        queue, elsewhere = kit.queue(), kit.queue()
        retry_outages(partial(transport.send, [message("t", queue, n) for n in range(20)]))
        holder = retry_outages(partial(subscribe, queue))
        held = kit.take(holder, 20)
        batch = [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, first(one))) for one in held]
        settling = start(partial(settled, holder, batch))
        time.sleep(chance.uniform(0, 0.01))
        kit.sever(transport)
        settling(40)
        holder.close()
        back = {first(one) for one in again(kit, transport, queue)}
        followed = [first(one) for one in again(kit, transport, elsewhere)]
        assert back | set(followed) == set(range(20))
        if kit.capabilities.atomic_settle:
            assert sorted([*back, *followed]) == list(range(20))
            assert not back or not followed


def again(kit: Kit, transport: CheckedTransport, queue: str) -> list:  # type: ignore[type-arg]
    """Return every message that is left in a queue, after the transport has reconnected."""
    return retry_outages(lambda: kit.remaining(transport, queue))
