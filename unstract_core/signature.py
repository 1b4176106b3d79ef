"""Translate a Celery callback signature into a continuation of the wire, without importing celery.

A continuation has a task name, kwargs and a queue. A signature with anything else, such as positional arguments or
another option, is rejected, so that no part of a signature is lost silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from unstract_core.codec import check_name
from unstract_core.errors import PayloadError, SignatureError
from unstract_core.payload import ContinuationSpec
from unstract_core.values import normalise_members


class CallbackSignature(Protocol):
    """The attributes of `celery.canvas.Signature` that are read; `options["queue"]` is the queue of the callback."""

    @property
    def task(self) -> Any: ...
    @property
    def args(self) -> Any: ...
    @property
    def kwargs(self) -> Any: ...
    @property
    def options(self) -> Any: ...


Callback: TypeAlias = "CallbackSignature | Mapping[str, Any]"
"""A signature object, or the mapping of a serialised signature."""


def signature_to_continuation(sig: Callback | None) -> ContinuationSpec | None:
    """Translate a callback signature into a continuation.

    Args:
        sig: An object with the attributes of Celery's Signature, or the mapping of a serialised one. None for no
            callback.

    Returns:
        The continuation, with a normalised copy of the kwargs; None for None.

    Raises:
        SignatureError: One of these:

            - The signature has no task name or no queue.
            - It has positional args, an option other than `queue`, or kwargs that the wire cannot carry.
            - It is immutable, a chain, a group or a chord.
    """
    if sig is None:
        return None
    _check_kind(sig)
    task = _part(sig, "task")
    if not task:
        raise SignatureError("a callback needs a task name: signature('my_task', ..., queue=...)", path="$.task")
    _check_name(task, "$.task", "a callback's task name")
    _check_nothing_is_lost(sig, task)
    return ContinuationSpec(task_name=task, kwargs=_kwargs(sig, task), queue=_queue(sig, task))


def _check_kind(sig: object) -> None:
    """Raise SignatureError for a value that is not a signature."""
    if isinstance(sig, Mapping) or (hasattr(sig, "task") and not isinstance(sig, type)):
        return
    if isinstance(sig, list | tuple | set | frozenset):
        advice = "a dispatch has one callback for each outcome: pass the signature itself"
    elif callable(getattr(sig, "s", None)) and hasattr(sig, "name"):
        advice = "a task is not a signature: pass task.s().set(queue='my_queue'), or signature('my_task', queue=...)"
    else:
        advice = "pass signature('my_task', kwargs={...}, queue='my_queue')"
    raise SignatureError(f"expected a callback's signature, got {type(sig).__name__}; {advice}", path="$.task")


def _part(sig: object, name: str) -> Any:
    return sig.get(name) if isinstance(sig, Mapping) else getattr(sig, name, None)


def _check_nothing_is_lost(sig: object, task: str) -> None:
    if kind := _part(sig, "subtask_type"):
        raise SignatureError(
            f"callback {task!r} is a {kind}; pass the signature of a single task", path="$.subtask_type"
        )
    if _part(sig, "args"):
        raise SignatureError(
            f"callback {task!r} has positional args; pass them as kwargs (the first position takes the result)",
            path="$.args",
        )
    if _part(sig, "immutable"):
        raise SignatureError(
            f"callback {task!r} is immutable and would not get the result or the failed id: use signature(), not si()",
            path="$.immutable",
        )


def _kwargs(sig: object, task: str) -> dict[str, Any]:
    kwargs = _part(sig, "kwargs") or {}
    if not isinstance(kwargs, dict):
        raise SignatureError(f"callback {task!r}: kwargs are a {type(kwargs).__name__}, not a dict", path="$.kwargs")
    try:
        normal: dict[str, Any] = normalise_members(kwargs, path="$.kwargs")
    except PayloadError as exc:
        raise SignatureError(f"callback {task!r}: {exc.problem}", path=exc.path) from exc
    return normal


def _queue(sig: object, task: str) -> str:
    options = _part(sig, "options") or {}
    if not isinstance(options, Mapping):
        raise SignatureError(f"callback {task!r}: options are a {type(options).__name__}, not a dict", path="$.options")
    for option, value in options.items():
        if option != "queue" and value is not None and value != [] and value != {}:
            raise SignatureError(
                f"callback {task!r} has the option {option!r}, which a continuation does not support; set only queue",
                path=f"$.options.{option}",
            )
    queue = options.get("queue")
    if not queue:
        raise SignatureError(
            f"callback {task!r} names no queue; set it: signature(..., queue='my_queue')", path="$.options.queue"
        )
    _check_name(queue, "$.options.queue", f"the queue of callback {task!r}")
    return str(queue)


def _check_name(name: Any, path: str, what: str) -> None:
    try:
        check_name(name, path)
    except PayloadError as exc:
        raise SignatureError(f"{what}: {exc.problem}", path=exc.path) from exc
