"""Celery's message protocol 2, incoming: a broker's message as a payload of ours, and what else it asks for.

Read tolerantly where Celery is tolerant. A message that cannot be read, or asks for something that cannot be honoured
here, becomes a delivery with its problem, and is searched for the address of its sender. Nothing is unpickled; bodies
are JSON, and values those of the one domain (docs/wire.md), so that a UUID is text here too.

The wire has one continuation of kwargs for each outcome. Celery's links may be several, with positional arguments of
their own: they stand in `callbacks` and `errbacks` as they came, and the first of each lends the payload its face.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import kombu
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import loads

from transports.celery.amqp_frame_patches import UNREADABLE
from transports.celery.compression import NotDecompressed, readable_body
from transports.celery.encode import (
    BROKERS_HEADERS,
    CELERYS_HEADERS,
    HEADERS_HEADER,
    ORG_HEADER,
    TRACE_HEADERS,
    UNSET_PRIORITY,
)
from unstract_core.codec import MAX_HEADERS_BYTES, check_headers, check_name, from_wire
from unstract_core.errors import MalformedPayload, PayloadError
from unstract_core.observability.log_events import NewNames, emit
from unstract_core.payload import DEFAULT_PRIORITY, HIGHEST_PRIORITY, TaskPayload
from unstract_core.producer.executor import FAIRNESS_HEADER
from unstract_core.transport import LONGEST_DELAY, Delivery
from unstract_core.values import normalise, normalise_members

logger = logging.getLogger("unstract_wire.celery")

_JSON = frozenset({"application/json"})
_OPTIONS = {"queue", "task_id", "link", "link_error", "countdown"}
"""The options of a link that are honoured when it is fired."""
_CANVAS = {"chain": "tasks", "group": "tasks", "chord": "header"}
"""Where Celery keeps the tasks of a canvas among its kwargs."""
_DEEPEST_CANVAS = 20
_MOST_RETRIES = 2**31
_left_out = NewNames()
"""The names of headers that were warned of."""
COUNT_HEADER = "x-delivery-count"
"""In which a quorum queue says how often it has delivered a message before."""


@attrs.frozen
class Envelope:
    """A message as it was read. `raw` is the payload as it stands on our wire, as far as it is readable.

    `callbacks` are Celery's signatures as they came. `errbacks` are too, but for the parts that cannot be honoured,
    whose paths are `dropped`. `embed` is the body's third part; `answered` whether its sender gave an address for the
    answer, `reply_to`.
    """

    raw: dict[str, Any]
    payload: TaskPayload | None
    problem: str | None
    id: str | None
    correlation_id: str | None
    reply_to: str
    root_id: str | None
    callbacks: tuple[dict[str, Any], ...]
    errbacks: tuple[dict[str, Any], ...]
    retries: int
    attempt: int
    eta: datetime.datetime | None
    expires: datetime.datetime | None
    org_id: str
    priority: int
    body: tuple[Any, Any, Any] | None
    further_continuations: tuple[tuple[str, str, str], ...] = ()
    dropped: tuple[str, ...] = ()

    def delivery(self, id: str, queue: str) -> Delivery:
        """Return it as a delivery of `queue`, under this id."""
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


class _Problem(Exception):
    """Why a message cannot be run."""


def read_message(message: kombu.Message, queue: str, *, default_queue: str, time_limits: bool = False) -> Envelope:
    """Read a message that came from `queue`. Never raises: what is wrong with it is its `problem`.

    A link without a queue goes to `default_queue`, as Celery's own; `time_limits` accepts a task with a time limit,
    which nothing enforces here.
    """
    reading = _Reading(message, queue, default_queue, time_limits)
    problem = None
    try:
        reading.read()
    except _Problem as exc:
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
        if (carried := _carried(headers)) is not None:
            self.raw["headers"] = carried
        self._address()
        if "task" in headers:
            self.raw["task_name"] = headers["task"]
        if problems:
            raise _Problem(problems)
        if not self.id:
            raise _Problem("the message has no header 'id'")
        if not name_of(headers.get("task")):
            raise _Problem("the message has no header 'task'")
        self._refuse_what_cannot_be_honoured()
        self.eta = _moment(headers, "eta")
        self.expires = _moment(headers, "expires")
        args, kwargs, _ = self.body or ((), {}, {})
        self.raw["args"] = _members(list(args), "$.args")
        self.raw["kwargs"] = _members(kwargs, "$.kwargs")
        try:
            self.payload = from_wire(self.raw, self.queue)
        except MalformedPayload as exc:
            raise _Problem(str(exc)) from exc

    def envelope(self, problem: str | None) -> Envelope:
        headers = self.headers
        retries = retries_of(headers)
        crashes = headers.get(COUNT_HEADER)
        fairness = self.payload.fairness if self.payload is not None else None
        priority = self.properties.get("priority")
        ranked = type(priority) is int and priority > UNSET_PRIORITY
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
            priority=min(priority, HIGHEST_PRIORITY) if ranked and priority is not None else DEFAULT_PRIORITY,
            body=self.body,
            further_continuations=tuple(
                (kind, link_queue(link, self.default_queue), link["task"])
                for kind, links in (("on_success", self.callbacks), ("on_error", self.errbacks))
                for link in links[1:]
            ),
            dropped=self.dropped,
        )

    def _address(self) -> None:
        """Note where the outcome goes: to a reply if an address was given and nothing is chained, else to a status."""
        if known := self.id or self.correlation_id:  # the same for a real client
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
        """Read the body's three parts and its links; return what is wrong with it."""
        try:
            body = _decoded(self.message)
        except _Problem as exc:
            return str(exc)
        if isinstance(body, dict) and "task" in body:
            self.id = self.id or name_of(body.get("id"))
            self._read_errbacks(body.get("errbacks"))
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
            problems.append(f"expected an array, got {_kind(args)} @ $.args")
        if not isinstance(kwargs, dict):
            problems.append(f"expected an object, got {_kind(kwargs)} @ $.kwargs")
        if not isinstance(embed, dict):
            problems.append(f"expected an object, got {_kind(embed)} @ $.embed")
            embed = {}
        try:
            self.callbacks = _links(embed.get("callbacks"), "$.callbacks")
        except _Problem as exc:
            problems.append(str(exc))
        if problem := self._read_errbacks(embed.get("errbacks")):
            problems.append(problem)
        if not problems:
            self.body = (args, kwargs, embed)
        return "; ".join(problems) or None

    def _read_errbacks(self, found: Any) -> str | None:
        """Take the errbacks that can be fired, also of a malformed message; return what is wrong with the others."""
        links: list[dict[str, Any]] = []
        dropped: list[str] = []
        problem = None
        if found is not None and not isinstance(found, list):
            problem = f"expected an array of signatures, got {_kind(found)} @ $.errbacks"
            found = [found]
        for number, errback in enumerate(found or ()):
            for link, path in _single_tasks(errback, f"$.errbacks[{number}]", dropped):
                reduced = _reduced(link, path, dropped)
                try:
                    _check_link(reduced, path)
                except _Problem as exc:
                    problem = problem or str(exc)
                else:
                    links.append(reduced)
        self.errbacks, self.dropped = tuple(links), tuple(dropped)
        return problem

    def _refuse_what_cannot_be_honoured(self) -> None:
        embed = self.body[2] if self.body else {}
        for name in ("chain", "chord"):
            if embed.get(name):
                raise _Problem(f"the task is part of a {name}, which is not continued here; use link and link_error")
        limits = self.headers.get("timelimit")
        if not self.time_limits and isinstance(limits, Sequence) and any(limit is not None for limit in limits):
            raise _Problem(
                f"the task has time limits ({', '.join(map(str, limits))}), and a thread cannot be stopped; send it "
                f"without them, or accept that nothing enforces them: CeleryTransport(..., ignore_time_limits=True)"
            )


