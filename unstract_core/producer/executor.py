"""The product's three methods that run an executor, with unchanged signatures, over any Dispatcher.

`dispatch` blocks and never raises. `dispatch_async` and `dispatch_with_callback` return at once. They log and raise an
enqueue failure, because a web request must not answer 202 for work that was not accepted.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol, Self

import attrs

from unstract_core.codec import check_name
from unstract_core.errors import ContractError, MalformedPayload, PayloadError
from unstract_core.observability.log_events import NewNames, emit
from unstract_core.payload import DEFAULT_PRIORITY, FairnessKey
from unstract_core.producer.dispatch import Dispatcher, DispatchHandle
from unstract_core.signature import Callback
from unstract_core.transport import Reply
from unstract_core.values import error_text

logger = logging.getLogger("unstract_wire.producer")

EXECUTOR_TASK = "execute_extraction"
QUEUE_PREFIX = "celery_executor_"
TIMEOUT_VARIABLE = "EXECUTOR_RESULT_TIMEOUT"
DEFAULT_TIMEOUT = 3600.0
FAIRNESS_HEADER = "x-fairness-key"


class ExecutionContext(Protocol):
    """The work of an executor and its organisation. `to_dict()` returns the task's only argument, as JSON values."""

    @property
    def executor_name(self) -> str: ...
    @property
    def organization_id(self) -> str | None: ...
    def to_dict(self) -> dict[str, Any]: ...


