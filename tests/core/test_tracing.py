"""Traces: a dispatch, its runs, its settlements and its callbacks are one trace without payload content."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from contract_tests.messages import message, then
from tools.check_lock import ROOT
from transports.memory import MemoryTransport
from unstract_core import Consumer, Delivery, Dispatcher, PayloadError, RetryLater, Settlement, Verdict
from unstract_core.observability.observer import LeaseLostEvent, Observers
from unstract_core.observability.tracing import MOST_OPEN, Tracing

QUEUE = "q"
SECRET = "the contents of the document"  # noqa: S105 - it stands for one
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Bench:
    """A transport, a tracer that keeps its spans, and tasks."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(**options)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("the product")
        self.tracing = Tracing(provider)
        self.transport = MemoryTransport()
        self.dispatcher = Dispatcher(self.transport, observers=[self.tracing])
        self.seen: list[Mapping[str, str] | None] = []
        self.tasks: dict[str, Callable[..., Any]] = {
            "ok": lambda *_, **__: SECRET,
            "fail": self.fail,
            "later": self.later,
            "look": lambda *_: self.seen.append(baggage.get_all()),  # type: ignore[arg-type]
            "send": lambda *_: self.dispatcher.send("ok", queue=QUEUE),
        }

    def fail(self, *_: Any) -> None:
        raise ValueError(SECRET)

    def later(self, *_: Any) -> None:
        raise RetryLater(delay=0)

    def work(self, **options: Any) -> dict[str, ReadableSpan]:
        """Run all waiting messages, and return the last span of each name."""
        Consumer(self.transport, self.tasks, [QUEUE], observers=[self.tracing], **options).drain()
        return {span.name: span for span in self.spans}

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return tuple(self.exporter.get_finished_spans())

    def waiting(self) -> Delivery:
        """Receive the only waiting message."""
        subscription = self.transport.subscribe([QUEUE], lease=60.0)
        (delivery,) = subscription.receive(limit=1, wait=0)
        subscription.close()
        return delivery


@pytest.fixture
def bench() -> Bench:
    return Bench()


def parent_of(span: ReadableSpan, spans: Mapping[str, ReadableSpan]) -> str | None:
    """Return the name of a span's parent among these, or its id if it is not one of them."""
    if span.parent is None:
        return None
    names = {one.context.span_id: name for name, one in spans.items()}
    return names.get(span.parent.span_id, f"{span.parent.span_id:016x}")


def traces(spans: Mapping[str, ReadableSpan]) -> set[int]:
    return {span.context.trace_id for span in spans.values()}


class Signature:
    def __init__(self, task: str, **kwargs: Any) -> None:
        self.task, self.args, self.kwargs, self.options = task, (), kwargs, {"queue": QUEUE}


def test_dispatch_and_callback_are_one_trace(bench: Bench) -> None:
    """The run is a child of the send, and the settlement and the callback's run are children of the run."""
    with bench.tracer.start_as_current_span("request"):
        bench.dispatcher.send_with_callback("ok", queue=QUEUE, on_success=Signature("look"))
    Consumer(bench.transport, bench.tasks, [QUEUE], observers=[bench.tracing]).drain()
    spans = {span.name: span for span in bench.spans if span.name != f"settle {QUEUE}"}
    assert {name: parent_of(span, spans) for name, span in spans.items()} == {
        "request": None,
        f"send {QUEUE}": "request",
        "run ok": f"send {QUEUE}",
        "run look": "run ok",
    }
    settlements = [span for span in bench.spans if span.name == f"settle {QUEUE}"]
    assert sorted(str(parent_of(span, spans)) for span in settlements) == ["run look", "run ok"]
    assert len({span.context.trace_id for span in bench.spans}) == 1
    kinds = {span.name: span.kind for span in bench.spans}
    assert (kinds[f"send {QUEUE}"], kinds["run ok"]) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert kinds[f"settle {QUEUE}"] is SpanKind.CLIENT


