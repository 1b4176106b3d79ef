"""The wire: payloads arrive unchanged; invalid ones are refused, and unreadable ones delivered with a problem."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit
from contract_tests.messages import first, make_settlement, message, newer, parsed
from contract_tests.profiles import examples
from contract_tests.requires import requires
from contract_tests.strategies import json_values, payloads
from unstract_core import Dispatcher, Message, PayloadError, TaskPayload, Verdict, to_wire


def normal(sent: TaskPayload, arrived: TaskPayload | None, id: str) -> dict[str, Any]:
    """Return the expected wire form of a payload.

    On some wires every task has an id. Then a payload without id gets the one that `send` returned, or its reply key.
    """
    given = sent.task_id or (arrived.task_id if arrived is not None else None)
    assert sent.task_id or given in (None, id, sent.reply_key)
    return to_wire(attrs.evolve(sent, task_id=given))


def test_a_payload_arrives_as_it_was_sent(kit: Kit) -> None:
    """A received payload equals the sent payload, for every payload of the wire, as attempt 1 of its queue."""
    with kit.open() as transport:
        queue = kit.queue()
        subscription = transport.subscribe([queue], lease=60)

        @examples(40)
        @given(payloads(queue=queue))
        def property_(payload: TaskPayload) -> None:
            if payload.reply_key is not None and not kit.capabilities.replies:
                payload = attrs.evolve(payload, reply_key=None)
            (id,) = transport.send([Message(payload, queue)])
            delivery = kit.take_and_acknowledge(subscription)
            assert delivery.problem is None
            wire = normal(payload, delivery.payload, id)
            assert delivery.payload is not None
            assert exact(to_wire(delivery.payload)) == exact(wire)
            assert (delivery.id, delivery.queue, delivery.attempt) == (id, queue, 1)

        property_()
        subscription.close()


def test_every_json_value_arrives_with_its_type(kit: Kit) -> None:
    """Ints stay ints, floats stay floats to the last bit, and strings, keys and dicts stay complete."""
    with kit.open() as transport:
        queue = kit.queue()
        subscription = transport.subscribe([queue], lease=60)

        @examples(60)
        @given(json_values)
        def property_(value: Any) -> None:
            transport.send([message("t", queue, value, kwargs={"keyword": value})])
            payload = kit.take_and_acknowledge(subscription).payload
            assert payload is not None
            assert exact(payload.args) == exact([value])
            assert exact(payload.kwargs) == exact({"keyword": value})

        property_()
        subscription.close()


def exact(value: Any) -> Any:
    """Return a value as text in which 1, 1.0 and True differ, independent of the order of keys."""
    return json.dumps(value, sort_keys=True)


def test_messages_are_stored_as_wire_json(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Each stored message is a JSON object of the wire, readable by other programs."""
    sent = [
        message("t", queue, {"n": n}, reply_key=f"{queue}{n}" if kit.capabilities.replies else None) for n in range(3)
    ]
    transport.send(sent)
    assert [parsed(raw) for raw in kit.stored(transport, queue)] == [to_wire(one.payload) for one in sent]
    received = kit.take(subscribe(queue), 3)
    assert [parsed(one.raw) for one in received] == [to_wire(one.payload) for one in sent]
    foreign = newer(queue, new={"x": None})
    kit.inject(transport, queue, foreign)
    assert parsed(kit.take_one(subscribe(queue)).raw) == parsed(foreign)


