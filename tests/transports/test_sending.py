"""What `send` promises: the same payload, in order, all or nothing, and only what can be honoured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import Harness, message, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import payloads

from unstract_core import (
    Dispatcher,
    Message,
    NotSupported,
    PayloadError,
    Subscription,
    TaskPayload,
    to_wire,
)

Subscribe = Callable[..., Subscription]


def test_what_is_sent_is_what_arrives(harness: Harness) -> None:
    """A received payload equals the one sent, and what is stored is its wire form, for every payload of the wire.

    Over Celery's protocol that is its normal form: there every task has an id, so what was sent without one gets its
    reply key or a fresh UUID for one, the same that `send` returned; and the queue is the one that it was sent to.
    """
    with harness.transport() as transport:
        queue = harness.queue()
        subscription = transport.subscribe([queue], lease=60)

        @settings(max_examples=30)
        @given(payloads())
        def property_(payload: TaskPayload) -> None:
            (id,) = transport.send([Message(payload, queue)])
            (delivery,) = subscription.receive(limit=1, wait=5)
            assert delivery.problem is None
            normal = to_wire(harness.normal(payload, queue, id))
            assert to_wire(delivery.payload) == normal
            assert stored(delivery) == normal
            assert (delivery.queue, delivery.attempt) == (queue, 1)

        property_()
        subscription.close()


def test_a_batch_gives_one_id_each_and_keeps_its_order(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """`send` returns one distinct id for each message, in order, and equal priorities are first in, first out."""
    ids = transport.send([message("t", queue, number) for number in range(50)])
    assert len(set(ids)) == 50
    deliveries = harness.take(subscribe(queue), 50)
    assert [delivery.id for delivery in deliveries] == list(ids)
    assert [delivery.payload.args for delivery in deliveries if delivery.payload] == [[n] for n in range(50)]


def test_one_bad_message_keeps_the_whole_batch_back(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """All or nothing: a message that the wire refuses raises PayloadError, and none of its batch is sent."""
    batch = [message("t", queue, 1), message("t", queue, object()), message("t", queue, 3)]
    with pytest.raises(PayloadError, match=r"\$\.args\[0\]"):
        transport.send(batch)
    assert harness.has_nothing(subscribe(queue))


def test_a_string_of_300_megabytes_is_refused_by_its_path(harness: Harness, transport: Any, queue: str) -> None:
    """What is too large to be carried raises PayloadError that says where it stands; nothing is sent."""
    with pytest.raises(PayloadError, match="larger than") as caught:
        Dispatcher(transport).send("t", kwargs={"doc": {"pages": ["fits", "x" * 300_000_000]}}, queue=queue)
    assert caught.value.path == "$.kwargs.doc.pages[1]"
    assert harness.has_left(transport, 0, queue)


def test_an_empty_batch_sends_nothing(transport: Any) -> None:
    """Sending no messages is no error."""
    assert list(transport.send([])) == []


@pytest.mark.parametrize(
    "options",
    [{"priority": 0}, {"priority": 11}, {"priority": True}, {"delay": -1}, {"delay": float("nan")}, {"delay": 1e300}],
)
def test_a_priority_or_delay_that_nobody_honours_is_refused(transport: Any, queue: str, options: Any) -> None:
    """A priority outside 1..10, and a delay that is negative or not finite, raise PayloadError."""
    with pytest.raises(PayloadError):
        transport.send([message("t", queue, **options)])


def test_org_and_priority_travel_with_the_message(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """A delivery tells the organisation and the priority that the message was sent with."""
    transport.send([message("t", queue, org_id="org-1", priority=9), message("t", queue)])
    received = harness.take(subscribe(queue), 2)
    assert sorted((one.org_id, one.priority) for one in received) == [("", 5), ("org-1", 9)]


@pytest.mark.needs("delay")
def test_a_delayed_message_waits_for_its_time(transport: Any, queue: str, subscribe: Subscribe) -> None:
    """A message with a delay is not delivered before it, is delivered soon after it, and as attempt 1."""
    transport.send([message("t", queue, delay=0.4)])
    subscription = subscribe(queue)
    assert not subscription.receive(limit=1, wait=0.1)
    (delivery,) = subscription.receive(limit=1, wait=5)
    assert delivery.attempt == 1


def test_later_changes_to_the_callers_objects_do_not_reach_the_message(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe
) -> None:
    """What was sent is a copy."""
    argument: dict[str, Any] = {"list": [1]}
    transport.send([message("t", queue, argument)])
    argument["list"].append(2)
    (delivery,) = harness.take(subscribe(queue), 1)
    assert delivery.payload is not None
    assert delivery.payload.args == [{"list": [1]}]


def test_within_is_refused_where_it_is_not_claimed(transport: Any, queue: str) -> None:
    """A transport that does not claim transactional_send raises NotSupported for `within`, and sends nothing."""
    if transport.capabilities.transactional_send:
        with pytest.raises(Exception, match="cursor"):
            transport.send([message("t", queue)], within=object())
    else:
        with pytest.raises(NotSupported):
            transport.send([message("t", queue)], within=object())


@settings(max_examples=20)
@given(names=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=3))
def test_any_name_that_the_wire_allows_is_a_queue(harness: Harness, names: list[str]) -> None:
    """Queue names are text: quotes, spaces, percent signs and every script work alike, or are refused on sending."""
    with harness.transport() as transport:
        queues = [harness.queue(name) for name in dict.fromkeys(names)]
        accepted = []
        for queue in queues:
            try:
                transport.send([message("t", queue, queue)])
            except PayloadError:
                assert not harness.names(queue)
            else:
                assert harness.names(queue)
                accepted.append(queue)
        if accepted:
            subscription = transport.subscribe(accepted, lease=60)
            deliveries = harness.take(subscription, len(accepted), limit=10)
            subscription.close()
            told = [str(delivery.payload.args[0]) for delivery in deliveries if delivery.payload]
            assert sorted(told) == sorted(accepted)
