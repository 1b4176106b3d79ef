"""What `settle` promises: every verdict, with every combination of follow-up and reply, together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from harness import Harness, message, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from unstract_core import PayloadError, Reply, Settlement, Subscription, Verdict

Subscribe = Callable[..., Subscription]
Kind = tuple[Verdict, bool, bool]
KINDS: list[Kind] = list(itertools.product(Verdict, [False, True], [False, True]))


@pytest.mark.needs("replies", "dead_letters")
def test_everything_in_a_mixed_batch_takes_effect(harness: Harness, transport: Any) -> None:
    """Acks, retries and burials, with and without follow-ups and replies, in one batch: each does all of its own."""

    @settings(max_examples=20)
    @given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
    def property_(kinds: list[Kind]) -> None:
        queue, elsewhere = harness.queue(), harness.queue()
        transport.send([message("t", queue, n, reply_key=f"{queue}-{n}") for n in range(len(kinds))])
        subscription = transport.subscribe([queue], lease=60)
        held = harness.take(subscription, len(kinds))
        batch = [
            Settlement(
                delivery,
                verdict,
                follow_up=message("f", elsewhere, n, org_id="o", priority=7) if follow_up else None,
                reply=Reply(f"{queue}-{n}", "completed", result={"n": n}) if reply else None,
                reason=f"reason {n}",
                result=[n],
            )
            for n, (delivery, (verdict, follow_up, reply)) in enumerate(zip(held, kinds, strict=True))
        ]
        assert list(subscription.settle(batch)) == [True] * len(kinds)

        retried = {n for n, kind in enumerate(kinds) if kind[0] is Verdict.RETRY}
        again = harness.take(subscription, len(retried), limit=100)
        assert {delivery.payload.args[0] for delivery in again if delivery.payload} == retried
        assert all(delivery.attempt == 2 for delivery in again)
        follower = transport.subscribe([elsewhere], lease=60)
        followed = [n for n, kind in enumerate(kinds) if kind[1]]
        follow_ups = harness.take(follower, len(followed), limit=100)
        assert [delivery.payload.args[0] for delivery in follow_ups if delivery.payload] == followed
        assert all((d.org_id, d.priority, d.attempt) == ("o", 7, 1) for d in follow_ups)
        for n, kind in enumerate(kinds):
            found = transport.reply(f"{queue}-{n}", timeout=harness.patience if kind[2] else 0)
            assert (found.result if found else None) == ({"n": n} if kind[2] else None)
        buried = {letter.reason: letter for letter in transport.dead.find(queue=queue)}
        assert set(buried) == {f"reason {n}" for n, kind in enumerate(kinds) if kind[0] is Verdict.BURY}
        for n, delivery in enumerate(held):
            if kinds[n][0] is Verdict.BURY:
                letter = buried[f"reason {n}"]
                assert (letter.attempts, letter.result, letter.message) == (1, [n], stored(delivery))
        subscription.close()
        follower.close()

    property_()


@pytest.mark.needs("delay")
def test_a_retry_with_delay_waits(harness: Harness, transport: Any, queue: str, subscribe: Subscribe) -> None:
    """RETRY brings the message back after `delay` seconds, with the next attempt."""
    transport.send([message("t", queue)])
    subscription = subscribe(queue)
    (delivery,) = harness.take(subscription, 1)
    subscription.settle([Settlement(delivery, Verdict.RETRY, delay=0.4)])
    assert not subscription.receive(limit=1, wait=0.1)
    (again,) = subscription.receive(limit=1, wait=5)
    assert (again.id, again.attempt) == (delivery.id, 2)


def test_a_settlement_that_the_wire_refuses_has_no_effect(
    transport: Any, queue: str, harness: Harness, subscribe: Subscribe
) -> None:
    """PayloadError before anything is changed: the messages of the batch are still held, and can be settled."""
    transport.send([message("t", queue, 1), message("t", queue, 2)])
    subscription = subscribe(queue)
    first, second = harness.take(subscription, 2)
    broken = Settlement(second, Verdict.ACK, follow_up=message("f", harness.queue(), object()))
    with pytest.raises(PayloadError):
        subscription.settle([Settlement(first, Verdict.ACK), broken])
    whole = [Settlement(first, Verdict.ACK), Settlement(second, Verdict.ACK)]
    assert list(subscription.settle(whole)) == [True, True]


def test_settling_and_renewing_nothing_is_no_error(queue: str, subscribe: Subscribe) -> None:
    """Empty batches are allowed."""
    subscription = subscribe(queue)
    assert list(subscription.settle([])) == []
    assert list(subscription.renew([])) == []


@pytest.mark.needs("dead_letters")
def test_a_dead_letter_is_replayed_as_new(harness: Harness, transport: Any, queue: str, subscribe: Subscribe) -> None:
    """Replay sends the stored message again: attempt 1, behind what waits already, and no longer a dead letter."""
    transport.send([message("t", queue, "dead", org_id="o", priority=3)])
    subscription = subscribe(queue)
    (delivery,) = harness.take(subscription, 1)
    subscription.settle([Settlement(delivery, Verdict.BURY, reason="why", result={"paid": 1})])
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.reason, letter.result, letter.attempts, letter.task_name) == ("why", {"paid": 1}, 1, "t")
    assert letter.enqueued_at <= letter.buried_at
    transport.send([message("t", queue, "waiting", priority=3)])
    assert list(transport.dead.replay([letter.id, "999999999", "nonsense"])) == [letter.id]
    assert not transport.dead.find(queue=queue)
    assert not transport.dead.get([letter.id])
    waiting, replayed = harness.take(subscription, 2, limit=5)
    assert waiting.payload is not None
    assert replayed.payload is not None
    assert (waiting.payload.args, replayed.payload.args) == (["waiting"], ["dead"])
    assert (replayed.attempt, replayed.org_id, replayed.priority) == (1, "o", 3)


@pytest.mark.needs("dead_letters")
def test_purging_takes_what_was_asked_for_and_nothing_else(
    transport: Any, harness: Harness, queue: str, subscribe: Subscribe
) -> None:
    """Dead letters are purged by id, by queue and by age."""
    other = harness.queue()
    transport.send([message("t", queue), message("t", queue), message("t", other)])
    for name, count in ((queue, 2), (other, 1)):
        subscription = subscribe(name)
        held = harness.take(subscription, count)
        subscription.settle([Settlement(one, Verdict.BURY, reason="r") for one in held])
    newest, oldest = transport.dead.find(queue=queue)
    assert [letter.id for letter in transport.dead.find(queue=queue, limit=1)] == [newest.id]
    assert transport.dead.purge(queue=queue, older_than=3600) == 0
    assert transport.dead.purge(ids=[oldest.id]) == 1
    assert transport.dead.purge(queue=queue) == 1
    assert len(transport.dead.find(queue=other)) == 1


@pytest.mark.needs("inspection")
def test_the_state_of_a_queue_is_told(transport: Any, harness: Harness, queue: str, subscribe: Subscribe) -> None:
    """`queues` counts what is ready, held, delayed and dead, and how long the oldest waits."""
    transport.send([message("t", queue) for _ in range(4)] + [message("t", queue, delay=60)])
    subscription = subscribe(queue)
    buried, _ = subscription.receive(limit=2, wait=0)
    subscription.settle([Settlement(buried, Verdict.BURY, reason="r")])
    empty = harness.queue()
    by_name = {state.queue: state for state in transport.queues([queue, empty])}
    state = by_name[queue]
    assert (state.ready, state.in_flight, state.delayed, state.dead) == (2, 1, 1, 1)
    assert state.oldest is not None
    assert 0 <= state.oldest < 60
    assert (by_name[empty].ready, by_name[empty].oldest) == (0, None)
    assert queue in {state.queue for state in transport.queues()}
