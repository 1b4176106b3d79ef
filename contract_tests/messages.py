"""Helpers that build and read the messages, continuations and settlements of the tests."""

from __future__ import annotations

import json
from typing import Any

import attrs

from unstract_core import ContinuationSpec, Delivery, Message, Settlement, TaskPayload, Verdict, to_wire

_OWN = ("org_id", "priority", "delay")


def message(task_name: str, queue: str, /, *args: Any, **options: Any) -> Message:
    """Return a message with these args. Options that are not fields of Message are set in its payload."""
    own = {name: options.pop(name) for name in _OWN if name in options}
    return Message(TaskPayload(task_name=task_name, args=list(args), queue=queue, **options), queue, **own)


def newer(queue: str, *args: Any, **members: Any) -> str:
    """Return the JSON of a message with additional `members`, as a newer version might write it."""
    return json.dumps({**to_wire(message("t", queue, *args).payload), **members})


def then(task_name: str, queue: str, **kwargs: Any) -> ContinuationSpec:
    return ContinuationSpec(task_name=task_name, kwargs=kwargs, queue=queue)


def make_settlement(delivery: Delivery, verdict: Verdict, *args: Any, **options: Any) -> Settlement:
    """Return a settlement with the outcome that the consumer would give it, and without an error type.

    Args:
        delivery: The delivery to settle.
        verdict: RETRY has no outcome. BURY is a failure, and ACK a success, unless there is a reply.
        args: Other arguments of Settlement.
        options: Other arguments of Settlement. A reply decides the outcome by its status.
    """
    made = Settlement(delivery, verdict, *args, **options)
    if verdict is Verdict.RETRY:
        return made
    failed = made.reply.status == "failed" if made.reply is not None else verdict is Verdict.BURY
    if not failed:
        return attrs.evolve(made, outcome="success")
    error = made.reply.error if made.reply is not None else made.reason
    return attrs.evolve(made, outcome="failure", error_message=error)


def first(delivery: Delivery) -> Any:
    """Return the first argument of a delivered task. The tests use it to identify their messages."""
    assert delivery.payload is not None, delivery.problem
    return delivery.payload.args[0]


def parsed(raw: Any) -> Any:
    """Return a stored message as a parsed JSON value."""
    return json.loads(raw) if isinstance(raw, str | bytes) else raw
