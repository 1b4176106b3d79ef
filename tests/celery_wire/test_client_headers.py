"""A client's own headers and instrumentation reach the tasks of an app in a Consumer."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kombu
import pytest
from celery import Celery, Task, current_task, signals
from celery.app import trace
from celery.exceptions import Ignore, Reject
from celery_wire.app_task_support import Stage, declared
from celery_wire.support import ALIVE
from consumers import running
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.kit import wait_until
from transports.celery import CeleryTransport, app_tracers, client_headers
from transports.celery.decode import read_message
from transports.memory import MemoryTransport
from unstract_core import Consumer
from unstract_core.codec import MAX_HEADERS_BYTES
from unstract_core.observability.log_events import NewNames

# mypy: disable-error-code="untyped-decorator, misc"

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OWN = {"tenant": "acme", "traceparent": TRACEPARENT, "x-request-id": "r-1"}

names = st.sampled_from(["tenant", "traceparent", "x-odd", "headers", "retries", "x-death", "ä", "", "a\0b"])
values = st.text(max_size=20) | st.integers() | st.none() | st.just("x" * MAX_HEADERS_BYTES) | st.just({"nested": "n"})


def test_a_clients_headers_are_on_the_request(
    product: Celery,
    transport: CeleryTransport,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts of a client's headers are on the request, and the names of other headers are logged without values."""
    monkeypatch.setattr(client_headers, "_left_out", NewNames())
    seen: list[Any] = []

    def look(task: Any) -> None:
        seen.append((task.request.headers, task.request.tenant, task.request.get("traceparent"), task.request.retries))

    others = {"a-number": 4711, "a-table": {"secret": 4711}}
    with running(Consumer(transport, declared(look), [queue])):
        product.send_task("t", queue=queue, headers={**OWN, **others, "headers": {"nested": "n", "tenant": "other"}})
        wait_until(lambda: seen, timeout=ALIVE, what="the task to run")
    assert seen == [({**OWN, "nested": "n"}, "acme", TRACEPARENT, 0)]
    (record,) = [record for record in caplog.records if getattr(record, "wire.event", "") == "message_headers_left_out"]
    assert getattr(record, "wire.names") == "a-number, a-table"
    assert "4711" not in caplog.text


def test_a_clients_headers_survive_a_retry(product: Celery, transport: CeleryTransport, queue: str) -> None:
    """A retried message has the headers of its client."""
    seen: list[Any] = []

    def look(task: Any) -> None:
        seen.append(task.request.headers)
        if len(seen) == 1:
            task.retry(countdown=0)

    with running(Consumer(transport, declared(look), [queue])):
        product.send_task("t", queue=queue, headers=OWN)
        wait_until(lambda: len(seen) == 2, timeout=ALIVE, what="the task to run again")
    assert seen == [OWN, OWN]


@given(st.dictionaries(names, values), st.dictionaries(names, values))
def test_headers_are_carried_within_the_limit(own: dict[str, Any], table: dict[str, Any]) -> None:
    """The headers on the wire are texts within the limit, with the context of a trace first."""
    message = kombu.Message(body=b"[[], {}, {}]", content_type="application/json", content_encoding="utf-8")
    message.headers = {**own, "task": "t", "id": "the-id", "headers": table}
    payload = read_message(message, "q", default_queue="celery").payload
    assert payload is not None
    carried = payload.headers or {}
    assert sum(len(name.encode()) + len(value.encode()) for name, value in carried.items()) <= MAX_HEADERS_BYTES
    assert not carried.keys() & {"retries", "x-death", "task", "id", "", "a\0b"}
    known = {**table, **{name: value for name, value in own.items() if value is not None}}
    assert all(value == known[name] for name, value in carried.items())
    for name in ("traceparent", "tenant"):
        if isinstance(known.get(name), str) and len(known[name]) < 30:
            assert name in carried or (name == "tenant" and len(str(known)) > MAX_HEADERS_BYTES)


