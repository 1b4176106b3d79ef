"""The tasks of a Celery app as the Consumer's registry, so that workers keep their `@shared_task` code.

A task is run as in Celery's worker: with its own request, its handlers and Celery's signals. A retry goes through the
settlement instead of the app's broker (app_retries.py); `Ignore` and `Reject` have their meaning of Celery.

Not enforced, because tasks run on threads of one process: soft and hard time limits, rate limits. Without effect:
acks_late and reject_on_worker_lost (a message is acknowledged when its outcome is settled), ignore_result and
track_started (Celery's result backend is not written).
"""

from __future__ import annotations

import importlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from transports.celery.app_retries import TaskRun, intercept, running
from transports.celery.app_tracers import is_instrumented, run_instrumented
from unstract_core.continuation import CONTINUATION_IDS
from unstract_core.errors import ConfigurationError
from unstract_core.observability.log_events import emit
from unstract_core.producer.executor import FAIRNESS_HEADER
from unstract_core.transport import Delivery
from unstract_core.values import type_name
from unstract_core.worker.context import current_delivery
from unstract_core.worker.registry import runnable

logger = logging.getLogger("unstract_wire.celery")

_CELERYS_OWN = "celery."
_LIMITS_OF_ALL = ("task_time_limit", "task_soft_time_limit", "task_default_rate_limit")
WITHOUT_LIMIT = 2**31
"""The attempts of a task whose `max_retries` is None."""


def celery_tasks(app: Any) -> Mapping[str, Callable[..., Any]]:
    """Return the tasks of a Celery app by name, for `Consumer(transport, tasks, queues)`.

    Celery's own tasks are included:

    - `celery.map`, `celery.starmap` and `celery.chunks` run the app's tasks in this process.
    - `celery.backend_cleanup` cleans the app's result backend.
    - The tasks of canvases send through the app's broker.

    Each task has these attributes of its request:

    - `request.id`: the id of the dispatch, the same on every delivery
    - `request.retries`
    - `request.headers`, with fairness as `x-fairness-key`
    - `request.delivery_info`

    Bound tasks, class-based tasks, handlers and signals work. A retry runs later, possibly in another process, up to
    `max_retries` times; only the last error reaches the sender. With `max_retries=0` a task is never run again because
    it raised.

    A task fails with NotSupported in two cases:

    - It asks for a retry with other arguments or options, because a redelivery has the same message.
    - It replaces itself although it has a callback or a reply.

    Args:
        app: The Celery app.

    Raises:
        ConfigurationError: `app` is not a Celery app, has no tasks of its own, or has a task that no thread can run.
    """
    if not all(hasattr(app.__class__, name) for name in ("finalize", "tasks", "loader")):
        kind = f"the class {app.__name__}" if isinstance(app, type) else f"a {type(app).__name__}"
        raise ConfigurationError(f"celery_tasks takes a Celery app, not {kind}")
    app.loader.import_default_modules()
    app.finalize()
    tasks = {name: CeleryTask(task) for name, task in app.tasks.items()}
    if all(name.startswith(_CELERYS_OWN) for name in tasks):
        raise ConfigurationError("the Celery app has no tasks. Import the modules that define them first")
    _keep_django_connected(app)
    limited = sorted(name for name, task in tasks.items() if task.limited and not name.startswith(_CELERYS_OWN))
    for_all = [
        name for name in ("task_time_limit", "task_soft_time_limit", "task_default_rate_limit") if app.conf[name]
    ]
    if limited or for_all:
        fields: dict[str, Any] = {"tasks": ", ".join(limited), "count": len(limited)}
        if for_all:
            fields["of_the_app"] = ", ".join(f"{name}={app.conf[name]}" for name in for_all)
        emit(logger, logging.WARNING, "task_limits_not_enforced", **fields)
    return tasks


