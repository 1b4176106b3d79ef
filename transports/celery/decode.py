"""Celery's message protocol 2, incoming: a broker's message as a payload of the wire, with Celery's own options.

The decoder is as tolerant as Celery's. If a message cannot be read, or needs an unsupported feature, it becomes a
delivery with its problem; the decoder still reads the address of its sender. Nothing is unpickled: bodies are JSON,
with the values of the wire (docs/wire.md), so that a UUID is text.

The wire has one continuation for each outcome. A Celery message may have several links (`links`): the payload has only
the first.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import kombu
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import loads

from transports.celery.amqp_frame_patches import UNREADABLE
from transports.celery.client_headers import client_headers
from transports.celery.compression import NotDecompressed, readable_body
from transports.celery.encode import ORG_HEADER, UNSET_PRIORITY
from transports.celery.fields import MessageProblem, json_type, moment_of, name_of, retries_of
from transports.celery.links import link_queue, read_callbacks, read_errbacks
from unstract_core.codec import from_wire
from unstract_core.errors import MalformedPayload, PayloadError
from unstract_core.payload import DEFAULT_PRIORITY, HIGHEST_PRIORITY, TaskPayload
from unstract_core.producer.executor import FAIRNESS_HEADER
from unstract_core.transport import Delivery
from unstract_core.values import normalise_members

_JSON = frozenset({"application/json"})
COUNT_HEADER = "x-delivery-count"
"""The header in which a quorum queue counts the earlier deliveries of a message."""


@attrs.frozen
class Envelope:
    """A message as it was read."""

    #: The payload on the wire, with its readable parts.
    raw: dict[str, Any]
    #: The payload; None if there is a problem.
    payload: TaskPayload | None
    #: The reason why the message cannot be run; None if it can.
    problem: str | None
    id: str | None
    correlation_id: str | None
    #: The queue for the answer; "" if the sender wants none.
    reply_to: str
    root_id: str | None
    #: Celery's signatures, as they were received.
    callbacks: tuple[dict[str, Any], ...]
    #: Celery's signatures, without the parts that cannot be sent.
    errbacks: tuple[dict[str, Any], ...]
    retries: int
    attempt: int
    #: The time before which the task is not started; None for now.
    eta: datetime.datetime | None
    #: The time after which the task is not started; None for no limit.
    expires: datetime.datetime | None
    org_id: str
    priority: int
    #: The three parts of the body: args, kwargs and embed; None if they are malformed.
    body: tuple[Any, Any, Any] | None
    #: Kind, queue and task of each link after the first of its kind.
    further_continuations: tuple[tuple[str, str, str], ...] = ()
    #: The paths of the parts of errbacks that cannot be sent.
    dropped: tuple[str, ...] = ()

    def delivery(self, id: str, queue: str) -> Delivery:
        """Return the message as a delivery of `queue` with this id."""
        return Delivery(
            id,
            queue,
            self.attempt,
            self.payload,
            self.raw,
            self.problem,
            self.org_id,
            self.priority,
            self.expires,
            further_continuations=self.further_continuations,
        )


@attrs.frozen
class Received:
    """A message as it was received, and as it was read."""

    message: kombu.Message
    envelope: Envelope
    queue: str


def read_message(message: kombu.Message, queue: str, *, default_queue: str, time_limits: bool = False) -> Envelope:
    """Read a message. Never raises: the envelope has the problem of a message that cannot be run.

    Args:
        message: The message. queue: The queue that it was received from. default_queue: The queue of links that name
        none. time_limits: Whether a task with a time limit is accepted, although the limit is not enforced. By default
        it is a
            problem.
    """
    reading = _Reading(message, queue, default_queue, time_limits)
    problem = None
    try:
        reading.read()
    except MessageProblem as exc:
        problem = str(exc)
    except Exception as exc:  # a header of an unforeseen kind
        problem = f"unreadable ({type(exc).__name__})"
    return reading.envelope(problem)


class _Reading:
    """One message being read; its fields have the parts that could be read before an error."""

    def __init__(self, message: kombu.Message, queue: str, default_queue: str, time_limits: bool) -> None:
        self.message = message
        self.queue = queue
        self.default_queue = default_queue
        self.time_limits = time_limits
        self.headers: Mapping[str, Any] = message.headers if isinstance(message.headers, Mapping) else {}
        self.properties: Mapping[str, Any] = message.properties or {}
        self.body: tuple[Any, Any, Any] | None = None
        self.callbacks: tuple[dict[str, Any], ...] = ()
        self.errbacks: tuple[dict[str, Any], ...] = ()
        self.dropped: tuple[str, ...] = ()
        self.payload: TaskPayload | None = None
        self.correlation_id = name_of(self.properties.get("correlation_id"))
        self.id = name_of(self.headers.get("id"))
        self.reply_to = name_of(self.properties.get("reply_to")) or ""
        self.eta: datetime.datetime | None = None
        self.expires: datetime.datetime | None = None
        self.raw: dict[str, Any] = {"queue": queue}

    def read(self) -> None:
        problems = self._read_body()
        headers = self.headers
        fairness = headers.get(FAIRNESS_HEADER)
        self.raw["fairness"] = fairness
        if (carried := client_headers(headers)) is not None:
            self.raw["headers"] = carried
        self._read_addresses()
        if "task" in headers:
            self.raw["task_name"] = headers["task"]
        if problems:
            raise MessageProblem(problems)
        if not self.id:
            raise MessageProblem("the message has no header 'id'")
        if not name_of(headers.get("task")):
            raise MessageProblem("the message has no header 'task'")
        self._refuse_unsupported()
        self.eta = moment_of(headers, "eta")
        self.expires = moment_of(headers, "expires")
        args, kwargs, _ = self.body or ((), {}, {})
        self.raw["args"] = _members(list(args), "$.args")
        self.raw["kwargs"] = _members(kwargs, "$.kwargs")
        try:
            self.payload = from_wire(self.raw, self.queue)
        except MalformedPayload as exc:
            raise MessageProblem(str(exc)) from exc

    def envelope(self, problem: str | None) -> Envelope:
        headers = self.headers
        retries = retries_of(headers)
        crashes = headers.get(COUNT_HEADER)
        fairness = self.payload.fairness if self.payload is not None else None
        priority = self.properties.get("priority")
        has_priority = type(priority) is int and priority > UNSET_PRIORITY
        return Envelope(
            raw=self.raw,
            payload=self.payload if problem is None else None,
            problem=problem,
            id=self.id,
            correlation_id=self.correlation_id,
            reply_to=self.reply_to,
            root_id=name_of(headers.get("root_id")),
            callbacks=self.callbacks,
            errbacks=self.errbacks,
            retries=retries,
            attempt=1 + retries + (crashes if type(crashes) is int and crashes > 0 else 0),
            eta=self.eta,
            expires=self.expires,
            org_id=name_of(headers.get(ORG_HEADER)) or (fairness.org_id if fairness is not None else None) or "",
            priority=min(priority, HIGHEST_PRIORITY) if has_priority and priority is not None else DEFAULT_PRIORITY,
            body=self.body,
            further_continuations=tuple(
                (kind, link_queue(link, self.default_queue), link["task"])
                for kind, links in (("on_success", self.callbacks), ("on_error", self.errbacks))
                for link in links[1:]
            ),
            dropped=self.dropped,
        )

    def _read_addresses(self) -> None:
        """Note the reply key of a sender that waits for an answer without links, and the first link of each kind."""
        if known := self.id or self.correlation_id:  # a real client sends the same as both
            self.raw["task_id"] = known
        answered = bool(self.reply_to) and self.headers.get("ignore_result") is not True
        if answered and not self.callbacks and not self.errbacks and (key := self.correlation_id or self.id):
            self.raw["reply_key"] = key
        for name, links in (("on_success", self.callbacks), ("on_error", self.errbacks)):
            if links:
                self.raw[name] = {
                    "task_name": links[0]["task"],
                    "kwargs": normalise_members(links[0].get("kwargs") or {}, lenient=True),
                    "queue": link_queue(links[0], self.default_queue),
                }

    def _read_body(self) -> str | None:
        """Read the body's three parts and its links; return its problem."""
        try:
            body = _decoded(self.message)
        except MessageProblem as exc:
            return str(exc)
        if isinstance(body, dict) and "task" in body:
            self.id = self.id or name_of(body.get("id"))
            self.errbacks, self.dropped, _ = read_errbacks(body.get("errbacks"))
            return (
                "the message is of Celery's protocol version 1; set task_protocol = 2, Celery's default, at its sender"
            )
        if not isinstance(body, list) or len(body) != 3:
            size = f"{len(body)} elements" if isinstance(body, list) else type(body).__name__
            return f"the body is not [args, kwargs, embed], but has or is {size}"
        args, kwargs, embed = body
        embed = {} if embed is None else embed
        problems = []
        if not isinstance(args, list):
            problems.append(f"expected an array, got {json_type(args)} @ $.args")
        if not isinstance(kwargs, dict):
            problems.append(f"expected an object, got {json_type(kwargs)} @ $.kwargs")
        if not isinstance(embed, dict):
            problems.append(f"expected an object, got {json_type(embed)} @ $.embed")
            embed = {}
        try:
            self.callbacks = read_callbacks(embed.get("callbacks"), "$.callbacks")
        except MessageProblem as exc:
            problems.append(str(exc))
        self.errbacks, self.dropped, problem = read_errbacks(embed.get("errbacks"))
        if problem:
            problems.append(problem)
        if not problems:
            self.body = (args, kwargs, embed)
        return "; ".join(problems) or None

    def _refuse_unsupported(self) -> None:
        embed = self.body[2] if self.body else {}
        for name in ("chain", "chord"):
            if embed.get(name):
                raise MessageProblem(
                    f"the task is part of a {name}, which is not continued here; use link and link_error"
                )
        limits = self.headers.get("timelimit")
        if not self.time_limits and isinstance(limits, Sequence) and any(limit is not None for limit in limits):
            raise MessageProblem(
                f"the task has time limits ({', '.join(map(str, limits))}), and a thread cannot be stopped; send it "
                f"without them, or accept that nothing enforces them: CeleryTransport(..., ignore_time_limits=True)"
            )


def _decoded(message: kombu.Message) -> Any:
    content_type = message.content_type
    if content_type == UNREADABLE:
        raise MessageProblem("the message's properties and headers cannot be read: a text that is not UTF-8, or such")
    if content_type not in _JSON:
        raise MessageProblem(
            f"the content type is {content_type!r}; only application/json is read, and nothing is ever unpickled: "
            "set task_serializer = 'json' at its sender"
        )
    try:
        body = readable_body(message)
    except NotDecompressed as exc:
        raise MessageProblem(str(exc)) from exc
    try:
        return loads(body, content_type, message.content_encoding, accept=_JSON)
    except (DecodeError, ContentDisallowed, ValueError, RecursionError) as exc:
        raise MessageProblem(f"the body is not JSON that can be read ({type(exc).__name__})") from exc


def _members(container: Any, path: str) -> Any:
    try:
        return normalise_members(container, path=path)
    except PayloadError as exc:
        raise MessageProblem(
            f"{exc}; a real Celery worker might run it, and no other transport could carry it"
        ) from exc
