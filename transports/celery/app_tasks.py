"""The tasks of a Celery app as our Consumer's registry, so that workers keep their `@shared_task` code.

A task is run as Celery's worker runs it: with a request of its own, its handlers and Celery's signals around it. What
it asks for goes through our settlement instead of the app's broker: `autoretry_for` and `self.retry()` end in Celery's
own `Retry`, which our consumer reads as "again, in so many seconds", so that a retry is a message that waits and
survives its worker; `Ignore` and `Reject` mean what they mean there.

Not enforced, because tasks run on threads of one process: soft and hard time limits, rate limits. Of no meaning here:
acks_late and reject_on_worker_lost (a message is acknowledged when its outcome is settled), ignore_result and
track_started (Celery's result backend is not written).
"""

from __future__ import annotations

import datetime
import functools
import importlib
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import attrs

from unstract_core.continuation import CONTINUATION_IDS, RetryLater
from unstract_core.current import current_delivery
from unstract_core.errors import ConfigurationError, NotSupported
from unstract_core.events import emit
from unstract_core.execution import FAIRNESS_HEADER
from unstract_core.transport import Delivery
from unstract_core.values import type_name

logger = logging.getLogger(__name__)

WITHOUT_LIMIT = 2**31
"""The attempts of a task whose `max_retries` is None."""


@attrs.define
class _Run:
    """What a task that is running has asked for: `retry` is the signature that Celery would send."""

    task: Any
    retry: Any = None


_RETRY_OPTIONS = {"args", "kwargs", "countdown", "eta", "retries"}
_running: ContextVar[_Run | None] = ContextVar("unstract_wire_celery_run", default=None)
_wrapping = threading.Lock()


def celery_tasks(app: Any) -> Mapping[str, Callable[..., Any]]:
    """Return the tasks of a Celery app by name, Celery's own left out, for `Consumer(transport, tasks, queues)`.

    Each has `request.id` (the dispatch's, the same on every delivery), `request.retries`, `request.headers` (fairness
    as `x-fairness-key`) and `request.delivery_info`; bound tasks, class-based ones, handlers and signals work. A retry
    that a task asks for really happens, later and elsewhere, as often as its `max_retries` says, and only the last
    error is told. A retry with other arguments or options cannot be had: a redelivery has the same message; the task
    then fails with NotSupported.

    Raises ConfigurationError for what is no Celery app, or has no tasks of its own.
    """
    if not callable(getattr(app, "finalize", None)) or not hasattr(app, "tasks"):
        raise ConfigurationError(f"celery_tasks takes a Celery app, not a {type(app).__name__}")
    app.loader.import_default_modules()
    app.finalize(auto=True)
    found = {name: CeleryTask(task) for name, task in app.tasks.items() if not name.startswith("celery.")}
    if not found:
        raise ConfigurationError("the Celery app has no tasks; import the modules that define them first")
    return found


class CeleryTask:
    """One task of a Celery app, callable as our Runner calls tasks."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self._celery = _Celery()
        _intercept_retries(task)

    def __repr__(self) -> str:
        return f"<CeleryTask {self.task.name}>"

    @property
    def asked_attempts(self) -> int:
        """How many deliveries the task may have because it asks for them; see `RetryPolicy.asked_attempts`."""
        limits = [self.task.max_retries, (getattr(self.task, "retry_kwargs", None) or {}).get("max_retries", 0)]
        return WITHOUT_LIMIT if None in limits else 1 + max(int(limit) for limit in limits)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        delivery = current_delivery()
        if delivery is None:
            return self.task(*args, **kwargs)
        run = _Run(self.task)
        token = _running.set(run)
        try:
            result = _traced(self._celery, self.task, delivery, args, kwargs)
        finally:
            _running.reset(token)
        if run.retry is not None:  # asked for with throw=False
            raise RetryLater(_seconds(run.retry))
        return result


def _traced(celery: _Celery, task: Any, delivery: Delivery, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a task between the handlers and signals that Celery's worker gives it, and let out what it raises."""
    request = celery.request(task, delivery, args, kwargs)
    what = (request.id, args, kwargs)
    state: str | None = None
    retval: Any = None
    celery.push(task, request)
    try:
        celery.signal("task_prerun", task, task_id=request.id, task=task, args=args, kwargs=kwargs)
        task.app.loader.on_task_init(request.id, task)
        try:
            task.before_start(*what)
            retval = celery.function(task)(*args, **kwargs)
        except Exception as exc:
            state, retval = celery.state_of(exc), exc
            celery.told(task, request, state, exc)
            raise
        else:
            state = "SUCCESS"
            _handled(task.on_success, retval, *what)
            celery.signal("task_success", task, result=retval)
        finally:
            if state in ("SUCCESS", "FAILURE", "RETRY"):
                _handled(task.after_return, state, retval, *what, None)
    finally:
        celery.signal(
            "task_postrun", task, task_id=request.id, task=task, args=args, kwargs=kwargs, retval=retval, state=state
        )
        celery.pop(task)
    return retval