class CeleryTask:
    """One task of a Celery app, as a function for the Consumer.

    Args:
        task: The task.

    Attributes:
        asked_attempts: How many deliveries the task may have because it asks for retries (`RetryPolicy`).
        retry_raised: Whether the task may be run again because it raised (`RetryPolicy`).
        limited: Whether the task has a time limit or a rate limit of its own.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        self.asked_attempts = _asked_attempts(task)
        self.retry_raised = _retries(task)
        of_the_app = [task.app.conf[name] for name in _LIMITS_OF_ALL]
        own = (task.time_limit, task.soft_time_limit, task.rate_limit)
        self.limited = any(limit and limit != of_all for limit, of_all in zip(own, of_the_app, strict=True))
        self._celery = _Celery()
        if self._celery.function(task) is not task:
            runnable(task.name, getattr(task, "_orig_run", task.run))
        intercept(task)

    def __repr__(self) -> str:
        return f"<CeleryTask {self.task.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        delivery = current_delivery()
        if delivery is None or running.get() is not None:  # called by another task, for example
            return self.task(*args, **kwargs)
        run = TaskRun.of(self.task, delivery)
        token = running.set(run)
        try:
            result = self._celery.run(run, args, kwargs)
        except BaseException as exc:
            if run.asked is None:
                raise
            raise run.asked from run.reason(exc)
        finally:
            running.reset(token)
        if run.asked is not None:  # with throw=False, or the task caught the exception
            raise run.asked
        return result


def _asked_attempts(task: Any) -> int:
    own, automatic = task.max_retries, (getattr(task, "retry_kwargs", None) or {}).get("max_retries") or 0
    if own is None:
        return WITHOUT_LIMIT
    if not all(isinstance(limit, int | float) for limit in (own, automatic)):
        raise ConfigurationError(f"the max_retries of task {task.name!r} must be a number or None")
    return int(min(1 + max(own, automatic, 0), WITHOUT_LIMIT))


def _retries(task: Any) -> bool:
    """Whether a task may be run again because it raised: not if its own `max_retries` or that of autoretry is 0."""
    automatic = (getattr(task, "retry_kwargs", None) or {}).get("max_retries")
    return not any(isinstance(limit, int | float) and limit <= 0 for limit in (task.max_retries, automatic))


def _traced(celery: _Celery, run: TaskRun, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a task with the handlers and signals of Celery's worker; return its result, or raise its error."""
    task = run.task
    context = (request.id, request.args, request.kwargs)
    fields = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs}
    state, retval, started = None, None, time.monotonic()
    celery.push(task, request)
    try:
        celery.signal("task_prerun", task, task=task, **fields)
        task.app.loader.on_task_init(request.id, task)
        try:
            task.before_start(*context)
            retval = run.call(celery.function(task), args, kwargs)
        except Exception as exc:
            state, retval = celery.state_of(exc), exc
            celery.report(task, request, state, exc)
            raise
        state = "SUCCESS"
        _handled(task.on_success, retval, *context)
        celery.signal("task_success", task, result=retval, runtime=time.monotonic() - started)
        _handled(task.after_return, state, retval, *context, None)
        return retval
    finally:
        try:
            celery.signal("task_postrun", task, task=task, retval=retval, state=state, **fields)
        finally:
            celery.pop(task)
        _handled(task.app.loader.on_process_cleanup)