def test_sends_of_a_task_are_its_children(bench: Bench) -> None:
    """The task's thread has the context of the run while the task runs, and not afterwards."""
    bench.dispatcher.send("send", queue=QUEUE)
    bench.work()
    by_id = {span.context.span_id: span for span in bench.spans}
    (run,) = [span for span in bench.spans if span.name == "run ok"]
    path = []
    while run.parent is not None:
        run = by_id[run.parent.span_id]
        path.append(run.name)
    assert path == [f"send {QUEUE}", "run send", f"send {QUEUE}"]


def test_thread_leaves_the_trace_after_the_task(bench: Bench) -> None:
    """After a task the thread has its earlier context, even if the task left another one attached."""
    with bench.tracer.start_as_current_span("before") as before:
        with bench.tracing.running(delivery("ok")):
            inside = trace.get_current_span()
        assert trace.get_current_span() is before
    assert isinstance(inside, ReadableSpan)
    assert inside.name == "run ok"


def test_spans_have_the_attributes_of_the_conventions(bench: Bench) -> None:
    """Spans have system, operation, destination and message ids, the task, the attempt, the end and the verdict."""
    handle = bench.dispatcher.send_with_callback("ok", queue=QUEUE, on_success=Signature("ok"), task_id="d-1")
    bench.work()
    common = {
        "messaging.system": "unstract_wire",
        "messaging.destination.name": QUEUE,
        "messaging.message.conversation_id": handle.id,
        "unstract_wire.task": "ok",
    }
    send, run, settle = (
        next(dict(span.attributes or {}) for span in bench.spans if span.name == name)
        for name in (f"send {QUEUE}", "run ok", f"settle {QUEUE}")
    )
    assert send == {**common, "messaging.operation.type": "send", "messaging.operation.name": "send"}
    identified = {"messaging.message.id": run["messaging.message.id"], "unstract_wire.attempt": 1}
    assert isinstance(identified["messaging.message.id"], str)
    assert run == {
        **common,
        **identified,
        "messaging.operation.type": "process",
        "messaging.operation.name": "run",
        "unstract_wire.end": "returned",
    }
    assert re.fullmatch(r"[0-9a-f-]{36}", str(settle.pop("unstract_wire.follow_up.task_id")))
    assert settle == {
        **common,
        **identified,
        "messaging.operation.type": "settle",
        "messaging.operation.name": "settle",
        "unstract_wire.verdict": "ack",
        "unstract_wire.follow_up.queue": QUEUE,
    }


def test_traces_have_no_payload_content(bench: Bench) -> None:
    """No span has args, kwargs, results, error texts or the callback's kwargs."""
    bench.dispatcher.send_with_callback(
        "ok", args=[SECRET], kwargs={"x": SECRET}, queue=QUEUE, on_success=Signature("fail", y=SECRET)
    )
    bench.dispatcher.send("fail", args=[SECRET], queue=QUEUE)
    with pytest.raises(PayloadError):
        bench.dispatcher.send("ok", kwargs={SECRET: object()}, queue=QUEUE)
    bench.work(max_attempts=1)
    assert len(bench.spans) == 9
    assert SECRET not in "".join(span.to_json() for span in bench.spans)


def test_failed_run_has_the_error_type(bench: Bench) -> None:
    """The run has the status ERROR with `error.type` and no text; its settlement has succeeded."""
    bench.dispatcher.send("fail", queue=QUEUE)
    spans = bench.work(max_attempts=1)
    run, settle = spans["run fail"], spans[f"settle {QUEUE}"]
    assert (run.status.status_code, run.status.description, run.events) == (StatusCode.ERROR, None, ())
    assert (run.attributes or {})["error.type"] == "ValueError"
    assert (settle.status.status_code, (settle.attributes or {})["unstract_wire.verdict"]) == (StatusCode.UNSET, "bury")


def test_failed_send_has_the_error_type(bench: Bench) -> None:
    """The span of a failed send has the error type, and the error is raised unchanged."""
    with pytest.raises(PayloadError):
        bench.dispatcher.send("ok", args=[object()], queue=QUEUE)
    (span,) = bench.spans
    assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
    assert (span.attributes or {})["error.type"] == "PayloadError"