@contextlib.contextmanager
def wrapped() -> Iterator[list[Any]]:
    """Wrap the builder of tracers, each tracer, and each task's `run`, as Sentry does; yields what these see."""
    seen: list[Any] = []
    build = trace.build_tracer

    def run_of(task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except Exception as exc:
                seen.append(("raised", task.name, type(exc).__name__, task.request.delivery_info["routing_key"]))
                raise

        return wrapper

    def build_tracer(name: str, task: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if not getattr(task, "_is_wrapped", False):
            task.run = run_of(task, task.run)
            task._is_wrapped = True
        tracer = build(name, task, *args, **kwargs)

        def traced(*args: Any, **kwargs: Any) -> Any:
            seen.append(("began", name, args[0], list(args[1]), dict(args[2]), args[3]["headers"]))
            info = tracer(*args, **kwargs)[1]
            seen.append(("ended", getattr(info, "state", "SUCCESS")))
            return info

        return traced

    trace.build_tracer = build_tracer
    try:
        yield seen
    finally:
        trace.build_tracer = build


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Yield the names of Celery's signals, as they are sent."""
    signals_sent: list[str] = []

    def hear(signal: Any, sender: Any, **_: Any) -> None:
        assert isinstance(sender, Task)
        signals_sent.append(signal.name)

    with contextlib.ExitStack() as stack:
        for signal in (signals.task_prerun, signals.task_postrun, signals.task_success, signals.task_failure):
            signal.connect(hear)
            stack.callback(signal.disconnect, hear)
        yield signals_sent


def test_the_names_of_headers_take_no_memory(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages with ever new header names leave nothing large in memory or in the log."""
    monkeypatch.setattr(client_headers, "_left_out", NewNames())
    message = kombu.Message(body=b"[[], {}, {}]", content_type="application/json", content_encoding="utf-8")

    def read(first: int, last: int) -> None:
        for number in range(first, last):
            own = {f"{number}-{other}-{'x' * 200}": 1 for other in range(100)}
            message.headers = {**own, "task": "t", "id": "the-id"}
            assert read_message(message, "q", default_queue="celery").payload is not None

    read(0, 2)
    sizes = [len(getattr(record, "wire.names")) for record in caplog.records]
    assert [getattr(record, "wire.count") for record in caplog.records] == [100] * len(sizes)
    assert max(sizes) <= 20 * 102
    with caplog.at_level(logging.ERROR):
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            read(2, 100)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 500_000


def give(task: Any, value: Any) -> Any:
    return {"given": value}


def fail(task: Any, value: Any) -> None:
    raise ValueError(value)


def ignore(task: Any, value: Any) -> None:
    raise Ignore


def reject(task: Any, value: Any) -> None:
    raise Reject("no")


SENTRY = """
import json, sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

class Printing(Transport):
    def capture_envelope(self, envelope):
        for item in envelope.items:
            event = item.payload.json
            errors = [one["type"] for one in event.get("exception", {}).get("values", [])]
            print(json.dumps([item.type, event["transaction"], event["contexts"]["trace"]["trace_id"], errors]))

options = dict(default_integrations=False, integrations=[CeleryIntegration()], traces_sample_rate=1.0)
sentry_sdk.init("http://key@127.0.0.1:9/1", transport=Printing, **options)

from celery import Celery
from contract_tests.messages import message
from transports.celery import celery_tasks
from transports.memory import MemoryTransport
from unstract_core import Consumer

app = Celery("watched", broker="memory://", set_as_current=False)

@app.task(name="fail", shared=False)
def fail():
    raise ValueError("no total")

transport = MemoryTransport()
trace = {"sentry-trace": "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1"}
transport.send([message("fail", "q", reply_key="k", headers=trace)])
Consumer(transport, celery_tasks(app), ["q"]).drain(timeout=20)
sentry_sdk.flush()
"""


def test_sentry_reports_a_failed_task() -> None:
    """Sentry's integration reports the error and the transaction of a task, in the trace of its sender."""
    done = subprocess.run([sys.executable, "-c", SENTRY], capture_output=True, text=True, timeout=ALIVE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["event", "fail", trace_id, ["ValueError"]],
        ["transaction", "fail", trace_id, []],
    ]


ENDS: list[tuple[Callable[..., Any], str | None, str]] = [
    (give, None, "SUCCESS"),
    (fail, "ValueError", "FAILURE"),
    (ignore, "Ignore", "IGNORED"),
    (reject, "Reject", "REJECTED"),
]


@pytest.mark.parametrize(("run", "error", "state"), ENDS)
def test_a_wrapped_tracer_sees_each_run(run: Callable[..., Any], error: str | None, state: str) -> None:
    """A wrapped tracer sees id, arguments, headers, error and end of a run, and the outcome stays the same."""
    tasks = declared(run)
    with heard() as plainly:
        plain = Stage(MemoryTransport()).run(tasks, "t", "v", headers=OWN)
    with wrapped() as seen, heard() as instrumented:
        traced = Stage(MemoryTransport()).run(tasks, "t", "v", headers=OWN)
    began, *middle, ended = seen
    assert began == ("began", "t", traced.id, ["v"], {}, OWN)
    assert [one[:3] for one in middle] == ([("raised", "t", error)] if error else [])
    assert ended == ("ended", state)
    assert instrumented == plainly
    assert [
        (one.buried, one.ran, len(one.callbacks), one.status and one.status.error) for one in (traced, plain)
    ] == 2 * [(traced.buried, 1, len(plain.callbacks), plain.status and plain.status.error)]
    assert [one.kwargs for one in traced.callbacks] == [one.kwargs for one in plain.callbacks]


def test_a_wrapped_tracer_sees_a_retry() -> None:
    """A wrapped tracer sees each run of a retried task, with its number of retries."""

    def run(task: Any) -> int:
        if task.request.retries < 2:
            task.retry(countdown=0)
        return int(task.request.retries)

    with wrapped() as seen:
        ended = Stage(MemoryTransport()).run(declared(run), "t")
    assert [state for kind, state, *_ in seen if kind == "ended"] == ["RETRY", "RETRY", "SUCCESS"]
    assert ended.reported == ("succeeded", 2)


def test_a_raising_tracer_changes_no_outcome() -> None:
    """An error of the instrumentation after a task does not change the task's outcome."""
    build = trace.build_tracer

    def build_tracer(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        tracer = build(*args, **kwargs)

        def traced(*args: Any) -> None:
            tracer(*args)
            raise RuntimeError("the instrumentation's")

        return traced

    trace.build_tracer = build_tracer
    try:
        ended = Stage(MemoryTransport()).run(declared(give), "t", "v")
    finally:
        trace.build_tracer = build
    assert ended.reported == ("succeeded", {"given": "v"})


def test_tasks_in_other_threads_are_traced_normally() -> None:
    """A task that another thread applies while a tracer is built is the current one, and its signals are sent."""
    app = Celery("beside", broker="memory://", set_as_current=False)
    build: Any = trace.build_tracer
    current: list[Any] = []
    sent: list[tuple[str, str]] = []

    @app.task(name="inner", shared=False)
    def inner() -> None:
        current.append(current_task and current_task.name)

    def retry(task: Any) -> None:
        task.retry(countdown=0)

    again = app.task(name="again", shared=False, bind=True, max_retries=1)(retry)
    main = threading.get_ident()

    def note(signal: Any, sender: Any, **_: Any) -> None:
        sent.append((signal.name, sender.name))

    def build_tracer(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == main:
            with ThreadPoolExecutor() as pool:
                for task in (inner, again):
                    pool.submit(task.apply).result(ALIVE)
        return build(*args, **kwargs)

    used = (signals.task_prerun, signals.task_success, signals.task_postrun, signals.task_retry)
    with contextlib.ExitStack() as stack:
        for signal in used:
            signal.connect(note)
            stack.callback(signal.disconnect, note)
        plain = [task.apply().state for task in (inner, again)]
        usual, sent[:] = list(sent), []
        trace.build_tracer = build_tracer
        stack.callback(setattr, trace, "build_tracer", build)
        ended = app_tracers.run_instrumented(trace, inner, {"id": "i", "args": [], "kwargs": {}}, lambda: "ended")
    assert (plain, ended) == (["SUCCESS", "FAILURE"], "ended")
    assert sent == usual
    assert current == ["inner", "inner"]
