"""The product's three methods over its own Celery app, for dispatches while the gate is off.

Each dispatch is one `app.send_task` of the executor's task, as in the product's own dispatcher, with the caller's own
headers and Signature objects. Empty headers and options that are None are omitted. This module does not check, copy or
normalise the arguments: while the gate is off, the product's Celery must write the same bytes as before. This module
does not import celery: the app is the product's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from unstract_core.errors import ConfigurationError, MalformedPayload, NotSupported, PayloadError, TransportUnavailable
from unstract_core.producer.dispatch import DispatchHandle
from unstract_core.producer.executor import (
    EXECUTOR_TASK,
    ExecutionContext,
    ExecutionResult,
    default_timeout,
    executor_queue,
    log_failure,
)
from unstract_core.transport import Reply
from unstract_core.values import cut, error_text, normalise, type_name

_FAILED = ("FAILURE", "REVOKED")
_UNREADABLE = ("disabled", "rpc")
"""Celery's result backends that cannot be read: none, or one whose results only the sender may read, once."""


class CeleryApp(Protocol):
    """The part of `celery.Celery` that is used; only `status` uses `AsyncResult`."""

    def send_task(self, name: str, /, **options: Any) -> Any: ...
    def AsyncResult(self, id: str, /) -> Any: ...  # noqa: N802 - Celery's own name


class CeleryAppDispatcher:
    """Dispatches executions through a Celery app, to the queue `celery_executor_<executor_name>`.

    It is as thread-safe as the app.

    Args:
        app: The Celery app: an object with `send_task`.

    Raises:
        ConfigurationError: `app` is not a Celery app.
    """

    def __init__(self, app: CeleryApp) -> None:
        if isinstance(app, type) or not callable(getattr(app, "send_task", None)):
            kind = f"the class {app.__name__}" if isinstance(app, type) else f"a {type(app).__name__}"
            raise ConfigurationError(f"app is {kind}, which cannot send_task: pass the Celery app object itself")
        self.app = app

    def dispatch(
        self, context: ExecutionContext, timeout: float | None = None, headers: Mapping[str, Any] | None = None
    ) -> ExecutionResult:
        """Execute and wait for the result. Never raises.

        A failed enqueue, a failed task, a timeout and an invalid reply all become `ExecutionResult.failure` with the
        text `Type: message`.

        Args:
            context: The execution.
            timeout: The time in seconds to wait; None (default) for EXECUTOR_RESULT_TIMEOUT, or else 3600. Celery waits
                without a limit if it is 0.
            headers: The headers of the message; None (default) for none.
        """
        try:
            seconds = default_timeout() if timeout is None else timeout
            reply = _waited(self._send(context, headers=headers), seconds, context)
            return _execution_result(reply)
        except Exception as exc:
            log_failure("dispatch", context, exc)
            return ExecutionResult.failure(error_text(exc))

    def dispatch_async(
        self, context: ExecutionContext, headers: Mapping[str, Any] | None = None, within: object | None = None
    ) -> str:
        """Execute without waiting or callbacks; return the id. An error of `send_task` is logged and raised.

        Args:
            context: The execution.
            headers: The headers of the message; None (default) for none.
            within: Not supported; None.

        Raises:
            NotSupported: `within` is given: a broker has no part in a database transaction.
        """
        try:
            _check_within(within)
            task_id: str = self._send(context, headers=headers).id
        except Exception as exc:
            log_failure("dispatch_async", context, exc)
            raise
        return task_id

    def dispatch_with_callback(
        self,
        context: ExecutionContext,
        on_success: Any | None = None,
        on_error: Any | None = None,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        within: object | None = None,
    ) -> DispatchHandle:
        """Execute; Celery then runs `on_success` as its link or `on_error` as its link_error.

        An error of `send_task` is logged and raised.

        Args:
            context: The execution.
            on_success: The callback after a success; None (default) for none.
            on_error: The callback after a failure; None (default) for none.
            task_id: The id of the task and of the handle; None (default) lets Celery choose it.
            headers: The headers of the message; None (default) for none.
            within: Not supported; None.

        Raises:
            NotSupported: `within` is given: a broker has no part in a database transaction.
        """
        try:
            _check_within(within)
            sent = self._send(context, headers=headers, link=on_success, link_error=on_error, task_id=task_id)
            return DispatchHandle(sent.id)
        except Exception as exc:
            log_failure("dispatch_with_callback", context, exc)
            raise

    def status(self, task_id: str) -> Reply | None:
        """Return the outcome of a task; None if the task has not ended, or its result has expired.

        A task that succeeded has the status "completed", with its result normalised leniently. A task that failed or
        was revoked has the status "failed", with the text `Type: message`.

        Raises:
            NotSupported: The app has no result backend, or rpc://, whose results only the sending process can read.
            TransportUnavailable: The result backend cannot be reached.
        """
        try:
            result = self._result(task_id)
            if _scheme(result) in _UNREADABLE:
                raise _no_backend(_scheme(result))
            return _reply(task_id, result.state, result)
        except NotImplementedError as exc:
            raise _no_backend("none") from exc
        except NotSupported:
            raise
        except Exception as exc:
            raise TransportUnavailable(
                f"Celery's result backend cannot be reached for task {task_id!r}: {error_text(exc)}"
            ) from exc

    def _result(self, task_id: str) -> Any:
        try:
            return self.app.AsyncResult(task_id)
        except AttributeError as exc:  # raised later it means a broken backend
            raise _no_backend("none") from exc

    def _send(self, context: ExecutionContext, *, headers: Mapping[str, Any] | None, **options: Any) -> Any:
        given = {name: value for name, value in options.items() if value is not None}
        if headers:  # the product's dispatcher does not pass empty ones
            given["headers"] = headers
        return self.app.send_task(EXECUTOR_TASK, args=[context.to_dict()], queue=executor_queue(context), **given)


