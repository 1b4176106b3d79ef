"""Send a task: the producer's whole interface, over any transport.

Each method builds one payload, strictly, and hands it over in one `send`. Nothing here blocks on a result but `call`,
and nothing here decides between transports.
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

"""What an error says about the statement that read a reply would be wrong about the task."""


@attrs.frozen
class DispatchHandle:
    """A dispatch that was accepted. It has an id and nothing to block on."""

    id: str


class Dispatcher:
    """Sends tasks over one transport. Thread-safe where the transport is, and cheap to build.

    `observers` look on at each send; they may add `headers` to a message, and decide nothing.
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
        """Send a task and forget it. It is retried with backoff when it raises, and buried in the end.

        A success leaves no trace; a burial leaves the status "failed" under the handle's id. `org_id` defaults to the
        fairness key's; `delay` is in seconds; `within` is the caller's open DB-API cursor.

        Raises PayloadError with a path, or the transport's error: then nothing was sent, unless
        TransportUnavailable says that its fate is unknown.
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
        """Send a task whose end is continued with: `on_success(result, **kwargs)` or `on_error(id, **kwargs)`.

        The callbacks are Celery-shaped signatures (`signature_to_continuation`). `task_id`, a fresh UUID unless
        given, is the handle's id and the key of `status`. The task is never run again because it raised. With neither
        callback it is a plain `send` under that id, retries included. Raises SignatureError besides what `send` raises.
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
        """Send a task, wait up to `timeout` seconds, and return its result.

        There is no `within`: a message that is not committed yet cannot be answered.

        Raises:
            TaskFailed: with the task's error text.
            ReplyTimeout: no reply came in time; the task may still run.
            TransportUnavailable: with `fate_unknown`, the task was sent and its reply cannot be read.
            TransportClosed: with `fate_unknown`, the transport was closed while the call waited.
            ContractError: any other is what `send` raises; the task was not sent.
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
        """Return what is known of a dispatch: None while it is not finished (or was never sent, or is forgotten).

        A plain `send` that succeeded leaves nothing, and stays None. Raises what the transport's `reply` raises.
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
    """Return the error for a reply that could not be read. Its `effect` is left out: it is about the reading."""
    said = exc.problem or type(exc).__name__
    text = (
        f"task {task_name!r} was sent to queue {queue!r} and may have run, and its reply cannot be read: {said} "
        f"(reply key {key}). Look for it before you send it again"
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
