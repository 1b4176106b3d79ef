"""Traces over Celery's wire: a client's trace continues here, and a Celery worker sees the trace of a dispatch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from celery import Celery, signature
from celery_wire.support import ALIVE, Pipe, real_worker
from consumers import running
from opentelemetry import baggage
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from queues import queue_name

from contract_tests.kit import wait_until
from transports.celery import CeleryTransport
from unstract_core import Consumer, Dispatcher, Tasks
from unstract_core.observability.tracing import Tracing

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

tasks = Tasks()


@tasks.register("give")
def give(*args: object) -> str:
    return str(baggage.get_baggage("tenant"))


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


@contextlib.contextmanager
def at_work(transport: CeleryTransport, tracing: Tracing, *queues: str) -> Iterator[None]:
    with running(Consumer(transport, tasks, queues, observers=[tracing])):
        yield


def runs(exporter: InMemorySpanExporter, number: int) -> list[ReadableSpan]:
    """Wait until so many tasks have been run, and return their spans."""

    def spans() -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.name == "run give"]

    wait_until(lambda: len(spans()) >= number, timeout=ALIVE, what="the runs")
    return spans()


def test_a_clients_trace_reaches_the_callback(
    product: Celery,
    transport: CeleryTransport,
    tracing: Tracing,
    exporter: InMemorySpanExporter,
    make_queue: Callable[[], str],
) -> None:
    """The run is below the client's span, and the run of its link below that."""
    queue, callback_queue = make_queue(), make_queue()
    headers = {"traceparent": PARENT, "tracestate": "vendor=1", "baggage": "tenant=acme"}
    with at_work(transport, tracing, queue, callback_queue):
        task = product.signature("give", queue=queue, link=signature("give", queue=callback_queue))
        result = task.apply_async(headers=headers)
        assert result.get(timeout=ALIVE) == "acme"
        first, second = runs(exporter, 2)
    assert {span.context.trace_id for span in (first, second)} == {TRACE}
    assert first.parent is not None
    assert first.parent.span_id == 0xB7AD6B7169203331
    assert second.parent is not None
    assert second.parent.span_id == first.context.span_id
    assert second.context.trace_state.get("vendor") == "1"


def test_a_dispatchers_trace_reaches_the_callback(
    transport: CeleryTransport, tracing: Tracing, exporter: InMemorySpanExporter, queue: str
) -> None:
    """A trace of the Dispatcher continues in the Consumer, over a broker as over a database."""
    with at_work(transport, tracing, queue):
        Dispatcher(transport, observers=[tracing]).send("give", queue=queue)
        (run,) = runs(exporter, 1)
    (send,) = [span for span in exporter.get_finished_spans() if span.name == f"send {queue}"]
    assert run.parent is not None
    assert (run.parent.span_id, run.parent.trace_id) == (send.context.span_id, send.context.trace_id)


def test_a_real_worker_sees_the_trace(
    rabbitmq_url: str, transport: CeleryTransport, tracing: Tracing, exporter: InMemorySpanExporter, pipe: Pipe
) -> None:
    """`traceparent` and `baggage` are in the task's `request.headers`, where Celery's instrumentation reads them."""
    queue = queue_name()
    token = attach(baggage.set_baggage("tenant", "acme"))
    try:
        with real_worker(rabbitmq_url, [queue], app="traced_app"):
            dispatcher = Dispatcher(transport, observers=[tracing])
            seen = dispatcher.call("trace", queue=queue, timeout=ALIVE)
    finally:
        detach(token)
    (send,) = exporter.get_finished_spans()
    assert isinstance(seen, dict)
    assert str(seen.pop("traceparent")).startswith(f"00-{send.context.trace_id:032x}-{send.context.span_id:016x}-")
    assert seen == {"tracestate": None, "baggage": "tenant=acme"}