def link_queue(link: Mapping[str, Any], default: str) -> str:
    """Return the queue that a signature names; Celery's default queue where it names none."""
    queue = (link.get("options") or {}).get("queue")
    return queue if isinstance(queue, str) and queue else default


def _decoded(message: kombu.Message) -> Any:
    content_type = message.content_type
    if content_type == UNREADABLE:
        raise _Problem("the message's properties and headers cannot be read: a text that is not UTF-8, or such")
    if content_type not in _JSON:
        raise _Problem(
            f"the content type is {content_type!r}; only application/json is read, and nothing is ever unpickled: "
            "set task_serializer = 'json' at its sender"
        )
    try:
        body = readable_body(message)
    except NotDecompressed as exc:
        raise _Problem(str(exc)) from exc
    try:
        return loads(body, content_type, message.content_encoding, accept=_JSON)
    except (DecodeError, ContentDisallowed, ValueError, RecursionError) as exc:
        raise _Problem(f"the body is not JSON that can be read ({type(exc).__name__})") from exc


def _links(found: Any, path: str) -> tuple[dict[str, Any], ...]:
    if found is None:
        return ()
    if not isinstance(found, list):
        raise _Problem(f"expected an array of signatures, got {_kind(found)} @ {path}")
    for number, link in enumerate(found):
        _check_link(link, f"{path}[{number}]")
    return tuple(found)


