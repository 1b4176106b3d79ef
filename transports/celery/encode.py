"""Celery's message protocol 2, outgoing: what a payload of ours looks like on the broker.

The bytes are those of `app.send_task(task_name, args, kwargs, queue=..., task_id=..., link=..., link_error=...)`, as
the current Celery writes them (docs.celeryq.dev, "Message Protocol", version 2): a header for each fact about the task,
and a body of args, kwargs and callbacks. What Celery has no place for travels as a header of its own, after Celery's:
fairness as `x-fairness-key`, as the product sends it, an organisation without fairness as `x-org-id`, and `headers`
as `x-wire-headers`; those of them that are a trace's context stand beside it as well, where Celery's users look for it.

`reply_to` is the address of an answer where one is wanted, and empty where none is.
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
"""The names of a message's headers that are Celery's; a client's own have other names, or stand in `headers`."""
BROKERS_HEADERS = re.compile(
    r"x-(death|(first|last)-death-.*|dead-.*|delivery-count|acquired-count|delay|opt-.*)|redelivered|CC|BCC"
)
"""The names of headers by which a broker, or the keeper of dead letters, notes what becomes of a message."""
DEAD_SUFFIX = ".dead"
LONGEST_QUEUE = 255 - len(DEAD_SUFFIX)
UNSET_PRIORITY = 0
"""The priority that Celery writes for a message without one."""


@attrs.frozen
class Outgoing:
    """A message to publish: to the default exchange, with the queue's name as the routing key.

    `body` is serialised as JSON by kombu, unless `content_type` says that it is serialised already.
    """

    queue: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: Any
    content_type: str | None = None
    content_encoding: str | None = None
    compression: str | None = None
    """How kombu compresses a body that it serialises; None for a body that stays as it is."""
    declared: bool = True
    """Whether its queue is ours to declare; a reply's is not, and may be gone."""
    lives: float | None = None
    """Seconds after which its queue may be removed, where a broker keeps unread queues; None for never."""

    @property
    def id(self) -> str:
        return str(self.headers.get("id") or self.properties.get("correlation_id"))


@attrs.frozen
class Lineage:
    """Where a task comes from: the ids of its parent and of the first of its line, and its place in a group."""

    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None


def task_message(
    message: Message,
    *,
    reply_to: str = "",
    ranked: bool = False,
    retries: int = 0,
    lineage: Lineage = Lineage(),
) -> Outgoing:
    """Write a message for Celery; `ranked` says that its queue keeps priorities. Raises PayloadError as `to_wire`.

    Without a task_id of its own the task gets the reply key, or a fresh UUID, for its id.
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
    task_id = wire.get("task_id") or wire.get("reply_key") or str(uuid.uuid4())
    return write_task(
        wire["task_name"],
        wire["args"],
        wire["kwargs"],
        queue=message.queue,
        task_id=task_id,
        callbacks=_signatures(wire.get("on_success")),
        errbacks=_signatures(wire.get("on_error")),
        correlation_id=wire.get("reply_key") or task_id,
        reply_to=reply_to,
        priority=message.priority if ranked or message.priority != DEFAULT_PRIORITY else None,
        eta=eta_of(message.delay),
        retries=retries,
        lineage=lineage,
        headers=headers,
    )


def write_task(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    queue: str,
    task_id: str,
    callbacks: list[Any] | None = None,
    errbacks: list[Any] | None = None,
    correlation_id: str | None = None,
    reply_to: str = "",
    priority: int | None = None,
    eta: str | None = None,
    retries: int = 0,
    lineage: Lineage = Lineage(),
    headers: Mapping[str, Any] | None = None,
) -> Outgoing:
    """Write a task, its headers in Celery's order. Raises PayloadError for a queue that no broker keeps."""
    check_queue(queue)
    properties = {"correlation_id": correlation_id or task_id, "reply_to": reply_to}
    if priority is not None:
        properties["priority"] = priority  # type: ignore[assignment]  # kombu's properties are of any type
    return Outgoing(
        queue=queue,
        headers={
            "lang": "py",
            "task": name,
            "id": task_id,
            "shadow": None,
            "eta": eta,
            "expires": None,
            "group": lineage.group,
            "group_index": lineage.group_index,
            "retries": retries,
            "timelimit": [None, None],
            "root_id": lineage.root_id or task_id,
            "parent_id": lineage.parent_id,
            "argsrepr": saferepr(args or ()),
            "kwargsrepr": saferepr(kwargs),
            "origin": f"gen{os.getpid()}@{socket.gethostname()}",
            "ignore_result": None,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
            **(headers or {}),
        },
        properties=properties,
        body=(args or (), kwargs, {"callbacks": callbacks, "errbacks": errbacks, "chain": None, "chord": None}),
    )


def check_queue(name: str) -> None:
    """Raise PayloadError for a name that is no queue's: RabbitMQ drops line breaks, and dead letters add to it."""
    if "\r" in name or "\n" in name:
        raise PayloadError("a broker's queue cannot have a line break in its name", path="$.queue")
    if len(name.encode()) > LONGEST_QUEUE:
        raise PayloadError(f"a broker's queue cannot have a name of more than {LONGEST_QUEUE} bytes", path="$.queue")


def eta_of(delay: float) -> str | None:
    """Return the moment `delay` seconds from now as Celery writes it; None for no delay."""
    if not delay:
        return None
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=delay)).isoformat()


def _signatures(continuation: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    if continuation is None:
        return None
    signature = {
        "task": continuation["task_name"],
        "args": [],
        "kwargs": continuation["kwargs"],
        "options": {"queue": continuation["queue"]},
        "subtask_type": None,
        "immutable": False,
    }
    return [signature]
