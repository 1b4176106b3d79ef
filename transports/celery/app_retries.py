"""Retries and replacements of a Celery app's task go through the Consumer instead of the app's broker.

A retry (`autoretry_for`, `self.retry()`) becomes RetryLater: the message waits in its queue, so it survives its worker.
A redelivery has the same arguments and options, so a retry with other ones is refused. `self.replace()` is refused if a
callback or a caller waits for the replaced task.
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

from transports.celery.task_exceptions import is_retry
from unstract_core.errors import NotSupported
from unstract_core.outcomes import RetryLater
from unstract_core.transport import LONGEST_DELAY, Delivery


@attrs.define(eq=False)
class TaskRun:
    """A run of a task."""

    task: Any
    delivery: Delivery
    #: The pickled arguments of the message, as they were before the task could change them.
    arguments: bytes
    #: The retry that the task has asked for; None for none.
    asked: RetryLater | None = None
    #: The refusal of a retry or replacement; None for none.
    refused: NotSupported | None = None

    @classmethod
    def of(cls, task: Any, delivery: Delivery) -> Self:
        payload = delivery.payload
        return cls(task, delivery, pickle.dumps(([], {}) if payload is None else (payload.args, payload.kwargs)))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the task's function. Raise the refusal of a retry or replacement, even if the function caught it."""
        try:
            result = function(*args, **kwargs)
        except Exception:
            if self.refused is None:
                raise
        if self.refused is not None:
            raise self.refused
        return result

    def refuse(self, problem: str, remedy: str) -> NotSupported:
        self.refused = NotSupported(f"task {self.task.name!r} {problem}. {remedy}")
        return self.refused

    def reason(self, exc: BaseException) -> BaseException | None:
        """Return the error because of which a run asked for a retry; `exc` is the exception that then ended it."""
        reason = getattr(exc, "exc", None) if is_retry(exc) else exc
        if reason is None and self.asked is not None:
            reason = self.asked.__cause__
        return reason


running: ContextVar[TaskRun | None] = ContextVar("unstract_wire_celery_run", default=None)
_wrapping = threading.Lock()


def intercept(task: Any) -> None:
    """Replace the methods by which a task asks for a retry or replacement, for runs in a Consumer.

    `retry` makes a signature and sends it, `replace` calls `on_replace`. Other runs, such as those of a Celery worker
    in the same process, are not changed.
    """
    with _wrapping:
        if getattr(task.signature_from_request, "is_intercepted", False):
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
                    "replaces itself with another task, whose outcome its sender would never receive",
                    "Call the other task's function, or dispatch the task without callbacks",
                )
            return replace(signature)

        signature_from_request.is_intercepted = True  # type: ignore[attr-defined]  # a mark on a function
        task.signature_from_request = signature_from_request
        task.on_replace = on_replace


def _awaited(delivery: Delivery) -> bool:
    payload = delivery.payload
    return payload is not None and (payload.reply_key is not None or payload.has_continuations)


def _refuse_another_message(run: TaskRun, signature: Any, same: bool, options: dict[str, Any]) -> None:
    """Raise NotSupported unless a retry asks for the same message; `same` is True if it has no arguments."""
    if run.refused is not None:  # an autoretry_for that includes NotSupported must not ask again
        raise run.refused
    delivery = run.delivery
    free = {"countdown", "eta", "retries"}
    unchanged = {"queue": delivery.queue, "routing_key": delivery.queue, "priority": delivery.priority}
    other = {name for name, value in options.items() if name not in free and value not in (None, unchanged.get(name))}
    if not same:
        args, kwargs = pickle.loads(run.arguments)  # noqa: S301 - pickled by this process
        if (list(signature.args), dict(signature.kwargs)) != (args, kwargs):
            other.add("other arguments")
    if other:
        raise run.refuse(
            f"asks for a retry with {', '.join(sorted(other))}; a retry here is the same message again",
            "Dispatch a new task instead, or store the changed values elsewhere",
        )


def _later(signature: Any) -> RetryLater:
    """Return the retry that a signature asks for, as Celery reads it: without countdown and eta it is due at once."""
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