class _Celery:
    """Celery's own parts that run a task. There is an app, so celery is loaded, and importing it here loads nothing."""

    def __init__(self) -> None:
        self._signals = importlib.import_module("celery.signals")
        self._exceptions = importlib.import_module("celery.exceptions")
        self._trace = importlib.import_module("celery.app.trace")
        self._context = importlib.import_module("celery.app.task").Context
        self._stack = importlib.import_module("celery._state")._task_stack
        self._einfo = importlib.import_module("billiard.einfo").ExceptionInfo

    def request(self, task: Any, delivery: Delivery, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the request that `self.request` is while the task runs."""
        id = request_id(delivery)
        payload = delivery.payload
        fairness = payload.fairness if payload is not None else None
        return self._context(
            id=id,
            root_id=id,
            correlation_id=id,
            task=task.name,
            args=args,
            kwargs=kwargs,
            retries=delivery.attempt - 1,
            headers={FAIRNESS_HEADER: attrs.asdict(fairness)} if fairness is not None else None,
            called_directly=False,
            is_eager=False,
            hostname=socket.gethostname(),
            delivery_info={
                "exchange": "",
                "routing_key": delivery.queue,
                "priority": delivery.priority,
                "redelivered": delivery.attempt > 1,
            },
        )

    def function(self, task: Any) -> Any:
        """Return what Celery's worker calls: the task itself only where it has a `__call__` of its own."""
        return task if self._trace.task_has_custom(task, "__call__") else task.run

    def push(self, task: Any, request: Any) -> None:
        self._stack.push(task)
        task.request_stack.push(request)

    def pop(self, task: Any) -> None:
        task.request_stack.pop()
        self._stack.pop()

    def state_of(self, exc: Exception) -> str:
        kinds = {"Ignore": "IGNORED", "Reject": "REJECTED", "Retry": "RETRY"}
        found = (state for name, state in kinds.items() if isinstance(exc, getattr(self._exceptions, name)))
        return next(found, "FAILURE")

    def told(self, task: Any, request: Any, state: str, exc: Exception) -> None:
        """Tell handlers and signals of a task that did not return."""
        if state in ("IGNORED", "REJECTED"):
            return
        einfo = self._einfo()
        what = (request.id, request.args, request.kwargs)
        if state == "RETRY":
            _handled(task.on_retry, getattr(exc, "exc", None), *what, einfo)
            self.signal("task_retry", task, request=request, reason=exc, einfo=einfo)
            return
        _handled(task.on_failure, exc, *what, einfo)
        self.signal(
            "task_failure",
            task,
            task_id=request.id,
            exception=exc,
            args=request.args,
            kwargs=request.kwargs,
            traceback=exc.__traceback__,
            einfo=einfo,
        )

    def signal(self, name: str, sender: Any, /, **fields: Any) -> None:
        """Send one of Celery's signals, which keeps what a receiver raises to itself."""
        getattr(self._signals, name).send(sender=sender, **fields)


def request_id(delivery: Delivery) -> str:
    """Return the id of a delivery's request: the dispatch's, else one made of the message's, always the same."""
    payload = delivery.payload
    known = (payload.task_id or payload.reply_key) if payload is not None else None
    return known or str(uuid.uuid5(CONTINUATION_IDS, f"{delivery.queue}/{delivery.id}"))


def _handled(handler: Callable[..., Any], *args: Any) -> None:
    """Call a task's handler. The task has ended, and what its handler raises does not change how."""
    try:
        handler(*args)
    except Exception as exc:
        emit(logger, logging.WARNING, "task_handler_raised", handler=handler.__name__, error_type=type_name(exc))


def _intercept_retries(task: Any) -> None:
    """Let `task.retry()`, inside our consumer, ask for a retry instead of sending one through the app's broker.

    `retry` makes a signature and sends it. Elsewhere, in a Celery worker of the same process say, it still does.
    """
    with _wrapping:
        if getattr(task.signature_from_request, "is_ours", False):
            return
        original = task.signature_from_request

        @functools.wraps(original)
        def signature_from_request(request: Any = None, *args: Any, **kwargs: Any) -> Any:
            signature = original(request, *args, **kwargs)
            run = _running.get()
            if run is None or run.task is not task:
                return signature
            _refuse_another_message(task, signature, args, kwargs)
            signature.apply_async = lambda *_, **__: setattr(run, "retry", signature)
            return signature

        signature_from_request.is_ours = True  # type: ignore[attr-defined]  # a mark on a function
        task.signature_from_request = signature_from_request


def _refuse_another_message(task: Any, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    request = task.request
    options = {name for name, value in kwargs.items() if name not in _RETRY_OPTIONS and value is not None}
    given = [value for value in (*args[:2], kwargs.get("args"), kwargs.get("kwargs")) if value is not None]
    same = tuple(signature.args) == tuple(request.args or ()) and dict(signature.kwargs) == dict(request.kwargs or {})
    if options or (given and not same):
        what = ", ".join(sorted(options)) or "other arguments"
        raise NotSupported(
            f"task {task.name!r} asks for a retry with {what}; a retry here is the same message again. "
            "Dispatch a new task instead, or keep what changes where the task finds it"
        )


def _seconds(signature: Any) -> float | None:
    """Return the delay that a retry's signature asks for; None leaves it to the consumer's backoff."""
    countdown, eta = signature.options.get("countdown"), signature.options.get("eta")
    if isinstance(eta, datetime.datetime):
        return max(0.0, (eta - datetime.datetime.now(eta.tzinfo)).total_seconds())
    return max(0.0, float(countdown)) if isinstance(countdown, int | float) else None
