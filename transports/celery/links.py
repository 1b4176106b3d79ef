"""The links of a Celery message: the signatures of its callbacks and errbacks.

The wire has one continuation with kwargs for each outcome. A Celery message may have several links, with their own
positional arguments. If a callback cannot be sent, the message is refused. An errback is reduced to the parts that can
be sent, so that the error is reported in any case.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from transports.celery.broker_settings import BrokerSettings
from transports.celery.encode import TaskMessage
from transports.celery.fields import MessageProblem, json_type, name_of
from unstract_core.codec import check_name
from unstract_core.continuation import CONTINUATION_IDS, with_error
from unstract_core.errors import PayloadError
from unstract_core.transport import LONGEST_DELAY
from unstract_core.values import normalise_members

_OPTIONS = {"queue", "task_id", "link", "link_error", "countdown"}
"""The options of a link that are used when it is sent."""
_CANVAS = {"chain": "tasks", "group": "tasks", "chord": "header"}
"""The kwarg in which Celery keeps the tasks of each kind of canvas."""
_MAX_CANVAS_DEPTH = 20


def link_queue(link: Mapping[str, Any], default: str) -> str:
    """Return the queue that a signature names, or the default queue."""
    queue = (link.get("options") or {}).get("queue")
    return queue if isinstance(queue, str) and queue else default


def read_callbacks(callbacks: Any, path: str) -> tuple[dict[str, Any], ...]:
    if callbacks is None:
        return ()
    if not isinstance(callbacks, list):
        raise MessageProblem(f"expected an array of signatures, got {json_type(callbacks)} @ {path}")
    for number, link in enumerate(callbacks):
        _check_link(link, f"{path}[{number}]")
    return tuple(callbacks)


def read_errbacks(errbacks: Any) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...], str | None]:
    """Return the errbacks that can be sent, the paths of the parts that cannot, and the problem of the others."""
    links: list[dict[str, Any]] = []
    dropped: list[str] = []
    problem = None
    if errbacks is not None and not isinstance(errbacks, list):
        problem = f"expected an array of signatures, got {json_type(errbacks)} @ $.errbacks"
        errbacks = [errbacks]
    for number, errback in enumerate(errbacks or ()):
        for link, path in _single_tasks(errback, f"$.errbacks[{number}]", dropped):
            reduced = _reduced(link, path, dropped)
            try:
                _check_link(reduced, path)
            except MessageProblem as exc:
                problem = problem or str(exc)
            else:
                links.append(reduced)
    return tuple(links), tuple(dropped), problem


def linked_task(
    link: Mapping[str, Any],
    number: int,
    task: TaskMessage,
    priority: int,
    error: str | None,
    settings: BrokerSettings,
    default_queue: str,
) -> TaskMessage:
    """Return the task that a link of a settled message asks for.

    Args:
        link: The link.
        number: Its position among the links of the message.
        task: The task of the follow-up without the link's own options.
        priority: The priority of the follow-up.
        error: The error text of a failure; None for a success.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.
    """
    options = link.get("options") or {}
    stored = normalise_members(link.get("args") or [], lenient=True)
    kwargs = normalise_members(link.get("kwargs") or {}, lenient=True)
    immutable = bool(link.get("immutable"))
    if error is not None and not immutable:
        kwargs = with_error(kwargs, error)
    queue = link_queue(link, default_queue)
    args = stored if immutable else [*task.args, *stored]
    lineage = attrs.evolve(task.lineage, group_index=number) if task.lineage.group else task.lineage
    return TaskMessage(
        name=link["task"],
        args=args if immutable and lineage.group is None else tuple(args),  # argsrepr is then the same as Celery's
        kwargs=kwargs,
        queue=queue,
        task_id=options.get("task_id")
        or (task.task_id if number == 0 else str(uuid.uuid5(CONTINUATION_IDS, f"{task.task_id}/{number}"))),
        callbacks=_listed(options.get("link")),
        errbacks=_listed(options.get("link_error")),
        priority=priority if settings.keeps_priorities(queue) else task.priority,
        delay=options.get("countdown") or 0,
        lineage=lineage,
        headers=task.headers,
    )


def _check_link(link: Any, path: str) -> None:
    if not isinstance(link, dict) or not name_of(link.get("task")):
        raise MessageProblem(f"a link without a task @ {path}")
    if kind := link.get("subtask_type"):
        raise MessageProblem(f"a link that is a {kind} is not fired here; link single tasks @ {path}")
    for name, expected, kind in (("args", "array", list), ("kwargs", "object", dict), ("options", "object", dict)):
        if link.get(name) is not None and not isinstance(link[name], kind):
            raise MessageProblem(f"expected an {expected}, got {json_type(link[name])} @ {path}.{name}")
    options = {name: value for name, value in (link.get("options") or {}).items() if value not in (None, [], {})}
    if foreign := sorted(str(name) for name in options.keys() - _OPTIONS):
        raise MessageProblem(f"{', '.join(foreign)} cannot be honoured; set queue alone @ {path}.options")
    if not _is_countdown(options.get("countdown", 0)):
        raise MessageProblem(f"expected seconds, at most {LONGEST_DELAY:g} @ {path}.options.countdown")
    try:
        check_name(link["task"], f"{path}.task")
        for name in options.keys() & {"queue", "task_id"}:
            check_name(options[name], f"{path}.options.{name}")
        for name in ("args", "kwargs"):
            normalise_members(link.get(name) or [], path=f"{path}.{name}")
    except PayloadError as exc:
        raise MessageProblem(str(exc)) from exc


def _single_tasks(link: Any, path: str, dropped: list[str], depth: int = 0) -> Iterator[tuple[Any, str]]:
    """Yield the tasks of an errback that are sent: the first of a chain, all of a group, and the header of a chord.

    The paths of the others are added to `dropped`.
    """
    kind = link.get("subtask_type") if isinstance(link, dict) else None
    name = _CANVAS.get(kind) if isinstance(kind, str) else None
    members = (link.get("kwargs") or {}).get(name) if name and isinstance(link.get("kwargs"), dict) else None
    if isinstance(members, dict):
        members = [members]
    if not isinstance(members, list) or not members or depth > _MAX_CANVAS_DEPTH:
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
    """Return an errback without the options and values that cannot be sent; their paths are added to `dropped`."""
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
    foreign = [
        name for name, value in options.items() if value not in (None, [], {}) and not _is_supported(name, value)
    ]
    dropped += sorted(f"{path}.options.{name}" for name in foreign)
    return {**link, "options": {name: value for name, value in options.items() if name not in foreign}}


def _is_supported(name: str, value: Any) -> bool:
    if name == "countdown":
        return _is_countdown(value)
    return name in _OPTIONS and (name != "task_id" or name_of(value) is not None)


def _is_countdown(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LONGEST_DELAY


def _listed(links: Any) -> list[Any] | None:
    return links if isinstance(links, list) and links else [links] if links else None
