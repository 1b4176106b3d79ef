"""What the tests send: messages, continuations, and what is stored of them."""

from __future__ import annotations

import json
from typing import Any

from unstract_core import ContinuationSpec, Delivery, Message, TaskPayload, to_wire

_OWN = ("org_id", "priority", "delay")


def message(task_name: str, queue: str, /, *args: Any, **options: Any) -> Message:
    """Return a message whose payload has these args; what is not a Message's own goes into the payload."""
    own = {name: options.pop(name) for name in _OWN if name in options}
    return Message(TaskPayload(task_name=task_name, args=list(args), queue=queue, **options), queue, **own)


def newer(queue: str, *args: Any, **members: Any) -> str:
    """Return the JSON of a message to a queue as a newer writer might write it, with members that nobody knows yet."""
    return json.dumps({**to_wire(message("t", queue, *args).payload), **members})


def then(task_name: str, queue: str, **kwargs: Any) -> ContinuationSpec:
    return ContinuationSpec(task_name=task_name, kwargs=kwargs, queue=queue)


def first(delivery: Delivery) -> Any:
    """Return the first argument of a delivered task: what tells the tests' messages apart."""
    assert delivery.payload is not None, delivery.problem
    return delivery.payload.args[0]


def parsed(raw: Any) -> Any:
    """Return what a transport stores, parsed."""
    return json.loads(raw) if isinstance(raw, str | bytes) else raw
