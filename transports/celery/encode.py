"""Celery's message protocol 2, outgoing: payloads as messages of a broker.

The bytes are those of `app.send_task(task_name, args, kwargs, queue=..., task_id=..., link=..., link_error=...)` of the
current Celery (docs.celeryq.dev, "Message Protocol", version 2). A message has a header for each property of the task,
and a body of args, kwargs and callbacks. Members of a payload that Celery does not have are headers after Celery's own.

| member | header |
| --- | --- |
| fairness | `x-fairness-key`, as the product sends it |
| an organisation without fairness | `x-org-id` |
| headers | `x-wire-headers`; the context of a trace also under its own names, where instrumentation reads it |
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from transports.celery.saferepr import saferepr
from unstract_core.errors import PayloadError
from unstract_core.payload import DEFAULT_PRIORITY
from unstract_core.producer.executor import FAIRNESS_HEADER
from unstract_core.transport import Message, write_message

ORG_HEADER = "x-org-id"
HEADERS_HEADER = "x-wire-headers"
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")
"""The names of W3C's trace context and baggage."""
CELERYS_HEADERS = frozenset(
    {"lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"}
    | {"parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"}
    | {"stamps", "compression", "headers"}
)
"""The names of Celery's headers. A client's own headers have other names, or are members of `headers`."""
BROKERS_HEADERS = re.compile(
    r"x-(death|(first|last)-death-.*|dead-.*|delivery-count|acquired-count|delay|opt-.*)|redelivered|CC|BCC"
)
"""The names of headers that a broker or the dead letters add to a message."""
DEAD_SUFFIX = ".dead"
LONGEST_QUEUE = 255 - len(DEAD_SUFFIX)
UNSET_PRIORITY = 0
"""The priority that Celery writes for a message without one."""


@attrs.frozen
class Outgoing:
    """A message to publish: to the default exchange, with the queue's name as the routing key."""

    queue: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    #: The body. kombu serialises it as JSON, unless `content_type` is set: then it is serialised already.
    body: Any
    content_type: str | None = None
    content_encoding: str | None = None
    #: The compression of a body that kombu serialises; None for none.
    compression: str | None = None
    #: Whether the transport declares its queue. A reply queue belongs to its reader, and may no longer exist.
    declared: bool = True
    #: The time in seconds after which its unread queue may be removed, on brokers that keep such queues; None: never.
    queue_ttl: float | None = None

    @property
    def id(self) -> str:
        return str(self.headers.get("id") or self.properties.get("correlation_id"))


@attrs.frozen
class Lineage:
    """The tasks from which a task follows; None for parts that it does not have."""

    #: The id of the first task of its chain of callbacks.
    root_id: str | None = None
    parent_id: str | None = None
    #: The id of its group.
    group: str | None = None
    #: Its position in its group.
    group_index: int | None = None


@attrs.frozen(kw_only=True)
class TaskMessage:
    """A task in the terms of Celery's protocol."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    queue: str
    task_id: str
    #: The signatures that Celery calls with the result; None for none.
    callbacks: list[Any] | None = None
    #: The signatures that Celery calls after a failure; None for none.
    errbacks: list[Any] | None = None
    #: The id under which the answer is sent; None for the task's id.
    correlation_id: str | None = None
    #: The reply queue; "" if no answer is wanted.
    reply_to: str = ""
    #: None leaves the priority to Celery's default.
    priority: int | None = None
    #: The time in seconds before which the task is not started; 0 for none.
    delay: float = 0.0
    lineage: Lineage = Lineage()
    #: The headers after Celery's own.
    headers: Mapping[str, Any] = attrs.field(factory=dict)


def task_message(message: Message, *, reply_to: str = "", with_priority: bool = False) -> Outgoing:
    """Return the message of Celery's protocol for a message of the core (`task_of`, `write_task`)."""
    return write_task(task_of(message, reply_to=reply_to, with_priority=with_priority))


