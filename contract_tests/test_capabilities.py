"""Capabilities: claimed ones work, and unclaimed ones are refused."""

from __future__ import annotations

import attrs
import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit
from contract_tests.messages import make_settlement, message
from contract_tests.requires import requires, skip_claimed
from unstract_core import NotSupported, Reply, Verdict


def test_transport_and_harness_claim_the_same_capabilities(kit: Kit, transport: CheckedTransport) -> None:
    """`transport.capabilities` equals `harness.capabilities`, before and after the first use of the transport."""
    assert attrs.asdict(transport.capabilities) == attrs.asdict(kit.capabilities)
    queue = kit.queue()
    transport.send([message("t", queue)])
    assert attrs.asdict(transport.capabilities) == attrs.asdict(kit.capabilities)
    kit.remaining(transport, queue, count=1)


def test_every_flag_is_true_or_false(kit: Kit) -> None:
    """Each capability is a plain bool, so that it can be printed and compared."""
    assert all(type(claimed) is bool for claimed in attrs.asdict(kit.capabilities).values())


def test_claims_do_not_contradict_each_other(kit: Kit) -> None:
    """A claim that depends on another claim is made together with it: `status` requires `replies`, for example."""
    claims = kit.capabilities
    assert claims.replies or not claims.status
    assert claims.priority or not claims.order_across_queues
    assert claims.counts_crashes or not claims.fencing, "`fencing` requires `counts_crashes`"


def test_unclaimed_within_is_refused(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """Without `transactional_send`, `send(within=...)` raises NotSupported and sends nothing."""
    skip_claimed(kit.harness, "transactional_send")
    with pytest.raises(NotSupported):
        transport.send([message("t", queue)], within=object())
    assert kit.nothing(subscribe(queue))


def test_unclaimed_delay_is_refused(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """Without `delay`, a batch with a delayed message raises NotSupported and sends nothing."""
    skip_claimed(kit.harness, "delay")
    with pytest.raises(NotSupported):
        transport.send([message("t", queue), message("t", queue, delay=1.0)])
    assert kit.nothing(subscribe(queue))


def test_unclaimed_retry_delay_is_refused(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Without `delay`, RETRY with a delay raises NotSupported; the message stays claimed and can be retried at once."""
    skip_claimed(kit.harness, "delay")
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    delivery = kit.take_one(holder)
    with pytest.raises(NotSupported):
        holder.settle([make_settlement(delivery, Verdict.RETRY, delay=1.0)])
    assert list(holder.settle([make_settlement(delivery, Verdict.RETRY)])) == [True]


def test_unclaimed_reply_request_is_refused(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Without `replies`, a message with a reply_key and the method `reply` both raise NotSupported."""
    skip_claimed(kit.harness, "replies")
    with pytest.raises(NotSupported):
        transport.send([message("t", queue, reply_key=queue)])
    with pytest.raises(NotSupported):
        transport.reply(queue)
    assert kit.nothing(subscribe(queue))


def test_unclaimed_status_read_is_refused(kit: Kit, transport: CheckedTransport) -> None:
    """Without `status`, `reply` raises NotSupported for a key that this transport never sent."""
    skip_claimed(kit.harness, "status")
    with pytest.raises(NotSupported):
        transport.reply(kit.queue())


def test_unclaimed_status_does_not_stop_a_settlement(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Without `status`, a settlement with the status of a dispatch still takes effect and sends its follow-up."""
    skip_claimed(kit.harness, "status")
    transport.send([message("t", queue, task_id=queue)])
    holder, elsewhere = subscribe(queue), kit.queue()
    settlement = make_settlement(
        kit.take_one(holder), Verdict.ACK, follow_up=message("f", elsewhere), reply=Reply(queue, "completed")
    )
    assert list(holder.settle([settlement])) == [True]
    assert len(kit.take(subscribe(elsewhere), 1)) == 1


def test_burying_without_dead_letters_removes_the_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Without `dead_letters`, BURY removes the message, and `transport.dead` is missing or raises NotSupported."""
    skip_claimed(kit.harness, "dead_letters")
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.BURY, reason="r")])) == [True]
    kit.expire(transport, queue)
    assert kit.nothing(subscribe(queue))
    with pytest.raises((NotSupported, AttributeError)):
        _ = transport.unchecked.dead.find


def test_unclaimed_inspection_is_refused(kit: Kit, transport: CheckedTransport) -> None:
    """Without `inspection`, `queues()` is missing or raises NotSupported: a count of 0 would read as "empty"."""
    skip_claimed(kit.harness, "inspection")
    with pytest.raises((NotSupported, AttributeError)):
        transport.unchecked.queues([kit.queue()])


@requires("inspection")
def test_queues_reports_counts_and_oldest_age(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`queues` counts ready, claimed and delayed messages, and returns the age of the oldest ready one."""
    transport.send([message("t", queue) for _ in range(4)])
    if kit.capabilities.delay:
        transport.send([message("t", queue, delay=60)])
    subscription = subscribe(queue)
    *_, third = kit.take(subscription, 3)
    assert subscription.settle([make_settlement(third, Verdict.RETRY)]) == [True]
    empty = kit.queue()
    states = {state.queue: state for state in transport.queues([queue, empty])}
    state = states[queue]
    assert (state.ready, state.in_flight, state.delayed) == (2, 2, int(kit.capabilities.delay))
    assert state.oldest is not None
    assert 0 <= state.oldest < 60
    assert (states[empty].ready, states[empty].oldest) == (0, None)
    assert queue in {state.queue for state in transport.queues()}


@requires("inspection")
def test_waiting_tasks_counts_ready_tasks_by_name(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`waiting_tasks` counts the task names of ready messages of one queue, and claims none.

    Claimed and delayed messages, other queues and messages without a task name are left out.
    """
    transport.send([message("held", queue)])
    kit.take_one(subscribe(queue))
    transport.send([message("a", queue), message("b", queue), message("a", queue), message("c", kit.queue())])
    if kit.capabilities.delay:
        transport.send([message("delayed", queue, delay=60)])
    for nameless in ("[]", '{"task_name": 7}', '"a"'):
        kit.inject(transport, queue, nameless)
    for _ in range(2):
        assert dict(transport.waiting_tasks(queue)) == {"a": 2, "b": 1}
    assert dict(transport.waiting_tasks(queue, limit=2)) == {"a": 1, "b": 1}
    assert dict(transport.waiting_tasks(kit.queue())) == {}


@requires("inspection", "dead_letters")
def test_queues_counts_dead_letters(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """`queues` counts dead letters, also for a queue that holds no other messages."""
    transport.send([message("t", queue), message("t", queue)])
    kit.bury(transport, queue)
    kit.bury(transport, queue)
    (state,) = transport.queues([queue])
    assert (state.ready, state.in_flight, state.dead) == (0, 0, 2)
    assert queue in {state.queue for state in transport.queues()}