class _Celery:
    """The parts of Celery that run a task. There is an app, so these modules are imported already."""

    def __init__(self) -> None:
        self._signals = importlib.import_module("celery.signals")
        self._exceptions = importlib.import_module("celery.exceptions")
        self._trace = importlib.import_module("celery.app.trace")
        self._context = importlib.import_module("celery.app.task").Context
        self._stack = importlib.import_module("celery._state")._task_stack
        self._einfo = importlib.import_module("billiard.einfo").ExceptionInfo

    def run(self, run: TaskRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a task, inside the instrumentation of Celery's tracer if there is one."""
        fields = self._request_fields(run.task, run.delivery, list(args), kwargs)

        def traced() -> Any:
            return _traced(self, run, self._context(**fields), args, kwargs)

        if not is_instrumented(self._trace):
            return traced()
        return run_instrumented(self._trace, run.task, fields, traced)

    def _request_fields(self, task: Any, delivery: Delivery, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of `self.request` for a run; headers are attributes too, as in Celery."""
        id = request_id(delivery)
        payload = delivery.payload
        headers: dict[str, Any] = dict((payload.headers if payload is not None else None) or {})
        if payload is not None and payload.fairness is not None:
            headers[FAIRNESS_HEADER] = attrs.asdict(payload.fairness)
        own = {name: value for name, value in headers.items() if not hasattr(self._context, name)}
        return own | {
            "id": id,
            "root_id": id,
            "correlation_id": id,
            "task": task.name,
            "args": args,
            "kwargs": kwargs,
            "retries": delivery.attempt - 1,
            "headers": headers or None,
            "called_directly": False,
            "is_eager": False,
            "hostname": socket.gethostname(),
            "delivery_info": {
                "exchange": "",
                "routing_key": delivery.queue,
                "priority": delivery.priority,
                "redelivered": delivery.attempt > 1,
            },
        }

    def function(self, task: Any) -> Any:
        """Return the callable that Celery's worker calls: the task if it has its own `__call__`, else its `run`."""
        return task if self._trace.task_has_custom(task, "__call__") else task.run

    def push(self, task: Any, request: Any) -> None:
        self._stack.push(task)
        task.request_stack.push(request)

    def pop(self, task: Any) -> None:
        task.request_stack.pop()
        self._stack.pop()

    def state_of(self, exc: Exception) -> str:
        kinds = {"Ignore": "IGNORED", "Reject": "REJECTED", "Retry": "RETRY"}
        states = (state for name, state in kinds.items() if isinstance(exc, getattr(self._exceptions, name)))
        return next(states, "FAILURE")

    def report(self, task: Any, request: Any, state: str, exc: Exception) -> None:
        """Call the handlers and send the signals for a task that did not return."""
        context, einfo = (request.id, request.args, request.kwargs), self._einfo()
        if state == "RETRY":
            _handled(task.on_retry, getattr(exc, "exc", None), *context, einfo)
            self.signal("task_retry", task, request=request, reason=exc, einfo=einfo)
        elif state == "FAILURE":
            _handled(task.on_failure, exc, *context, einfo)
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
            _handled(task.after_return, state, exc, *context, None)

    def signal(self, name: str, sender: Any, /, **fields: Any) -> None:
        """Send one of Celery's signals; Celery logs the errors of its receivers."""
        getattr(self._signals, name).send(sender=sender, **fields)


def request_id(delivery: Delivery) -> str:
    """Return the id of a delivery's request: the id of the dispatch, or else one derived from the message."""
    payload = delivery.payload
    known = (payload.task_id or payload.reply_key) if payload is not None else None
    return known or str(uuid.uuid5(CONTINUATION_IDS, f"{delivery.queue}/{delivery.id}"))


def _handled(handler: Callable[..., Any], *args: Any) -> None:
    """Call a task's handler and log its error, which does not change the outcome of the task."""
    try:
        handler(*args)
    except Exception as exc:
        emit(logger, logging.WARNING, "task_handler_raised", handler=handler.__name__, error_type=type_name(exc))


def _keep_django_connected(app: Any) -> None:
    """Let Celery's Django fixup, if the app has it, close database connections before and after each task."""
    signals = importlib.import_module("celery.signals")
    for fixup in getattr(app, "_fixups", None) or ():
        worker = getattr(fixup, "worker_fixup", None)
        for signal in ("task_prerun", "task_postrun"):
            if (receiver := getattr(worker, f"on_{signal}", None)) is not None:
                getattr(signals, signal).connect(receiver)