def task_of(
    message: Message, *, reply_to: str = "", with_priority: bool = False, lineage: Lineage = Lineage()
) -> TaskMessage:
    """Return the task of a message. Without a task id it gets the reply key, or a new UUID, as its id.

    Args:
        message: The message.
        reply_to: The reply queue; "" (default) if no answer is wanted.
        with_priority: Whether the queue keeps priorities. Else the default priority is not written.
        lineage: The tasks from which it follows; none by default.

    Raises:
        PayloadError: The wire refuses a part of the message.
    """
    wire = write_message(message)
    headers = {}
    if wire["fairness"] is not None:
        headers[FAIRNESS_HEADER] = wire["fairness"]
    if message.org_id and message.org_id != (wire["fairness"] or {}).get("org_id"):
        headers[ORG_HEADER] = message.org_id
    if "headers" in wire:
        headers[HEADERS_HEADER] = wire["headers"]
        headers |= {name: wire["headers"][name] for name in TRACE_HEADERS if name in wire["headers"]}
    signatures = {
        name: [
            {
                "task": wire[name]["task_name"],
                "args": [],
                "kwargs": wire[name]["kwargs"],
                "options": {"queue": wire[name]["queue"]},
                "subtask_type": None,
                "immutable": False,
            }
        ]
        for name in ("on_success", "on_error")
        if wire.get(name) is not None
    }
    task_id = wire.get("task_id") or wire.get("reply_key") or str(uuid.uuid4())
    return TaskMessage(
        name=wire["task_name"],
        args=wire["args"],
        kwargs=wire["kwargs"],
        queue=message.queue,
        task_id=task_id,
        callbacks=signatures.get("on_success"),
        errbacks=signatures.get("on_error"),
        correlation_id=wire.get("reply_key"),
        reply_to=reply_to,
        priority=message.priority if with_priority or message.priority != DEFAULT_PRIORITY else None,
        delay=message.delay,
        lineage=lineage,
        headers=headers,
    )


def write_task(task: TaskMessage) -> Outgoing:
    """Return the message of a task, with its headers in Celery's order.

    Raises:
        PayloadError: No broker has a queue of that name.
    """
    check_queue(task.queue)
    properties: dict[str, Any] = {"correlation_id": task.correlation_id or task.task_id, "reply_to": task.reply_to}
    if task.priority is not None:
        properties["priority"] = task.priority
    args = task.args or ()
    embed = {"callbacks": task.callbacks, "errbacks": task.errbacks, "chain": None, "chord": None}
    return Outgoing(
        queue=task.queue,
        headers={
            "lang": "py",
            "task": task.name,
            "id": task.task_id,
            "shadow": None,
            "eta": eta_of(task.delay),
            "expires": None,
            "group": task.lineage.group,
            "group_index": task.lineage.group_index,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": task.lineage.root_id or task.task_id,
            "parent_id": task.lineage.parent_id,
            "argsrepr": saferepr(args),
            "kwargsrepr": saferepr(task.kwargs),
            "origin": f"gen{os.getpid()}@{socket.gethostname()}",
            "ignore_result": None,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
            **task.headers,
        },
        properties=properties,
        body=(args, task.kwargs, embed),
    )


def check_queue(name: str) -> None:
    """Raise PayloadError for a name that no queue can have: RabbitMQ drops line breaks, and `.dead` must still fit."""
    if "\r" in name or "\n" in name:
        raise PayloadError("a broker's queue cannot have a line break in its name", path="$.queue")
    if len(name.encode()) > LONGEST_QUEUE:
        raise PayloadError(f"a broker's queue cannot have a name of more than {LONGEST_QUEUE} bytes", path="$.queue")


def eta_of(delay: float) -> str | None:
    """Return the time `delay` seconds from now as Celery writes it; None for a delay of 0."""
    if not delay:
        return None
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=delay)).isoformat()