def test_a_redelivery_repeats_the_message_unchanged(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A redelivery has the same id, payload, raw message, organisation and priority, and keeps unknown keys."""
    kit.inject(transport, queue, newer(queue, 1, task_id="i", new={"x": 1}))
    holder = subscribe(queue)
    before = kit.take_one(holder)
    holder.close()
    kit.expire(transport, queue)
    again = kit.take_one(subscribe(queue))
    assert (again.id, again.payload, again.org_id, again.priority) == (
        before.id,
        before.payload,
        before.org_id,
        before.priority,
    )
    assert parsed(again.raw) == parsed(before.raw)
    assert (again.problem, before.problem) == (None, None)


def test_unknown_keys_are_ignored(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A message with unknown keys, as a newer version may write them, can be read."""
    kit.inject(transport, queue, newer(queue, new={"x": 1}))
    assert kit.take_one(subscribe(queue)).problem is None


ROWS: dict[str, dict[str, Any]] = {
    "queue null": {"queue": None},
    "args null": {"args": None},
    "kwargs null": {"kwargs": None},
    "every optional key null": dict.fromkeys(["reply_key", "on_success", "on_error", "task_id", "headers", "fairness"]),
    "fairness partial": {"fairness": {"org_id": None, "workload_type": None}},
    "fairness odd": {"fairness": {"org_id": 7, "workload_type": "batch", "pipeline_priority": "high"}},
    "callback kwargs null": {"on_error": {"task_name": "failed", "queue": "callbacks", "kwargs": None}},
}
"""Values that other programs have written into rows, instead of the values that this package writes."""


def test_rows_with_null_or_missing_members_are_read(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Only the task name is required: a missing queue is the queue that holds the message, other fields are empty."""
    whole = to_wire(message("t", queue).payload)
    rows = [{**whole, **changed} for changed in ROWS.values()]
    rows += [{key: value for key, value in whole.items() if key != left_out} for left_out in whole][1:]
    rows.append({"task_name": "t"})
    for row in rows:
        kit.inject(transport, queue, json.dumps(row))
    for row, delivery in zip(rows, kit.take(subscribe(queue), len(rows)), strict=True):
        assert delivery.payload is not None, (row, delivery.problem)
        assert (delivery.payload.task_name, delivery.payload.queue) == ("t", queue), row
        assert (delivery.payload.args, delivery.payload.kwargs) == ([], {}), row


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", '{"task_name": "t", "queue": "q", "kwargs": "x"}', '{"task_name": 1}']
)
def test_an_unreadable_message_is_delivered_with_its_problem(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, text: str
) -> None:
    """Malformed JSON arrives with `payload` None and a `problem`; messages beside it arrive as usual."""
    transport.send([message("t", queue, 1)])
    kit.inject(transport, queue, text)
    transport.send([message("t", queue, 2)])
    before, broken, after = kit.take(subscribe(queue), 3, limit=10)
    assert (broken.payload, bool(broken.problem)) == (None, True)
    assert before.payload is not None
    assert after.payload is not None


def test_later_changes_do_not_reach_the_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`send` copies the payload: later changes to the caller's objects do not reach the message."""
    argument: dict[str, Any] = {"list": [1]}
    transport.send([message("t", queue, argument)])
    argument["list"].append(2)
    payload = kit.take_one(subscribe(queue)).payload
    assert payload is not None
    assert payload.args == [{"list": [1]}]


def test_send_does_not_change_its_arguments(kit: Kit) -> None:
    """`send` does not modify its arguments: the caller may use the same dict for the next message."""
    with kit.open() as transport:
        queue = kit.queue()

        @examples(15)
        @given(st.lists(payloads(awaits="both", queue=queue), min_size=1, max_size=3))
        def property_(sent: list[TaskPayload]) -> None:
            before = [json.dumps(to_wire(payload)) for payload in sent]
            transport.send([Message(payload, queue) for payload in sent])
            assert [json.dumps(to_wire(payload)) for payload in sent] == before

        property_()
        kit.remaining(transport, queue)


@requires("priority")
def test_org_and_priority_travel_with_the_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A delivery has the organisation and the priority of its message."""
    transport.send([message("t", queue, org_id="org-1", priority=9), message("t", queue)])
    received = kit.take(subscribe(queue), 2)
    assert [(one.org_id, one.priority) for one in received] == [("org-1", 9), ("", 5)]


def test_a_large_message_arrives_whole(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A message of several megabytes arrives complete."""
    text = "0123456789abcdeé" * 262144
    transport.send([message("t", queue, text)])
    payload = kit.take_one(subscribe(queue)).payload
    assert payload is not None
    assert payload.args == [text]


def test_an_oversized_string_is_refused_with_its_path(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """A string of 300 MB raises PayloadError with its path, and nothing is sent."""
    with pytest.raises(PayloadError, match="larger than") as caught:
        Dispatcher(transport).send("t", kwargs={"doc": {"pages": ["fits", "x" * 300_000_000]}}, queue=queue)
    assert caught.value.path == "$.kwargs.doc.pages[1]"
    assert not kit.remaining(transport, queue)


@pytest.mark.parametrize("how", ["lost", "released", "retried"])
def test_redelivery_keeps_organisation_and_priority(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, how: str
) -> None:
    """Organisation, priority, id and payload stay the same at every delivery, however the last one ended."""
    transport.send([message("t", queue, {"n": 1}, org_id="org-1", priority=8, task_id=queue)])
    holder = subscribe(queue)
    before = kit.take_one(holder)
    if how == "lost":
        holder.close()
        kit.expire(transport, queue)
    else:
        settlement = make_settlement(before, Verdict.RETRY, counted=how == "retried")
        assert list(holder.settle([settlement])) == [True]
    again = kit.take_one(subscribe(queue) if how == "lost" else holder)
    assert (again.id, again.org_id, again.payload) == (before.id, "org-1", before.payload)
    if kit.capabilities.priority:
        assert again.priority == 8


@requires("delay")
def test_a_delay_does_not_change_the_message(transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A delayed message arrives with the same payload, organisation and priority."""
    transport.send([message("t", queue, 1, org_id="org-1", priority=8, delay=0.2)])
    (delivery,) = subscribe(queue).receive(limit=1, wait=20)
    assert (first(delivery), delivery.org_id) == (1, "org-1")
    if transport.capabilities.priority:
        assert delivery.priority == 8
