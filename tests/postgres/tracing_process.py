"""A traced process for test_traces.py: `python -m postgres.tracing_process URL SCHEMA FILE QUEUE [CALLBACKS]`.

With CALLBACKS it is a producer, which sends one task to QUEUE and its callbacks to CALLBACKS. Otherwise it is a worker
of QUEUE, which exits after it has settled one message. It writes its spans to FILE, one JSON object per line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from transports.postgres import PostgresTransport
from unstract_core import Consumer, Dispatcher, Observer, Settlement, Tasks
from unstract_core.observability.tracing import Tracing

tasks = Tasks()


@tasks.register("extract")
def extract() -> dict[str, str]:
    return {"total": "118.40"}


@tasks.register("saved")
def saved(result: object) -> None:
    """The callback."""


class Signature:
    def __init__(self, queue: str) -> None:
        self.task, self.args, self.options = "saved", (), {"queue": queue}
        self.kwargs: dict[str, str] = {}


class ToFile(SpanExporter):
    def __init__(self, path: Path) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._path.open("a") as file:
            for span in spans:
                parent = None if span.parent is None else span.parent.span_id
                fields = {
                    "name": span.name,
                    "trace": span.context.trace_id,
                    "id": span.context.span_id,
                    "parent": parent,
                    "conversation": (span.attributes or {}).get("messaging.message.conversation_id"),
                }
                file.write(json.dumps(fields) + "\n")
        return SpanExportResult.SUCCESS


class Once(Observer):
    """Stops its consumer after the first settlement."""

    consumer: Consumer

    def settled(self, settlement: Settlement, seconds: float) -> None:
        self.consumer.stop()


def main(url: str, schema: str, path: str, queue: str, callbacks: str = "") -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ToFile(Path(path))))
    tracing = Tracing(provider)
    transport = PostgresTransport(url, schema)
    if callbacks:
        dispatcher = Dispatcher(transport, observers=[tracing])
        with provider.get_tracer("product").start_as_current_span("request"):
            dispatcher.send_with_callback("extract", queue=queue, on_success=Signature(callbacks), task_id="d-1")
    else:
        once = Once()
        once.consumer = Consumer(transport, tasks, [queue], observers=[tracing, once])
        once.consumer.run()
    transport.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