@attrs.frozen
class ExecutionResult:
    """The result of an executor.

    Raises:
        PayloadError: An attribute has the wrong type, or `error` does not match `success`.
    """

    #: Whether the execution succeeded.
    success: bool
    #: The extracted data; empty by default.
    data: dict[str, Any] = attrs.field(factory=dict)
    #: Data about the execution; empty by default.
    metadata: dict[str, Any] = attrs.field(factory=dict)
    #: The error text of a failure; None for a success.
    error: str | None = None

    def __attrs_post_init__(self) -> None:
        if type(self.success) is not bool:
            raise PayloadError("expected true or false", path="$.success")
        for name in ("data", "metadata"):
            if not isinstance(getattr(self, name), dict):
                raise PayloadError("expected an object", path=f"$.{name}")
        if self.success and self.error is not None:
            raise PayloadError("a success has no error", path="$.error")
        if not self.success and (not isinstance(self.error, str) or not self.error):
            raise PayloadError("a failure needs its error text", path="$.error")

    @classmethod
    def failure(cls, error: str, metadata: dict[str, Any] | None = None) -> Self:
        """Return the result of a failed execution.

        Args:
            error: The error text.
            metadata: Data about the execution; None, the default, for none.

        Raises:
            PayloadError: `error` is empty.
        """
        return cls(success=False, metadata=metadata or {}, error=error)

    @classmethod
    def from_dict(cls, fields: object) -> Self:
        """Decode a result that `to_dict` encoded; unknown keys are ignored.

        Args:
            fields: The encoded result.

        Raises:
            PayloadError: It is not an execution result; `path` is the JSON path of the invalid part.
        """
        if not isinstance(fields, Mapping) or "success" not in fields:
            raise MalformedPayload("expected an object with a success flag", problems=("not an execution result @ $",))
        data, metadata = fields.get("data"), fields.get("metadata")
        return cls(
            success=fields["success"],
            data={} if data is None else data,
            metadata={} if metadata is None else metadata,
            error=fields.get("error"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dict with the keys success, data, metadata and error."""
        return {"success": self.success, "data": self.data, "metadata": self.metadata, "error": self.error}


class ExecutorDispatcher:
    """Dispatches executions to the queue `celery_executor_<executor_name>`.

    Args:
        dispatcher: Sends the tasks.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self._left_out = NewNames()

    def dispatch(
        self, context: ExecutionContext, timeout: float | None = None, headers: Mapping[str, Any] | None = None
    ) -> ExecutionResult:
        """Execute, wait, and return the result. Never raises.

        Args:
            context: The execution.
            timeout: The longest wait in seconds; None, the default, takes EXECUTOR_RESULT_TIMEOUT, else 3600.
            headers: The product's headers; only `x-fairness-key` is sent. None by default.

        Returns:
            The result; a failed enqueue, a failed task, a timeout and an invalid reply are an
            `ExecutionResult.failure` with the error text.
        """
        try:
            seconds = timeout if timeout is not None else default_timeout()
            reply = self.dispatcher.call(EXECUTOR_TASK, timeout=seconds, **self._addressed(context, headers))
        except ContractError as exc:
            log_failure("dispatch", context, exc)
            return ExecutionResult.failure(str(exc) or _unexplained(context, exc))
        except Exception as exc:  # a context's own code may raise anything, and this method never does
            log_failure("dispatch", context, exc)
            return ExecutionResult.failure(error_text(exc))
        try:
            return ExecutionResult.from_dict(reply)
        except PayloadError as exc:
            log_failure("dispatch", context, exc)
            return ExecutionResult.failure(f"the executor's reply is not an execution result ({exc})")

    def dispatch_async(
        self, context: ExecutionContext, headers: Mapping[str, Any] | None = None, within: object | None = None
    ) -> str:
        """Execute without waiting and without callbacks.

        Args:
            context: The execution.
            headers: The product's headers; only `x-fairness-key` is sent. None by default.
            within: The caller's open DB-API cursor, whose transaction the dispatch joins; None, the default, for none.

        Returns:
            The id of the dispatch.

        Raises:
            ContractError: The errors of `Dispatcher.send`, after they are logged.
        """
        try:
            return self.dispatcher.send(EXECUTOR_TASK, **self._addressed(context, headers), within=within).id
        except Exception as exc:
            log_failure("dispatch_async", context, exc)
            raise

    def dispatch_with_callback(
        self,
        context: ExecutionContext,
        on_success: Callback | None = None,
        on_error: Callback | None = None,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        within: object | None = None,
    ) -> DispatchHandle:
        """Execute, then run a callback.

        An executor that returns `success: false` has returned: `on_success` gets that result, as with Celery. Without
        any callback, this is `dispatch_async` under the given id: a task that raises is retried.

        Args:
            context: The execution.
            on_success: The signature of the callback after a result; None, the default, for none.
            on_error: The signature of the callback after an exception; None, the default, for none.
            task_id: The id of the dispatch; None, the default, for a new UUID.
            headers: The product's headers; only `x-fairness-key` is sent. None by default.
            within: The caller's open DB-API cursor, whose transaction the dispatch joins; None, the default, for none.

        Returns:
            The handle of the dispatch.

        Raises:
            ContractError: The errors of `Dispatcher.send_with_callback`, after they are logged.
        """
        try:
            return self.dispatcher.send_with_callback(
                EXECUTOR_TASK,
                on_success=on_success,
                on_error=on_error,
                task_id=task_id,
                **self._addressed(context, headers),
                within=within,
            )
        except Exception as exc:
            log_failure("dispatch_with_callback", context, exc)
            raise

    def status(self, task_id: str) -> Reply | None:
        """Return the stored status of a dispatch.

        Args:
            task_id: The id of the dispatch.

        Returns:
            The status; None if the dispatch is not finished or not known.

        Raises:
            NotSupported: The transport stores no statuses.
            TransportError: The transport cannot be asked now.
        """
        return self.dispatcher.status(task_id)

    def _addressed(self, context: ExecutionContext, headers: Mapping[str, Any] | None) -> dict[str, Any]:
        args = [context.to_dict()]
        check_name(context.executor_name, "$.executor_name")
        addressed = {
            "args": args,
            "queue": executor_queue(context),
            "org_id": context.organization_id,
            "fairness": fairness_from_headers(headers),
        }
        self._note_left_out(headers)
        return addressed

    def _note_left_out(self, headers: Mapping[str, Any] | None) -> None:
        """Log a warning about headers that are not sent, once for the same names."""
        names = tuple(sorted(str(name) for name in headers or () if name != FAIRNESS_HEADER))
        if names and self._left_out.are(names):
            emit(logger, logging.WARNING, "dispatch_headers_left_out", names=NewNames.shown(names), count=len(names))


def _unexplained(context: ExecutionContext, exc: Exception) -> str:
    return f"{EXECUTOR_TASK} on queue {executor_queue(context)!r} failed without an error text ({type(exc).__name__})"


def executor_queue(context: ExecutionContext) -> str:
    """Return the queue of the context's executor."""
    return f"{QUEUE_PREFIX}{context.executor_name}"


def fairness_from_headers(headers: Mapping[str, Any] | None) -> FairnessKey | None:
    """Read the product's `x-fairness-key` header; other headers are for Celery and are not sent.

    Args:
        headers: The headers; None for none.

    Returns:
        The fairness key, whose members are checked when the message is written; None without that header.

    Raises:
        PayloadError: The header is not a mapping.
    """
    key = (headers or {}).get(FAIRNESS_HEADER)
    if key is None:
        return None
    if not isinstance(key, Mapping):
        raise PayloadError(f"expected an object, got {type(key).__name__}", path=f'$.headers["{FAIRNESS_HEADER}"]')
    return FairnessKey(
        org_id=key.get("org_id"),
        workload_type=key.get("workload_type", "non_api"),
        pipeline_priority=key.get("pipeline_priority", DEFAULT_PRIORITY),
    )


def default_timeout() -> float:
    """Return the default wait of a blocking dispatch in seconds: EXECUTOR_RESULT_TIMEOUT, else 3600. Never raises."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds > 0:
        return seconds
    emit(logger, logging.WARNING, "timeout_variable_ignored", variable=TIMEOUT_VARIABLE, default=DEFAULT_TIMEOUT)
    return DEFAULT_TIMEOUT


def log_failure(method: str, context: object, exc: Exception) -> None:
    """Log that a method of a dispatcher failed: WARNING for `dispatch`, and ERROR for a method that raises.

    Args:
        method: The name of the method.
        context: The execution, for its ids.
        exc: The error; only its type is logged.
    """
    emit(
        logger,
        logging.WARNING if method == "dispatch" else logging.ERROR,
        "dispatch_failed",
        method=method,
        executor=_field(context, "executor_name"),
        organization=_field(context, "organization_id"),
        run_id=_field(context, "run_id"),
        error_type=type(exc).__name__,
    )


def _field(context: object, name: str) -> str | None:
    """Return an id for the log; None if the context's own code raises."""
    try:
        value = getattr(context, name, None)
        return value if type(value) is str else None
    except Exception:
        return None
