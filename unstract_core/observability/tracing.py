"""OpenTelemetry traces: a span for each send, run and settlement, one trace from a dispatch to its last callback.

    send <queue>              PRODUCER, on the thread that sends
     +-- run <task>           CONSUMER, one for each attempt; the task's own sends are its children
          +-- settle <queue>  CLIENT, from the end of the task until the settlement took effect
          +-- run <callback>  CONSUMER, in the process that runs the continuation

The context is stored in the message's `headers` by the configured propagator. Names and attributes follow the semantic
conventions for messaging. They are ids, names and numbers, never payload content or error texts. A run is a child of
its send, which the conventions allow for a consumer of single messages: one trace shows a whole dispatch. A later
attempt is also a child, and has a link to the send. This module needs only the OpenTelemetry API (extra [otel]).
Without an SDK no span is recorded, and contexts are passed on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeAlias

import attrs

from unstract_core.codec import check_headers
from unstract_core.errors import ConfigurationError, PayloadError
from unstract_core.observability.observer import LeaseLostEvent, Observer, TaskFinished
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery, Message, Settlement
from unstract_core.values import type_name

try:
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context, attach, detach
    from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider
except ImportError as exc:
    raise ConfigurationError(
        "tracing needs opentelemetry, which is not installed: pip install 'unstract-wire[otel]'"
    ) from exc

SYSTEM = "unstract_wire"
BAGGAGE = "baggage"
MOST_OPEN = 10_000
"""The highest number of unsettled runs that are remembered; with more, a settlement becomes a child of the send."""

_Key: TypeAlias = tuple[str, str, int, str]


@attrs.frozen
class _Run:
    """The span of a delivery that is not settled, and its error type; both may be None."""

    span: Span | None = None
    error_type: str | None = None


class Tracing(Observer):
    """Records spans of any number of Dispatchers and Consumers. Existing headers of a message are kept.

    Args:
        provider: The tracer provider; None, the default, for the global one.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("unstract_core", tracer_provider=provider)
        self._runs: OrderedDict[_Key, _Run] = OrderedDict()
        self._lock = threading.Lock()
        self._here = threading.local()

    @contextlib.contextmanager
    def sending(self, message: Message) -> Iterator[Message]:
        payload = message.payload
        span = self._tracer.start_span(
            f"send {message.queue}", kind=SpanKind.PRODUCER, attributes=_attributes("send", message.queue, payload)
        )
        try:
            context = trace.set_span_in_context(span)
            yield attrs.evolve(message, payload=attrs.evolve(payload, headers=_injected(payload.headers, context)))
        except BaseException as exc:
            _failed(span, type_name(exc))
            raise
        finally:
            span.end()

    @contextlib.contextmanager
    def running(self, delivery: Delivery) -> Iterator[dict[str, str] | None]:
        payload = delivery.payload
        if payload is None:
            yield None
            return
        sender = _context(delivery)
        created = trace.get_current_span(sender).get_span_context()
        span = self._tracer.start_span(
            f"run {payload.task_name}",
            context=sender,
            kind=SpanKind.CONSUMER,
            attributes={**_attributes("process", delivery.queue, payload, "run"), **_delivered(delivery)},
            links=[Link(created)] if delivery.attempt > 1 and created.is_valid else None,
        )
        self._remember(delivery, _Run(span))
        self._here.span = span
        context = trace.set_span_in_context(span, sender)
        token = attach(context)
        try:
            yield _injected(payload.headers, context)
        finally:
            detach(token)
            self._here.span = None
            span.end()

    def on_task_finished(self, event: TaskFinished) -> None:
        span: Span | None = getattr(self._here, "span", None)
        if span is None:
            return
        span.set_attribute(f"{SYSTEM}.end", event.end)
        if event.replaced:
            span.set_attribute(f"{SYSTEM}.replaced", event.replaced)
        if event.error_type is not None and event.end in ("raised", "rejected"):
            _failed(span, event.error_type)

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self._remember(delivery, _Run(error_type=error_type))

    def settled(self, settlement: Settlement, seconds: float) -> None:
        delivery = settlement.delivery
        run = self._forget(delivery)
        if not settlement.counted:
            return
        now = time.time_ns()
        below = _context(delivery) if run.span is None else trace.set_span_in_context(run.span, Context())
        attributes = {
            **_attributes("settle", delivery.queue, delivery.payload),
            **_delivered(delivery),
            f"{SYSTEM}.verdict": settlement.verdict.value,
        }
        if settlement.follow_up is not None:
            attributes[f"{SYSTEM}.follow_up.queue"] = settlement.follow_up.queue
            attributes[f"{SYSTEM}.follow_up.task_id"] = settlement.follow_up.payload.task_id or ""
        span = self._tracer.start_span(
            f"settle {delivery.queue}",
            context=below,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=now - int(seconds * 1e9),
        )
        if run.error_type is not None:
            _failed(span, run.error_type)
        span.end(now)

    def on_lease_lost(self, event: LeaseLostEvent) -> None:
        span = self._forget(event.delivery).span
        if span is not None:
            span.add_event(f"{SYSTEM}.lease_lost")

    def _remember(self, delivery: Delivery, run: _Run) -> None:
        with self._lock:
            self._runs[_key(delivery)] = run
            if len(self._runs) > MOST_OPEN:
                self._runs.popitem(last=False)

    def _forget(self, delivery: Delivery) -> _Run:
        with self._lock:
            return self._runs.pop(_key(delivery), None) or _Run()


def _key(delivery: Delivery) -> _Key:
    return delivery.queue, delivery.id, delivery.attempt, delivery.fence


def _context(delivery: Delivery) -> Context:
    """Return the context in a message's headers; the context of this thread is not used."""
    headers = delivery.payload.headers if delivery.payload is not None else None
    return propagate.extract(headers or {}, context=Context())


def _injected(headers: dict[str, str] | None, context: Context) -> dict[str, str] | None:
    """Return headers with a context; if they become too large, without its baggage, or else unchanged."""
    carried: dict[str, str] = {}
    propagate.inject(carried, context=context)
    bare = {name: value for name, value in carried.items() if name != BAGGAGE}
    for more in (carried, bare):
        with contextlib.suppress(PayloadError):
            return check_headers({**(headers or {}), **more}, "$.headers") or None
    return headers


def _attributes(kind: str, queue: str, payload: TaskPayload | None, name: str | None = None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "messaging.system": SYSTEM,
        "messaging.operation.type": kind,
        "messaging.operation.name": name or kind,
        "messaging.destination.name": queue,
    }
    if payload is not None:
        attributes[f"{SYSTEM}.task"] = payload.task_name
        if (conversation := payload.task_id or payload.reply_key) is not None:
            attributes["messaging.message.conversation_id"] = conversation
    return attributes


def _delivered(delivery: Delivery) -> dict[str, Any]:
    return {"messaging.message.id": delivery.id, f"{SYSTEM}.attempt": delivery.attempt}


def _failed(span: Span, error_type: str) -> None:
    """Mark a span as failed with the type of its error; the error's text may quote the payload."""
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", error_type)
