"""Send a task over a transport.

Each method builds one payload with strict checks and passes it to the transport in one `send`. Only `call` waits for a
result. The choice between two transports is in routing.py.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    NotSupported,
    PayloadError,
    ReplyTimeout,
    SignatureError,
    TaskFailed,
    TransportClosed,
    TransportUnavailable,
)
from unstract_core.observability.observer import Observer, Observers
from unstract_core.payload import DEFAULT_PRIORITY, ContinuationSpec, FairnessKey, TaskPayload
from unstract_core.signature import Callback, signature_to_continuation
from unstract_core.transport import Message, Reply, Transport
from unstract_core.values.limits import JSONValue


@attrs.frozen
class DispatchHandle:
    """A dispatch that the transport has accepted."""

    #: The id of the dispatch, for `Dispatcher.status`.
    id: str


class Dispatcher:
    """Sends tasks over one transport. Thread-safe if the transport is.

    Args:
        transport: The transport.
        observers: Observers of each send; they may add `headers` to a message. None by default.
    """

    def __init__(self, transport: Transport, *, observers: Sequence[Observer] = ()) -> None:
        self.transport = transport
        self._observers = Observers(observers)

    def send(
        self,
        task_name: str,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        queue: str,
        org_id: str | None = None,
        fairness: FairnessKey | None = None,
        delay: float = 0.0,
        within: object | None = None,
    ) -> DispatchHandle:
        """Send a task without a callback or a reply.

        A task that raises is retried with backoff, and becomes a dead letter after its last attempt. A success stores
        no status; a dead letter stores the status "failed" under the id of the dispatch.

        Args:
            task_name: The name of the task.
            args: The positional arguments; empty by default.
            kwargs: The keyword arguments; None, the default, for none.
            queue: The queue.
            org_id: The organisation; None, the default, takes that of `fairness`.
            fairness: The organisation and the priority; None, the default, for the default priority.
            delay: Seconds before the task may start; 0 by default.
            within: The caller's open DB-API cursor, whose transaction the send joins; None, the default, for none.

        Returns:
            The handle of the dispatch.

        Raises:
            PayloadError: The wire cannot carry an argument; nothing was sent.
            TransportError: The transport failed. Nothing was sent, unless `fate_unknown` of TransportUnavailable is
                True.
            NotSupported: The transport supports no `delay` or no `within`; nothing was sent.
        """
        payload = _payload(task_name, args, kwargs, queue, fairness, task_id=str(uuid.uuid4()))
        return self._send(payload, org_id=org_id, delay=delay, within=within)

    def send_with_callback(
        self,
        task_name: str,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        queue: str,
        on_success: Callback | None = None,
        on_error: Callback | None = None,
        task_id: str | None = None,
        org_id: str | None = None,
        fairness: FairnessKey | None = None,
        delay: float = 0.0,
        within: object | None = None,
    ) -> DispatchHandle:
        """Send a task with a callback: `on_success(result, **kwargs)` or `on_error(task_id, **kwargs)`.

        A task that raises is not retried: its `on_error` callback is sent. Without any callback, this is `send` under
        the given id, with retries.

        Args:
            task_name: The name of the task.
            args: The positional arguments; empty by default.
            kwargs: The keyword arguments; None, the default, for none.
            queue: The queue.
            on_success: The signature of the callback after a success; None, the default, for none.
            on_error: The signature of the callback after a failure; None, the default, for none.
            task_id: The id of the dispatch; None, the default, for a new UUID.
            org_id: The organisation; None, the default, takes that of `fairness`.
            fairness: The organisation and the priority; None, the default, for the default priority.
            delay: Seconds before the task may start; 0 by default.
            within: The caller's open DB-API cursor, whose transaction the send joins; None, the default, for none.

        Returns:
            The handle of the dispatch.

        Raises:
            SignatureError: A continuation cannot represent a callback; nothing was sent.
            PayloadError: The wire cannot carry an argument; nothing was sent.
            TransportError: The transport failed. Nothing was sent, unless `fate_unknown` of TransportUnavailable is
                True.
            NotSupported: The transport supports no `delay` or no `within`; nothing was sent.
        """
        payload = _payload(
            task_name,
            args,
            kwargs,
            queue,
            fairness,
            task_id=str(uuid.uuid4()) if task_id is None else task_id,
            on_success=_continuation(on_success, "on_success"),
            on_error=_continuation(on_error, "on_error"),
        )
        return self._send(payload, org_id=org_id, delay=delay, within=within)

    def call(
        self,
        task_name: str,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        queue: str,
        timeout: float,
        org_id: str | None = None,
        fairness: FairnessKey | None = None,
        delay: float = 0.0,
    ) -> JSONValue:
        """Send a task, wait for its reply, and return its result.

        There is no `within`: a worker cannot see a message before the transaction is committed.

        Args:
            task_name: The name of the task.
            args: The positional arguments; empty by default.
            kwargs: The keyword arguments; None, the default, for none.
            queue: The queue.
            timeout: The longest wait for the reply, in seconds.
            org_id: The organisation; None, the default, takes that of `fairness`.
            fairness: The organisation and the priority; None, the default, for the default priority.
            delay: Seconds before the task may start; 0 by default.

        Returns:
            The task's result.

        Raises:
            TaskFailed: The task failed; the text is the task's error.
            ReplyTimeout: No reply came in time; the task may still run.
            TransportUnavailable: With `fate_unknown`, the task was sent and its reply cannot be read.
            TransportClosed: With `fate_unknown`, the transport was closed while the call waited.
            ContractError: Any other error is one of `send`: the task was not sent.
        """
        if not timeout > 0:
            raise ConfigurationError(f"timeout must be a positive number of seconds, not {timeout!r}")
        key = str(uuid.uuid4())
        payload = _payload(task_name, args, kwargs, queue, fairness, reply_key=key)
        self._send(payload, org_id=org_id, delay=delay, within=None)
        deadline = time.monotonic() + timeout
        try:
            reply = self.transport.reply(key, timeout=timeout, consume=True)
        except TransportClosed as exc:
            exc.fate_unknown = True
            raise
        except NotSupported:
            raise
        except ContractError as exc:
            raise _no_reply(exc, task_name, queue, key, in_time=time.monotonic() < deadline) from exc
        if reply is None:
            raise ReplyTimeout(
                f"no reply from task {task_name!r} on queue {queue!r} within {timeout:g} s; "
                f"is a worker running for that queue, and a Celery worker with a result backend? (reply key {key})"
            )
        if reply.status == "failed":
            raise TaskFailed(reply.error)
        return reply.result

    def status(self, task_id: str) -> Reply | None:
        """Return the stored status of a dispatch.

        Args:
            task_id: The id of the dispatch, such as `handle.id`.

        Returns:
            The status; None if the dispatch is not finished, was never sent, has expired, or was a successful `send`.

        Raises:
            PayloadError: `task_id` is not a text.
            NotSupported: The transport stores no statuses.
            TransportError: The transport cannot be asked now.
        """
        if not isinstance(task_id, str):
            raise PayloadError(
                f"expected the id of a dispatch, a text such as handle.id, got {type(task_id).__name__}",
                path="$.task_id",
            )
        return self.transport.reply(task_id)

    def _send(self, payload: TaskPayload, *, org_id: str | None, delay: float, within: object | None) -> DispatchHandle:
        fairness = payload.fairness
        if fairness is not None and not isinstance(fairness, FairnessKey):
            raise PayloadError(f"expected a FairnessKey, got {type(fairness).__name__}", path="$.fairness")
        if org_id is None:
            org_id = fairness.org_id if fairness is not None else None
        message = Message(
            payload,
            payload.queue,
            org_id=org_id or "",
            priority=DEFAULT_PRIORITY if fairness is None else fairness.pipeline_priority,
            delay=delay,
        )
        with self._observers.sending(message) if self._observers else contextlib.nullcontext(message) as observed:
            (message_id,) = self.transport.send([observed], within=within)
        return DispatchHandle(payload.task_id or payload.reply_key or message_id)


def _no_reply(exc: ContractError, task_name: str, queue: str, key: str, *, in_time: bool) -> ContractError:
    """Return the error for a reply that could not be read. Its `effect` is omitted, because it is about the read."""
    said = exc.problem or type(exc).__name__
    text = (
        f"task {task_name!r} was sent to queue {queue!r} and may have run, and its reply cannot be read: {said} "
        f"(reply key {key}). Check whether it ran before you send it again"
    )
    return TransportUnavailable(text, fate_unknown=True) if in_time else ReplyTimeout(text)


def _payload(
    task_name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    queue: str,
    fairness: FairnessKey | None,
    *,
    task_id: str | None = None,
    reply_key: str | None = None,
    on_success: ContinuationSpec | None = None,
    on_error: ContinuationSpec | None = None,
) -> TaskPayload:
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise PayloadError(f"expected a list or tuple, got {type(args).__name__}", path="$.args")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise PayloadError(f"expected a dict, got {type(kwargs).__name__}", path="$.kwargs")
    return TaskPayload(
        task_name=task_name,
        args=list(args),
        kwargs=dict(kwargs or {}),
        queue=queue,
        fairness=fairness,
        reply_key=reply_key,
        on_success=on_success,
        on_error=on_error,
        task_id=task_id,
    )


def _continuation(sig: Callback | None, name: str) -> ContinuationSpec | None:
    try:
        return signature_to_continuation(sig)
    except SignatureError as exc:
        raise SignatureError(exc.problem, path=exc.path.replace("$", f"$.{name}", 1)) from exc