def test_each_attempt_is_a_span(bench: Bench) -> None:
    """All attempts are children of the send, and each later one has a link to it and its number."""
    bench.dispatcher.send("later", queue=QUEUE)
    bench.work(max_attempts=3)
    (send,) = [span for span in bench.spans if span.name == f"send {QUEUE}"]
    runs = [span for span in bench.spans if span.name == "run later"]
    assert [(run.attributes or {})["unstract_wire.attempt"] for run in runs] == [1, 2, 3]
    assert {run.parent and run.parent.span_id for run in runs} == {send.context.span_id}
    assert [[link.context.span_id for link in run.links] for run in runs] == [
        [],
        [send.context.span_id],
        [send.context.span_id],
    ]
    assert [(run.attributes or {})["unstract_wire.end"] for run in runs] == ["retry_asked", "retry_asked", "raised"]
    assert [run.status.status_code for run in runs] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    settlements = [span for span in bench.spans if span.name == f"settle {QUEUE}"]
    assert [s.parent and s.parent.span_id for s in settlements] == [run.context.span_id for run in runs]


def test_settlement_of_a_rejected_message_has_the_error(bench: Bench) -> None:
    """The settlement of a message that is not run is a child of the send, and has the error type."""
    bench.dispatcher.send("unknown", queue=QUEUE)
    spans = bench.work()
    settle = spans[f"settle {QUEUE}"]
    assert parent_of(settle, spans) == f"send {QUEUE}"
    assert (settle.attributes or {})["error.type"] == "UnknownTask"
    assert settle.status.status_code is StatusCode.ERROR


def test_message_without_context_begins_a_trace(bench: Bench) -> None:
    """A message without a valid context is run as the root of a trace."""
    bench.transport.send([message("ok", QUEUE), message("look", QUEUE, headers={"traceparent": "nonsense"})])
    spans = bench.work()
    assert spans["run ok"].parent is None
    assert spans["run look"].parent is None
    assert len(traces(spans)) == 2


def test_foreign_trace_is_continued(bench: Bench) -> None:
    """The run and the callback belong to the trace of a foreign `traceparent` header."""
    headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    bench.transport.send([message("ok", QUEUE, headers=headers, on_success=then("look", QUEUE))])
    spans = bench.work()
    assert traces(spans) == {0x0AF7651916CD43DD8448EB211C80319C}
    assert parent_of(spans["run ok"], spans) == "b7ad6b7169203331"
    assert parent_of(spans["run look"], spans) == "run ok"
    assert spans["run look"].context.trace_state.get("vendor") == "1"


def test_task_does_not_inherit_the_consumer_context(bench: Bench) -> None:
    """A consumer that is started inside a span does not add its messages to that trace."""
    bench.transport.send([message("ok", QUEUE)])
    with bench.tracer.start_as_current_span("start of the process"):
        assert bench.work()["run ok"].parent is None
        bench.transport.send([message("unknown", QUEUE)])
        assert bench.work()[f"settle {QUEUE}"].parent is None


def test_baggage_reaches_the_task_and_its_callback(bench: Bench) -> None:
    """The propagator's baggage reaches the task and its callback."""
    token = attach(baggage.set_baggage("tenant", "acme"))
    try:
        bench.dispatcher.send_with_callback("look", queue=QUEUE, on_success=Signature("look"))
    finally:
        detach(token)
    bench.work()
    assert [dict(found or {}) for found in bench.seen] == [{"tenant": "acme"}] * 2


def test_large_baggage_is_dropped_and_the_trace_kept(bench: Bench) -> None:
    """If all headers exceed 8192 bytes, the baggage is dropped and the trace is kept."""
    context = baggage.set_baggage("a", "x" * 4090)
    token = attach(baggage.set_baggage("b", "x" * 4090, context))
    try:
        bench.dispatcher.send("ok", queue=QUEUE)
    finally:
        detach(token)
    spans = bench.work()
    assert parent_of(spans["run ok"], spans) == f"send {QUEUE}"


