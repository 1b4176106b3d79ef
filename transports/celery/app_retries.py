"""Retries and replacements that a task of a Celery app asks for come to our Consumer, not to the app's broker.

A retry (`autoretry_for`, `self.retry()`) becomes RetryLater: the message waits, and survives its worker. What a
redelivery or a continuation cannot carry is refused, never lost: a retry with other arguments or options, and
`self.replace()` where somebody waits for the task that would be replaced.
"""

from __future__ import annotations

import datetime
import functools
import pickle
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Self

import attrs

from unstract_core.continuation import RetryLater
from unstract_core.errors import NotSupported
from unstract_core.transport import LONGEST_DELAY, Delivery


@attrs.define(eq=False)
class TaskRun:
    """A task that is running, and what it has asked for. `arguments` are the message's, before the task had them."""

    task: Any
    delivery: Delivery
    arguments: bytes
    asked: RetryLater | None = None
    refused: NotSupported | None = None

    @classmethod
    def of(cls, task: Any, delivery: Delivery) -> Self:
        payload = delivery.payload
        return cls(task, delivery, pickle.dumps(([], {}) if payload is None else (payload.args, payload.kwargs)))

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the task's function. Raises the refusal of a retry or replacement, also if the function caught it."""
        try:
            result = function(*args, **kwargs)
        except Exception:
            if self.refused is None:
                raise
        if self.refused is not None:
            raise self.refused
        return result

    def refuse(self, what: str, remedy: str) -> NotSupported:
        self.refused = NotSupported(f"task {self.task.name!r} {what}. {remedy}")
        return self.refused

    def reason(self, exc: BaseException) -> BaseException | None:
        """Return what a run failed with that has asked for a retry, and then raised `exc`, Celery's Retry mostly."""
        is_retry = any((kind.__module__, kind.__name__) == ("celery.exceptions", "Retry") for kind in type(exc).__mro__)
        reason = getattr(exc, "exc", None) if is_retry else exc
        if reason is None and self.asked is not None:
            reason = self.asked.__cause__
        return reason


running: ContextVar[TaskRun | None] = ContextVar("unstract_wire_celery_run", default=None)
_wrapping = threading.Lock()


def intercept(task: Any) -> None:
    """Let what a task asks for inside our consumer come to us, instead of being sent through the app's broker.

    `retry` makes a signature and sends it, `replace` ends in `on_replace`. Elsewhere, in a Celery worker of the same
    process say, both go on as they do.
    """
    with _wrapping:
        if getattr(task.signature_from_request, "is_ours", False):
            return
        make_signature, replace = task.signature_from_request, task.on_replace

        @functools.wraps(make_signature)
        def signature_from_request(
            request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
        ) -> Any:
            signature = make_signature(request, args, kwargs, queue, **options)
            run = running.get()
            if run is None or run.task is not task or task.request.is_eager:
                return signature
            _refuse_another_message(run, signature, args is kwargs is None, {"queue": queue, **options})
            signature.apply_async = lambda *_, **__: setattr(run, "asked", _later(signature))
            return signature

        @functools.wraps(replace)
        def on_replace(signature: Any) -> Any:
            run = running.get()
            if run is not None and run.task is task and not task.request.is_eager and _awaited(run.delivery):
                raise run.refuse(
                    "replaces itself with another, whose end its sender would never hear of",
                    "Call the other task's function, or dispatch the task without callbacks",
                )
            return replace(signature)

        signature_from_request.is_ours = True  # type: ignore[attr-defined]  # a mark on a function
        task.signature_from_request = signature_from_request
        task.on_replace = on_replace


def _awaited(delivery: Delivery) -> bool:
    payload = delivery.payload
    return payload is not None and (payload.reply_key is not None or payload.has_continuations)


def _refuse_another_message(run: TaskRun, signature: Any, same: bool, options: dict[str, Any]) -> None:
    """Raise unless what is asked for is the message again; `same` says that no arguments were given."""
    if run.refused is not None:  # an autoretry_for that includes it must not ask again
        raise run.refused
    delivery = run.delivery
    free = {"countdown", "eta", "retries"}
    as_it_is = {"queue": delivery.queue, "routing_key": delivery.queue, "priority": delivery.priority}
    other = {name for name, value in options.items() if name not in free and value not in (None, as_it_is.get(name))}
    if not same:
        args, kwargs = pickle.loads(run.arguments)  # noqa: S301 - pickled by this process
        if (list(signature.args), dict(signature.kwargs)) != (args, kwargs):
            other.add("other arguments")
    if other:
        raise run.refuse(
            f"asks for a retry with {', '.join(sorted(other))}; a retry here is the same message again",
            "Dispatch a new task instead, or keep what changes where the task finds it",
        )


def _later(signature: Any) -> RetryLater:
    """Return what a retry's signature asks for, read as Celery reads it: at once, if nothing says when."""
    countdown, eta = signature.options.get("countdown"), signature.options.get("eta")
    if isinstance(eta, str):
        eta = datetime.datetime.fromisoformat(eta)
    if countdown:
        seconds = datetime.timedelta(seconds=countdown).total_seconds()
    elif eta:
        eta = eta if eta.tzinfo is not None else eta.replace(tzinfo=datetime.UTC)
        seconds = (eta - datetime.datetime.now(datetime.UTC)).total_seconds()
    else:
        seconds = 0.0
    later = RetryLater(min(max(0.0, seconds), LONGEST_DELAY))
    later.__cause__ = sys.exc_info()[1]
    return later
