"""`settle`: every verdict with every combination of follow-up and reply takes full effect, or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import LONG, SOON, Kit, timed
from contract_tests.messages import first, make_settlement, message, parsed
from contract_tests.profiles import examples
from contract_tests.requires import requires
from unstract_core import ContractError, Delivery, Message, PayloadError, Reply, Verdict

Kind = tuple[Verdict, bool, bool]
KINDS: list[Kind] = list(itertools.product(Verdict, [False, True], [False, True]))


def test_everything_in_a_mixed_batch_takes_effect(kit: Kit) -> None:
    """Each settlement of a mixed batch takes full effect: verdict, follow-up and reply."""
    replies, letters = kit.capabilities.replies, kit.capabilities.dead_letters
    with kit.open() as transport:

        @examples(20 if kit.moment == 0 else 10)
        @given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
        def property_(kinds: list[Kind]) -> None:
            queue, elsewhere = kit.queue(), kit.queue()
            keys = [f"{queue}-{n}" if replies else None for n in range(len(kinds))]
            transport.send([message("t", queue, n, reply_key=key) for n, key in enumerate(keys)])
            subscription = transport.subscribe([queue], lease=60)
            held = kit.take(subscription, len(kinds))
            batch = [
                make_settlement(
                    delivery,
                    verdict,
                    follow_up=message("f", elsewhere, n, org_id="o", priority=7) if follow_up else None,
                    reply=Reply(key, "completed", result={"n": n}) if reply and key else None,
                    reason=f"reason {n}",
                    result=[n],
                )
                for n, (delivery, key, (verdict, follow_up, reply)) in enumerate(zip(held, keys, kinds, strict=True))
            ]
            assert list(subscription.settle(batch)) == [True] * len(kinds)

            retried = {n for n, kind in enumerate(kinds) if kind[0] is Verdict.RETRY}
            again = kit.take(subscription, len(retried), limit=100)
            assert {first(delivery): delivery.attempt for delivery in again} == dict.fromkeys(retried, 2)
            assert len(again) == len(retried)
            follower = transport.subscribe([elsewhere], lease=60)
            followed = [n for n, kind in enumerate(kinds) if kind[1]]
            follow_ups = kit.take(follower, len(followed), limit=100)
            assert list(map(first, follow_ups)) == followed
            assert all((one.org_id, one.attempt) == ("o", 1) for one in follow_ups)
            assert all(one.priority == 7 for one in follow_ups) or not kit.capabilities.priority
            for n, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
                if key and kind[2]:
                    assert kit.answered(transport, key).result == {"n": n}
                elif key:
                    assert transport.reply(key) is None
            if letters:
                buried = {letter.reason: letter for letter in transport.dead.find(queue=queue)}
                assert set(buried) == {f"reason {n}" for n, kind in enumerate(kinds) if kind[0] is Verdict.BURY}
                for n, delivery in enumerate(held):
                    if kinds[n][0] is Verdict.BURY:
                        letter = buried[f"reason {n}"]
                        assert (letter.attempts, letter.result, letter.message) == (1, [n], parsed(delivery.raw))
            subscription.close()
            follower.close()

        property_()


@pytest.mark.parametrize("verdict", Verdict)
def test_a_follow_up_is_never_lost(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, verdict: Verdict
) -> None:
    """The follow-up of every settlement that returns True arrives once, for each verdict."""
    transport.send([message("t", queue)])
    holder, elsewhere = subscribe(queue), kit.queue()
    settlement = make_settlement(kit.take_one(holder), verdict, follow_up=message("f", elsewhere, "next"), reason="r")
    assert list(holder.settle([settlement])) == [True]
    assert list(map(first, kit.take(subscribe(elsewhere), 1, limit=5))) == ["next"]


@requires("delay")
def test_a_retry_with_delay_waits(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """RETRY redelivers the message after `delay` seconds, with the next attempt number."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    delivery = kit.take_one(subscription)
    with timed() as elapsed:
        subscription.settle([make_settlement(delivery, Verdict.RETRY, delay=0.4)])
        (again,) = subscription.receive(limit=1, wait=LONG)
        assert 0.35 < elapsed() < 0.4 + SOON
    assert (again.id, again.attempt) == (delivery.id, 2)


BROKEN: dict[str, Callable[[str], Message]] = {
    "a value that is not JSON": lambda queue: message("f", queue, object()),
    "an empty name": lambda queue: message("", queue),
    "an invalid priority": lambda queue: message("f", queue, priority=99),
    "an organisation with NUL": lambda queue: message("f", queue, org_id="a\0b"),
}