@given(st.dictionaries(st.from_regex(r"[a-z-]{1,20}", fullmatch=True), st.from_regex(r"[ -~]{0,50}", fullmatch=True)))
def test_other_headers_reach_the_callback(headers: dict[str, str]) -> None:
    """Other headers of a message reach the callback unchanged."""
    bench = Bench()
    others = {f"x-{name}": text for name, text in headers.items()}
    seen: list[dict[str, str] | None] = []

    class Looking(Tracing):
        def running(self, delivery: Delivery) -> Any:
            assert delivery.payload is not None
            seen.append(delivery.payload.headers)
            return super().running(delivery)

    bench.tracing = Looking()
    bench.transport.send([message("ok", QUEUE, headers=others, on_success=then("look", QUEUE))])
    bench.work()
    first, second = seen
    assert first == others
    assert {name: text for name, text in (second or {}).items() if name.startswith("x-")} == others


def test_full_headers_are_kept_without_a_trace(bench: Bench) -> None:
    """If there is no room for the context, the other headers are kept, and the callback begins a new trace."""
    headers = {"x": "x" * 8180}
    bench.transport.send([message("ok", QUEUE, headers=headers, on_success=then("look", QUEUE))])
    spans = bench.work()
    assert spans["run look"].parent is None
    with bench.tracing.sending(message("ok", QUEUE, headers=headers)) as sent:
        assert sent.payload.headers == headers


def test_settlement_span_begins_at_the_outcome(bench: Bench) -> None:
    """The span of a settlement starts `seconds` before the hook is called."""
    before = time.time_ns()
    bench.tracing.settled(Settlement(delivery("ok"), Verdict.ACK), 2.5)
    (span,) = bench.spans
    assert (span.end_time or 0) - (span.start_time or 0) == 2_500_000_000
    assert before <= (span.end_time or 0) <= time.time_ns()


def delivery(task: str, number: int = 1) -> Delivery:
    return Delivery(str(number), QUEUE, 1, message(task, QUEUE).payload, b"")


def test_lost_lease_is_an_event_of_the_run(bench: Bench) -> None:
    """A lost lease adds an event to the run, and no settlement."""
    with bench.tracing.running(delivery("ok")):
        bench.tracing.on_lease_lost(LeaseLostEvent(delivery("ok")))
    (span,) = bench.spans
    assert [event.name for event in span.events] == ["unstract_wire.lease_lost"]


def test_released_message_has_no_span(bench: Bench) -> None:
    """A message that is released without being run has no span."""
    bench.tracing.settled(Settlement(delivery("ok"), Verdict.RETRY, counted=False), 0.0)
    assert bench.spans == ()


def test_number_of_remembered_runs_is_limited(bench: Bench) -> None:
    """The oldest unsettled runs are dropped, and a settled run is not kept."""
    off = Bench(sampler=ALWAYS_OFF)
    for number in range(MOST_OPEN + 10):
        off.tracing.rejected(delivery("ok", number), "UnknownTask")
    assert len(off.tracing._runs) == MOST_OPEN
    bench.transport.send([message("ok", QUEUE)] * 20)
    bench.work()
    assert len(bench.tracing._runs) == 0


def test_unsampled_trace_is_passed_on() -> None:
    """The callback gets the unsampled context, and nothing is recorded."""
    bench = Bench(sampler=ALWAYS_OFF)
    bench.dispatcher.send("ok", queue=QUEUE)
    payload = bench.waiting().payload
    assert payload is not None
    flags = re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})", (payload.headers or {})["traceparent"])
    assert flags is not None
    assert int(flags[1], 16) & 1 == 0
    assert bench.spans == ()


def test_trace_passes_through_without_an_sdk() -> None:
    """The API alone records nothing, and a foreign context reaches the callback."""
    tracing = Tracing(trace.NoOpTracerProvider())
    seen: list[dict[str, str] | None] = []
    for headers in ({"traceparent": PARENT}, None):
        given = Delivery("1", QUEUE, 1, message("ok", QUEUE, headers=headers).payload, b"")
        with Observers([tracing]).running(given) as carried:
            seen.append(carried)
    assert seen == [{"traceparent": PARENT}, None]


def test_tracing_without_extra_names_the_extra() -> None:
    """Without the API the import error names the extra to install."""
    script = "import sys; sys.modules['opentelemetry'] = None; import unstract_core.observability.tracing"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "ConfigurationError" in ended.stderr
    assert "pip install 'unstract-wire[otel]'" in ended.stderr
