"""OpenTelemetry traces: a span for each send, run and settlement, one trace from a dispatch to its last callback.

    send <queue>              PRODUCER, on the thread that sends
     +-- run <task>           CONSUMER, one for each attempt, around the task; what the task sends itself is below it
          +-- settle <queue>  CLIENT, from the moment at which the outcome was known until it took effect
          +-- run <callback>  CONSUMER, in whatever process the continuation is run

The context travels in the message's `headers`, as the configured propagator writes it. Names and attributes follow the
semantic conventions for messaging: ids, names and numbers, never what a message holds or an error says. A run is a
*child* of its send and not merely linked with it, which the conventions leave open where a consumer works on one
message at a time: who looks for what became of a dispatch finds it in one trace. A later attempt is a child too, a span
of its own, and linked with the send besides. Needs the API alone (extra [otel]); without an SDK nothing is recorded,
and contexts pass through.
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
"""How many runs are remembered until they are settled; one that is forgotten has its settlement below its send."""

_Key: TypeAlias = tuple[str, str, int, str]


@attrs.frozen
class _Run:
    """What is known of a delivery until it is settled: its span, if it was run, and why it failed, if it did."""

    span: Span | None = None
    error_type: str | None = None


class Tracing(Observer):
    """Makes spans of what Dispatchers and Consumers do, any number of them.

    `provider` is the process's own by default. Headers that others have put into a message stay as they are.
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
    """Return the context that a message carries; that of this thread is none of its business."""
    headers = delivery.payload.headers if delivery.payload is not None else None
    return propagate.extract(headers or {}, context=Context())


def _injected(headers: dict[str, str] | None, context: Context) -> dict[str, str] | None:
    """Return headers with a context: without its baggage where all would be too large, and as they were if even so."""
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
    """Mark a span as failed, by the type of its error: the text of it may hold what a message holds."""
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", error_type)
