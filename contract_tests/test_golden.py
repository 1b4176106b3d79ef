"""The golden corpus over the transport: every message that was ever written is delivered with its values.

The tests send no continuations, because their queues may belong to another program.
"""

from __future__ import annotations

from typing import Any

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.golden_corpus import Readable, equal, wire_messages
from contract_tests.kit import Kit
from contract_tests.messages import make_settlement
from unstract_core import Consumer, Verdict, to_wire

GOLDEN = [
    one
    for one in wire_messages()
    if isinstance(one, Readable) and isinstance(one.raw, str) and one.reads_as is not None and "\\u" not in one.raw
]
"""Messages that can be read and written again, without escapes: not every store can hold NUL or surrogates."""
WITHOUT_QUEUE = [one for one in wire_messages() if isinstance(one, Readable) and one.refused_at == "$.queue"]
"""Rows without a valid `queue`."""


def test_every_golden_message_is_delivered_as_it_reads(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Each golden message, stored as it was written, arrives with its task, values and addresses."""
    chosen = [one for one in GOLDEN if kit.capabilities.replies or "reply_key" not in (one.reads_as or {})]
    for one in chosen:
        kit.inject(transport, queue, str(one.raw))
    subscription = subscribe(queue)
    for one, delivery in zip(chosen, kit.take(subscription, len(chosen)), strict=True):
        assert delivery.problem is None, (one.name, delivery.problem)
        assert delivery.payload is not None
        expected: dict[str, Any] = dict(one.reads_as or {})
        found = to_wire(delivery.payload)
        for wire in (expected, found):
            del wire["queue"]  # some wires do not carry it; the delivery has the queue of the row
        if "task_id" not in expected:
            found.pop("task_id", None)  # some wires give an id to each message
        assert equal(found, expected), one.name
        assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]


def test_a_missing_queue_is_filled_in_on_delivery(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A message whose `queue` is absent, null or not a string is delivered with the queue that holds it."""
    for one in WITHOUT_QUEUE:
        kit.inject(transport, queue, str(one.raw))
    subscription = subscribe(queue)
    for one, delivery in zip(WITHOUT_QUEUE, kit.take(subscription, len(WITHOUT_QUEUE)), strict=True):
        assert delivery.payload is not None, (one.name, delivery.problem)
        assert (delivery.queue, delivery.payload.queue) == (queue, queue)
        assert equal([delivery.payload.args, delivery.payload.kwargs], [one.args, one.kwargs]), one.name
        to_wire(delivery.payload)
        assert list(subscription.settle([make_settlement(delivery, Verdict.ACK)])) == [True]


def test_the_golden_corpus_runs_through_the_consumer(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """The consumer runs each golden message without receiver once, with its args and kwargs."""
    awaited = ("on_success", "on_error", "reply_key")
    chosen = [one for one in GOLDEN if not any(key in (one.reads_as or {}) for key in awaited)]
    ran: list[tuple[str, list[Any], dict[str, Any]]] = []
    tasks = {
        name: lambda *args, name=name, **kwargs: ran.append((name, list(args), kwargs))
        for name in {str((one.reads_as or {})["task_name"]) for one in chosen}
    }
    for one in chosen:
        kit.inject(transport, queue, str(one.raw))
    consumer = Consumer(transport, tasks, [queue])
    kit.drain(consumer, timeout=30)
    assert len(ran) == len(chosen)
    for one in chosen:  # in any order: a released message may be run last
        wanted: dict[str, Any] = one.reads_as or {}
        same = [
            n
            for n, (name, args, kwargs) in enumerate(ran)
            if name == wanted["task_name"] and equal(args, one.args) and equal(kwargs, one.kwargs)
        ]
        assert same, one.name
        del ran[same[0]]