def _check_within(within: object | None) -> None:
    if within is not None:
        raise NotSupported(
            "a dispatch through Celery cannot join a transaction (within=...); nothing was sent. Dispatch after the "
            "commit, for example from Django's transaction.on_commit, or over PostgreSQL"
        )


def _waited(result: Any, seconds: float, context: ExecutionContext) -> object:
    """Return the result of a task, or raise its error; a timeout names the task, its queue and the time waited."""
    started = time.monotonic()
    try:
        return result.get(timeout=seconds, disable_sync_subtasks=False)
    except Exception as exc:
        if type_name(exc) != "TimeoutError":  # Celery's own, or Python's
            raise
        waited = time.monotonic() - started
        hint = "; is a Celery worker running for it, with a result backend?" if waited >= seconds else ""
        where = f"task {result.id} on queue {executor_queue(context)!r}"
        raise TimeoutError(f"{exc} (waited {waited:.2f} of {seconds:g} s for {where}{hint})") from exc


def _execution_result(reply: object) -> ExecutionResult:
    try:
        return ExecutionResult.from_dict(reply)
    except PayloadError as exc:
        raise MalformedPayload(f"the executor's reply is not an execution result ({exc})") from exc


def _scheme(result: Any) -> str:
    """Return Celery's name for the kind of a result's backend; "" if it has none."""
    try:
        return str(result.backend.as_uri()).partition(":")[0]
    except Exception:
        return ""


def _no_backend(backend: str) -> NotSupported:
    return NotSupported(
        f"this Celery app has no results that this process can read (result backend: {backend}). "
        "Set result_backend to one that every process can read, such as redis:// or db+postgresql://"
    )


def _reply(task_id: str, state: str, result: Any) -> Reply | None:
    if state == "SUCCESS":
        return Reply(task_id, "completed", result=normalise(result.result, lenient=True))
    if state in _FAILED:
        return Reply(task_id, "failed", error=_failure_text(result.result) or state)
    return None


def _failure_text(failure: object) -> str:
    return error_text(failure) if isinstance(failure, BaseException) else cut(str(failure or ""))