@requires("dead_letters", "replies")
@pytest.mark.parametrize("part", ["reply", "result"])
def test_an_invalid_result_has_no_effect(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, part: str
) -> None:
    """A reply or dead letter with a non-JSON result raises PayloadError, and the message stays claimed."""
    transport.send([message("t", queue, reply_key=queue)])
    subscription, elsewhere = subscribe(queue), kit.queue()
    delivery = kit.take_one(subscription)
    broken: Any = object()
    settlement = make_settlement(delivery, Verdict.BURY, follow_up=message("f", elsewhere), reason="r")
    if part == "reply":
        settlement = attrs.evolve(settlement, reply=Reply(queue, "completed", result=broken))
    else:
        settlement = attrs.evolve(settlement, result=broken)
    with pytest.raises(PayloadError):
        subscription.settle([settlement])
    assert kit.nothing(subscribe(elsewhere))
    assert not transport.dead.find(queue=queue)
    assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]


def test_a_follow_up_keeps_its_own_fields(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A follow-up has its own organisation, priority and queue, not its parent's, and is attempt 1."""
    transport.send([message("t", queue, org_id="parent", priority=2)])
    holder, elsewhere = subscribe(queue), kit.queue()
    parent = kit.take_one(holder)
    assert list(holder.settle([make_settlement(parent, Verdict.RETRY)])) == [True]
    follow_up = message("f", elsewhere, "next", org_id="child", priority=9)
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.ACK, follow_up=follow_up)])) == [True]
    child = kit.take_one(subscribe(elsewhere))
    assert (first(child), child.org_id, child.attempt) == ("next", "child", 1)
    if kit.capabilities.priority:
        assert child.priority == 9


@requires("delay")
def test_a_follow_up_keeps_its_delay(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A follow-up with a delay is delivered after that delay."""
    transport.send([message("t", queue)])
    holder, elsewhere = subscribe(queue), kit.queue()
    settlement = make_settlement(kit.take_one(holder), Verdict.ACK, follow_up=message("f", elsewhere, delay=0.6))
    follower = subscribe(elsewhere)
    with timed() as elapsed:
        assert list(holder.settle([settlement])) == [True]
        assert len(follower.receive(limit=1, wait=LONG)) == 1
        assert 0.55 < elapsed() < 0.6 + SOON


@requires("status")
def test_a_reply_is_stored_under_its_key(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """The reply is stored under the settlement's key, also if the message asked for another key."""
    key, other = kit.queue(), kit.queue()
    transport.send([message("t", queue, reply_key=other)])
    holder = subscribe(queue)
    settlement = make_settlement(kit.take_one(holder), Verdict.ACK, reply=Reply(key, "completed", result=1))
    assert list(holder.settle([settlement])) == [True]
    assert kit.answered(transport, key).result == 1
    assert transport.reply(other) is None


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_invalid_follow_up_has_no_effect(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, broken: Callable[[str], Message]
) -> None:
    """An invalid follow-up raises PayloadError before anything changes; the whole batch can still be settled."""
    transport.send([message("t", queue, 1), message("t", queue, 2)])
    subscription, elsewhere = subscribe(queue), kit.queue()
    held = kit.take(subscription, 2)
    batch = [
        make_settlement(held[0], Verdict.ACK, follow_up=message("f", elsewhere)),
        make_settlement(held[1], Verdict.ACK, follow_up=broken(elsewhere)),
    ]
    with pytest.raises(PayloadError):
        subscription.settle(batch)
    assert kit.nothing(subscribe(elsewhere))
    assert list(subscription.settle([make_settlement(one, Verdict.ACK) for one in held])) == [True, True]


def test_a_refused_follow_up_leaves_its_message_claimed(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A follow-up is confirmed before its message is acknowledged: a refusal loses neither."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    delivery = kit.take_one(subscription)
    with pytest.raises(ContractError):
        subscription.settle([make_settlement(delivery, Verdict.ACK, follow_up=message("f", "", 1))])
    assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf")])
def test_an_invalid_retry_delay_is_refused(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, delay: float
) -> None:
    """RETRY with a delay that is negative or not finite raises PayloadError, and the message stays claimed."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    delivery = kit.take_one(subscription)
    with pytest.raises(PayloadError):
        subscription.settle([make_settlement(delivery, Verdict.RETRY, delay=delay)])
    assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]


def test_settle_does_not_change_its_arguments(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`settle` copies a follow-up: neither the caller's objects nor the message change afterwards."""
    transport.send([message("t", queue)])
    subscription, elsewhere = subscribe(queue), kit.queue()
    argument = {"list": [1]}
    settlement = make_settlement(kit.take_one(subscription), Verdict.ACK, follow_up=message("f", elsewhere, argument))
    assert list(subscription.settle([settlement])) == [True]
    assert argument == {"list": [1]}
    argument["list"].append(2)
    assert first(kit.take_one(subscribe(elsewhere))) == {"list": [1]}


def test_large_batches_are_settled_whole(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Three hundred settlements in one call all take effect, and their follow-ups arrive in order."""
    count = 300
    transport.send([message("t", queue, n) for n in range(count)])
    holder, elsewhere = subscribe(queue), kit.queue()
    held: list[Delivery] = kit.take(holder, count)
    batch = [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, first(one))) for one in held]
    assert list(holder.settle(batch)) == [True] * count
    assert list(map(first, kit.take(subscribe(elsewhere), count))) == list(map(first, held))