def _check_link(link: Any, path: str) -> None:
    if not isinstance(link, dict) or not name_of(link.get("task")):
        raise _Problem(f"a link without a task @ {path}")
    if kind := link.get("subtask_type"):
        raise _Problem(f"a link that is a {kind} is not fired here; link single tasks @ {path}")
    for name, expected, kind in (("args", "array", list), ("kwargs", "object", dict), ("options", "object", dict)):
        if link.get(name) is not None and not isinstance(link[name], kind):
            raise _Problem(f"expected an {expected}, got {_kind(link[name])} @ {path}.{name}")
    options = {name: value for name, value in (link.get("options") or {}).items() if value not in (None, [], {})}
    if foreign := sorted(str(name) for name in options.keys() - _OPTIONS):
        raise _Problem(f"{', '.join(foreign)} cannot be honoured; set queue alone @ {path}.options")
    if not _is_countdown(options.get("countdown", 0)):
        raise _Problem(f"expected seconds, at most {LONGEST_DELAY:g} @ {path}.options.countdown")
    try:
        check_name(link["task"], f"{path}.task")
        for name in options.keys() & {"queue", "task_id"}:
            check_name(options[name], f"{path}.options.{name}")
        for name in ("args", "kwargs"):
            normalise_members(link.get(name) or [], path=f"{path}.{name}")
    except PayloadError as exc:
        raise _Problem(str(exc)) from exc


def _single_tasks(link: Any, path: str, dropped: list[str], depth: int = 0) -> Iterator[tuple[Any, str]]:
    """Yield the tasks of an errback that are fired: of a chain the first, of a group all, of a chord its header's.

    The paths of the others are added to `dropped`.
    """
    kind = link.get("subtask_type") if isinstance(link, dict) else None
    name = _CANVAS.get(kind) if isinstance(kind, str) else None
    members = (link.get("kwargs") or {}).get(name) if name and isinstance(link.get("kwargs"), dict) else None
    if isinstance(members, dict):
        members = [members]
    if not isinstance(members, list) or not members or depth > _DEEPEST_CANVAS:
        if kind:  # Celery sends these as the task of that name, too
            link = {**link, "subtask_type": None}
            dropped.append(f"{path}.subtask_type")
        yield link, path
        return
    if kind == "chain" and len(members) > 1:
        dropped.append(f"{path}.kwargs.tasks[1:]")
        members = members[:1]
    if kind == "chord":
        dropped.append(f"{path}.kwargs.body")
    common = link.get("options") if isinstance(link.get("options"), dict) else {}
    for number, member in enumerate(members):
        if isinstance(member, dict) and isinstance(own := member.get("options") or {}, dict):
            member = {**member, "options": {**common, **own}}
        yield from _single_tasks(member, f"{path}.kwargs.{name}[{number}]", dropped, depth + 1)


