"""The product's three ways to run an executor, unchanged for its call sites, over any Dispatcher.

`dispatch` blocks and never raises; `dispatch_async` and `dispatch_with_callback` return at once and let an enqueue
failure out after logging it, because a web request must not answer 202 for work that was never accepted.
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
    """What is to be executed, and for whom. `to_dict()` is the task's one argument, of plain JSON values."""

    @property
    def executor_name(self) -> str: ...
    @property
    def organization_id(self) -> str | None: ...
    def to_dict(self) -> dict[str, Any]: ...


@attrs.frozen
class ExecutionResult:
    """What an executor returns: `error` is a text exactly when `success` is false."""

    success: bool
    data: dict[str, Any] = attrs.field(factory=dict)
    metadata: dict[str, Any] = attrs.field(factory=dict)
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
        """Return the result of an execution that failed with this text. Raises PayloadError for an empty one."""
        return cls(success=False, metadata=metadata or {}, error=error)

    @classmethod
    def from_dict(cls, fields: object) -> Self:
        """Read what `to_dict` wrote; unknown keys are ignored. Raises PayloadError with the path of what is wrong."""
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
        """Return the result as it travels: success, data, metadata, error."""
        return {"success": self.success, "data": self.data, "metadata": self.metadata, "error": self.error}


class ExecutorDispatcher:
    """Dispatches executions to the queue `celery_executor_<executor_name>`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self._left_out = NewNames()

    def dispatch(
        self, context: ExecutionContext, timeout: float | None = None, headers: Mapping[str, Any] | None = None
    ) -> ExecutionResult:
        """Execute and wait, `timeout` seconds (else EXECUTOR_RESULT_TIMEOUT, else 3600). Never raises.

        A failed enqueue, a failed task, a timeout, and a reply that is empty or no execution result all become
        `ExecutionResult.failure` with the text of what happened.
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
        """Execute without waiting or callbacks; returns the id. Raises what `Dispatcher.send` raises.

        Args:
            within: The caller's own open DB-API cursor: the dispatch is part of its transaction. None (default): it is
                sent at once.
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
        """Execute, then run a callback. With neither callback it is `dispatch_async` under that id: run again if it
        raises. `within` is that of `dispatch_async`. Raises what `Dispatcher.send_with_callback` raises.

        An executor that *returns* `success: false` has returned: `on_success` gets that result, as Celery's link would.
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
        """Return what is known of a dispatch under its id: None while it is not finished (or is not known here).

        Raises what the transport's `reply` raises: NotSupported where it keeps no statuses, TransportError where it
        cannot be asked.
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
        """Warn of headers that are not sent, once for the same names."""
        names = tuple(sorted(str(name) for name in headers or () if name != FAIRNESS_HEADER))
        if names and self._left_out.are(names):
            emit(logger, logging.WARNING, "dispatch_headers_left_out", names=NewNames.shown(names), count=len(names))


def _unexplained(context: ExecutionContext, exc: Exception) -> str:
    return f"{EXECUTOR_TASK} on queue {executor_queue(context)!r} failed without an error text ({type(exc).__name__})"


def executor_queue(context: ExecutionContext) -> str:
    """Return the name of the queue whose workers have the context's executor."""
    return f"{QUEUE_PREFIX}{context.executor_name}"


def fairness_from_headers(headers: Mapping[str, Any] | None) -> FairnessKey | None:
    """Read the product's `x-fairness-key` header; other headers concern Celery alone, and are not sent.

    Raises PayloadError when that header is not a mapping; its members are checked when the message is written.
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
    """Return the seconds that a blocking dispatch waits by itself: EXECUTOR_RESULT_TIMEOUT, else 3600. Never raises."""
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
    """Log that a dispatcher's method failed: ids and the error's type; ERROR where the method lets it out."""
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
    """Read an id for the log; a context whose own code raises must not hide what went wrong before."""
    try:
        value = getattr(context, name, None)
        return value if type(value) is str else None
    except Exception:
        return None