def _reduced(link: Any, path: str, dropped: list[str]) -> Any:
    """Return an errback without what cannot be honoured: options, and values outside the domain.

    Their paths are added to `dropped`. An error that is reported in another way than its sender wanted is better than
    one that is not reported.
    """
    if not isinstance(link, dict):
        return link
    for name, kind in (("args", list), ("kwargs", dict)):
        if isinstance(link.get(name), kind):
            try:
                normalise_members(link[name])
            except PayloadError as exc:
                dropped.append(f"{path}.{name}{(exc.path or '$').removeprefix('$')}")
                link = {**link, name: normalise_members(link[name], lenient=True)}
    options = link.get("options")
    if not isinstance(options, dict):
        return link
    foreign = [name for name, value in options.items() if value not in (None, [], {}) and not _is_honoured(name, value)]
    dropped += sorted(f"{path}.options.{name}" for name in foreign)
    return {**link, "options": {name: value for name, value in options.items() if name not in foreign}}


def _is_honoured(name: str, value: Any) -> bool:
    if name == "countdown":
        return _is_countdown(value)
    return name in _OPTIONS and (name != "task_id" or name_of(value) is not None)


def _is_countdown(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LONGEST_DELAY


def _carried(headers: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the wire's `headers`: the client's own that are texts, and those of a sender of ours.

    A client's own stand beside Celery's, or in a table `headers`, as instrumentation writes them. Where they are too
    large for the wire, the context of a trace comes first. The names of what is left out are logged.
    """
    ours = headers.get(HEADERS_HEADER)
    if ours is not None:
        try:
            ours = check_headers(ours, "$.headers")
        except PayloadError:
            return None  # as on every transport: what is no object of texts counts as absent
    found = {**_clients_own(headers.get("headers")), **_clients_own(headers), **(ours or {})}
    room = MAX_HEADERS_BYTES
    kept: set[str] = set()
    for name in sorted(found, key=lambda name: name not in TRACE_HEADERS):
        with contextlib.suppress(PayloadError):
            check_headers({name: found[name]}, "$.headers")
            if (size := len(name.encode()) + len(found[name].encode())) <= room:
                room -= size
                kept.add(name)
    if left_out := [name for name in found if name not in kept]:
        _note_left_out(tuple(sorted(left_out)))
    carried = {name: value for name, value in found.items() if name in kept}
    return carried if carried or ours is not None else None


def _clients_own(headers: Any) -> dict[str, Any]:
    """Return the headers that are neither Celery's nor ours nor a broker's."""
    if not isinstance(headers, Mapping):
        return {}
    ours = (FAIRNESS_HEADER, ORG_HEADER, HEADERS_HEADER)
    return {
        name: value
        for name, value in headers.items()
        if value is not None
        and isinstance(name, str)
        and name not in CELERYS_HEADERS
        and name not in ours
        and not BROKERS_HEADERS.fullmatch(name)
    }


def _note_left_out(names: tuple[str, ...]) -> None:
    """Warn of headers that the wire has no place for, once for the same names: a sender sends them every time."""
    if _left_out.are(names):
        emit(logger, logging.WARNING, "message_headers_left_out", names=NewNames.shown(names), count=len(names))


def _members(container: Any, path: str) -> Any:
    try:
        return normalise_members(container, path=path)
    except PayloadError as exc:
        raise _Problem(f"{exc}; a real Celery worker might run it, and no other transport could carry it") from exc


def _moment(headers: Mapping[str, Any], name: str) -> datetime.datetime | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(value)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError) as exc:
        raise _Problem(f"the header {name!r} is no ISO 8601 moment") from exc


def retries_of(headers: Mapping[str, Any]) -> int:
    """Return how many tries a message has behind it; 0 for what is no number of them."""
    retries = headers.get("retries")
    return retries if type(retries) is int and 0 <= retries < _MOST_RETRIES else 0


def key_of(message: kombu.Message) -> tuple[str | None, int]:
    """Return what every delivery of the same message has in common, and no other has; None first where nothing has."""
    name = name_of(message.headers.get("id")) or name_of(message.properties.get("correlation_id"))
    return name, retries_of(message.headers)


def name_of(value: Any) -> str | None:
    """Return a name or an id that can be used as one, and None for anything else."""
    try:
        check_name(value, "$")
    except PayloadError:
        return None
    return str(value)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def fit(value: object) -> Any:
    """Return a value that a Celery worker answered with, inside the domain."""
    return normalise(value, lenient=True)
