"""CeleryAppDispatcher sends the same as the product's own dispatcher, and loses no failure."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import os
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import attrs
import kombu
import pytest
import strategies as some
from celery import Celery, signature
from celery.exceptions import TimeoutError as CeleryTimeout
from hypothesis import given
from hypothesis import strategies as st
from servers import free_port

from transports.celery.app_dispatcher import CeleryAppDispatcher
from unstract_core import (
    ConfigurationError,
    DispatchHandle,
    ExecutionResult,
    ExecutorDispatcher,
    NotSupported,
    Reply,
    RoutingDispatcher,
    TransportUnavailable,
    normalise,
)

CONTENT = "the contents of the document"
METHODS = ["dispatch", "dispatch_async", "dispatch_with_callback"]


@attrs.frozen(eq=False)
class Context:
    """An execution context that always gives the same dict."""

    executor_name: Any = "legacy"
    organization_id: Any = None
    run_id: str = "run-1"
    fields: Any = attrs.field(factory=lambda: {"executor_params": {"text": CONTENT}})

    def to_dict(self) -> Any:
        return self.fields


class SpyApp(Celery):  # type: ignore[misc]  # celery has no types
    """A real Celery app, in this process alone, that writes down what `send_task` is called with.

    `then` takes the place of sending, and returns the result; None means to send.
    """

    def __init__(self, then: Callable[[], Any] | None = None, *, backend: str | None = "cache+memory://") -> None:
        super().__init__("tests", broker="memory://", backend=backend, set_as_current=False)
        self.then = then
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def send_task(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return super().send_task(*args, **kwargs) if self.then is None else self.then()


def result_of(get: Callable[..., Any], id: Any = "id-1") -> Callable[[], Any]:
    """Return a stand-in for `send_task`, whose result has this `get`."""
    return lambda: types.SimpleNamespace(id=id, get=get)


def answering(reply: Any) -> SpyApp:
    return SpyApp(result_of(lambda **_: reply))


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


OK = {"success": True, "data": {"total": "118.40"}, "metadata": {}, "error": None}


# The calls of the app.

OPTIONS = {"headers": "headers", "on_success": "link", "on_error": "link_error", "task_id": "task_id"}
"""The caller's names of the options, and the app's."""


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], int]:
    """A call of one of the three methods: its arguments by name, and how many of them go by position."""
    method = draw(st.sampled_from(METHODS))
    names = list(inspect.signature(getattr(CeleryAppDispatcher, method)).parameters)[2:]
    names = [name for name in names if name != "within"]
    signatures = st.builds(signature, some.names, kwargs=some.json_objects, options=st.builds(dict, queue=some.names))
    falsy: st.SearchStrategy[Any] = st.sampled_from([None, False, 0, 0.0, "", (), [], {}])
    values: dict[str, Any] = {
        "timeout": st.none() | st.floats(0.1, 1e6) | st.integers(0, 10),
        "headers": falsy | st.dictionaries(some.names, some.anything, max_size=2),
        "on_success": falsy | signatures | st.builds(object),
        "on_error": falsy | signatures | st.builds(object),
        "task_id": falsy | some.texts,
    }
    given_names = draw(st.lists(st.sampled_from(names), unique=True))
    given_values = {name: draw(values[name]) for name in names if name in given_names}
    leading = len(list(itertools.takewhile(lambda name: name in given_values, names)))
    return method, given_values, draw(st.integers(0, leading))


contexts = st.builds(
    Context,
    executor_name=st.sampled_from(["legacy", "agentic", "agentic_table"]) | some.texts | st.none() | st.integers(),
    organization_id=st.none() | some.names,
    fields=some.anything,
)


@given(contexts, calls())
def test_the_app_gets_one_plain_send_task(context: Context, call: tuple[str, dict[str, Any], int]) -> None:
    """Each dispatch is one send_task with the caller's own objects, without empty headers and options that are None."""
    method, values, by_position = call
    app = answering(OK)
    positional = list(values.values())[:by_position]
    named = dict(list(values.items())[by_position:])
    getattr(CeleryAppDispatcher(app), method)(context, *positional, **named)
    ((args, kwargs),) = app.calls
    left_out = {name for name, value in values.items() if value is None or (name == "headers" and not value)}
    expected = {OPTIONS[name]: value for name, value in values.items() if name not in {"timeout", *left_out}}
    assert args == ("execute_extraction",)
    assert set(kwargs) == {"args", "queue", *expected}
    assert type(kwargs["args"]) is list
    assert len(kwargs["args"]) == 1
    assert kwargs["args"][0] is context.fields
    assert kwargs["queue"] == f"celery_executor_{context.executor_name}"
    assert all(kwargs[name] is value for name, value in expected.items())


@pytest.mark.parametrize("method", ["dispatch_async", "dispatch_with_callback"])
def test_a_dispatch_through_celery_joins_no_transaction(method: str) -> None:
    """`within` is refused with an alternative and nothing is sent, and `within=None` has no effect."""
    app = answering(OK)
    with pytest.raises(NotSupported, match=r"cannot join a transaction .*after the commit"):
        getattr(CeleryAppDispatcher(app), method)(Context(), within=object())
    assert app.calls == []
    getattr(CeleryAppDispatcher(app), method)(Context(), within=None)
    assert len(app.calls) == 1


def test_a_dispatch_changes_no_argument() -> None:
    """The caller's dicts and signatures are unchanged after a send."""
    app = SpyApp()
    ok = signature("done", kwargs={"callback_kwargs": {"a": 1}}, queue="ide_callback", app=app)
    headers = {"x-fairness-key": {"org_id": "acme"}}
    before = copy.deepcopy((dict(ok), headers))
    CeleryAppDispatcher(app).dispatch_with_callback(Context(), on_success=ok, on_error=ok, headers=headers)
    assert (dict(ok), headers) == before


@pytest.mark.parametrize("callbacks", [True, False])
def test_the_message_equals_celerys_own(callbacks: bool) -> None:
    """Body, headers and properties equal those of the product's own `app.send_task`, byte for byte."""
    app, context, queue = SpyApp(), Context(executor_name=f"t-{uuid.uuid4()}"), "ide_callback"
    ok, failed = (signature(name, kwargs={"callback_kwargs": {}}, queue=queue, app=app) for name in ("ok", "failed"))
    headers = {"x-fairness-key": {"org_id": "acme", "workload_type": "api", "pipeline_priority": 3}}
    dispatcher = CeleryAppDispatcher(app)
    options = {"link": ok, "link_error": failed} if callbacks else {}
    address = f"celery_executor_{context.executor_name}"
    ours = dispatcher.dispatch_with_callback(context, *options.values(), task_id="id-1", headers=headers)  # type: ignore[misc]  # two of them, or none
    app.send_task(
        "execute_extraction", args=[context.to_dict()], queue=address, headers=headers, task_id="id-1", **options
    )
    assert ours == DispatchHandle("id-1")
    with app.connection_for_write() as connection:
        queue_of = connection.SimpleQueue(address)
        one, other = (queue_of.get(timeout=1) for _ in range(2))
        queue_of.close()
    assert (one.body, one.headers) == (other.body, other.headers)
    for message in (one, other):
        del message.properties["delivery_tag"]
    assert one.properties == other.properties


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_have_the_products_signatures(method: str) -> None:
    """The methods have the product's parameter names, order and defaults."""
    ours, products = (
        [(each.name, each.kind, each.default) for each in inspect.signature(getattr(of, method)).parameters.values()]
        for of in (CeleryAppDispatcher, ExecutorDispatcher)
    )
    assert ours == products


def test_dispatch_waits_as_the_products_dispatcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dispatch` waits for its timeout: the argument, else the environment variable, else an hour."""
    waited: list[dict[str, Any]] = []

    def get(**options: Any) -> Any:
        waited.append(options)
        return OK

    dispatcher = CeleryAppDispatcher(SpyApp(result_of(get)))
    monkeypatch.setenv("EXECUTOR_RESULT_TIMEOUT", "90")
    dispatcher.dispatch(Context(), 5)
    dispatcher.dispatch(Context())
    monkeypatch.delenv("EXECUTOR_RESULT_TIMEOUT")
    dispatcher.dispatch(Context())
    dispatcher.dispatch(Context(), timeout=0)
    assert waited == [{"timeout": seconds, "disable_sync_subtasks": False} for seconds in (5, 90.0, 3600.0, 0)]


@given(some.texts.filter(bool))
def test_dispatches_return_celerys_id(task_id: str) -> None:
    """dispatch_async returns the id as a str and dispatch_with_callback a handle with it, without waiting."""
    dispatcher = CeleryAppDispatcher(SpyApp(result_of(raising(AssertionError("waited")), task_id)))
    assert dispatcher.dispatch_async(Context()) == task_id
    assert dispatcher.dispatch_with_callback(Context()) == DispatchHandle(task_id)


# dispatch never raises.


@given(st.builds(ExecutionResult, success=st.just(True), data=some.json_objects, metadata=some.json_objects))
def test_dispatch_returns_the_executors_result(result: ExecutionResult) -> None:
    """A returned result or failure of the task becomes an ExecutionResult."""
    assert CeleryAppDispatcher(answering(result.to_dict())).dispatch(Context()) == result
    failure = ExecutionResult.failure("no money")
    assert CeleryAppDispatcher(answering(failure.to_dict())).dispatch(Context()) == failure


class Oddity(Exception):
    def __str__(self) -> str:
        raise RuntimeError


FAILURES: dict[str, tuple[BaseException, str]] = {
    "broker away": (
        kombu.exceptions.OperationalError("[Errno 111] Connection refused"),
        "OperationalError: [Errno 111]",
    ),
    "cannot be written": (kombu.exceptions.EncodeError("set"), "EncodeError: set"),
    "raised": (ValueError("bad"), "ValueError: bad"),
    "raised without a text": (KeyError(), "KeyError"),
    "cannot be printed": (Oddity(), "Oddity: <its message cannot be printed>"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("where", ["send", "get"])
def test_dispatch_turns_every_failure_into_a_result(name: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    """A failed enqueue or task becomes a failure with the text "Type: message", and the type is logged."""
    error, text = FAILURES[name]
    app = SpyApp(raising(error) if where == "send" else result_of(raising(error)))
    result = CeleryAppDispatcher(app).dispatch(Context(organization_id="org-1"), 1)
    assert result.success is False
    assert str(result.error).startswith(text)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("dispatch_failed", "method=dispatch ", "legacy", "org-1", "run-1", type(error).__name__):
        assert part in record.getMessage()
    assert CONTENT not in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_an_interrupt_of_the_caller_is_raised(error: BaseException) -> None:
    """KeyboardInterrupt and SystemExit of the caller's process are raised, and become no failure of the executor."""
    with pytest.raises(type(error)):
        CeleryAppDispatcher(SpyApp(result_of(raising(error)))).dispatch(Context())


BAD_REPLIES: list[Any] = [
    None, {}, [], "", 0, False, True, "ok", [OK], {"data": {}}, {"success": None}, {"success": 1},
    {"success": True, "data": []}, {"success": True, "error": "x"}, {"success": False}, {"success": False, "error": ""},
]  # fmt: skip


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=repr)
def test_a_malformed_reply_is_a_failure(reply: Any) -> None:
    """A reply that is no execution result becomes a failure whose text names the fault."""
    result = CeleryAppDispatcher(answering(reply)).dispatch(Context(), 1)
    assert result.success is False
    assert str(result.error).startswith("MalformedPayload: the executor's reply is not an execution result")


@given(some.anything)
def test_dispatch_turns_any_reply_into_a_result(reply: Any) -> None:
    """Any value that a task returns becomes an ExecutionResult, which is a success only if the reply says so."""
    result = CeleryAppDispatcher(answering(reply)).dispatch(Context(), 1)
    assert isinstance(result, ExecutionResult)
    assert not result.success or reply["success"] is True


class Hostile:
    """A context each of whose members raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(CONTENT)


@pytest.mark.parametrize("make", [lambda: None, Hostile, object], ids=["none", "hostile", "object"])
def test_dispatch_never_raises_for_a_hostile_context(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A context whose own code raises becomes a failure with a text, and nothing is sent."""
    app = answering(OK)
    result = CeleryAppDispatcher(app).dispatch(make())
    assert (result.success, bool(result.error), app.calls) == (False, True, [])
    assert CONTENT not in caplog.text


@pytest.mark.parametrize("timeout", ["5", -1, object()], ids=["str", "-1", "object"])
def test_dispatch_turns_a_bad_timeout_into_a_result(timeout: Any) -> None:
    """The app gets any timeout unchanged, and its error becomes a failure."""
    assert CeleryAppDispatcher(SpyApp()).dispatch(Context(), timeout).success is False


def test_a_timeout_names_its_queue_and_seconds() -> None:
    """A timeout of Celery becomes a failure that names the queue, the task and the time waited."""
    result = CeleryAppDispatcher(SpyApp()).dispatch(Context(), 0.05)
    assert result.success is False
    for part in ("TimeoutError: The operation timed out.", " of 0.05 s ", "'celery_executor_legacy'", "worker running"):
        assert part in str(result.error)


@pytest.mark.parametrize("error", [TimeoutError("the model"), CeleryTimeout("the model")], ids=["own", "celery"])
def test_a_tasks_own_timeout_stays_recognisable(error: BaseException) -> None:
    """A timeout that the task raised keeps its text, and the time waited shows that the dispatch had time left."""
    result = CeleryAppDispatcher(SpyApp(result_of(raising(error)))).dispatch(Context(), 30)
    assert str(result.error).startswith("TimeoutError: the model (waited 0.0")
    assert "of 30 s" in str(result.error)
    assert "worker running" not in str(result.error)


# The other two let an enqueue failure out.


@pytest.mark.parametrize("method", ["dispatch_async", "dispatch_with_callback"])
@pytest.mark.parametrize("name", FAILURES)
def test_an_enqueue_failure_is_logged_and_raised(method: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """An error of send_task reaches the caller unchanged, and one ERROR names the method and the executor."""
    error = FAILURES[name][0]
    with pytest.raises(type(error)) as caught:
        getattr(CeleryAppDispatcher(SpyApp(raising(error))), method)(Context(organization_id="org-1"))
    assert caught.value is error
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for part in (f"method={method}", "legacy", "org-1", "run-1", type(error).__name__):
        assert part in record.getMessage()
    assert CONTENT not in caplog.text


# The status.


@pytest.fixture(scope="module")
def storing() -> SpyApp:
    """An app with a result backend of its own, in this process."""
    return SpyApp()


@given(result=some.json_values)
def test_a_task_that_succeeded_is_completed(storing: SpyApp, result: Any) -> None:
    """The status of a task that succeeded is completed, with its result."""
    task_id = str(uuid.uuid4())
    storing.backend.mark_as_done(task_id, result)
    reply = CeleryAppDispatcher(storing).status(task_id)
    assert reply == Reply(task_id, "completed", result=result)


@given(some.anything)
def test_a_stored_result_is_normalised(result: Any) -> None:
    """A result that the wire cannot carry, such as a UUID or a datetime of kombu, is normalised."""
    app = SpyApp()
    app.AsyncResult = lambda task_id: types.SimpleNamespace(state="SUCCESS", result=result)
    reply = CeleryAppDispatcher(app).status("t")
    assert reply is not None
    assert some.outside(reply.result) is None
    assert some.same(reply.result, normalise(result, lenient=True)) or "object at 0x" in repr(reply.result)


def test_a_failed_or_revoked_task_has_its_error(storing: SpyApp) -> None:
    """The status of a failed or revoked task is failed, with the text "Type: message"."""
    dispatcher = CeleryAppDispatcher(storing)
    storing.backend.mark_as_failure("failed", ValueError("bad"))
    storing.backend.mark_as_revoked("revoked", "terminated")
    assert dispatcher.status("failed") == Reply("failed", "failed", error="ValueError: bad")
    assert dispatcher.status("revoked") == Reply("revoked", "failed", error="TaskRevokedError: terminated")


@pytest.mark.parametrize("state", ["PENDING", "RECEIVED", "STARTED", "RETRY", "PROGRESS"])
def test_an_unfinished_task_has_no_status(storing: SpyApp, state: str) -> None:
    """The status is None while a task waits, runs or is retried, and for an unknown id."""
    task_id = str(uuid.uuid4())
    if state != "PENDING":
        storing.backend.store_result(task_id, ValueError("again") if state == "RETRY" else {}, state)
    assert CeleryAppDispatcher(storing).status(task_id) is None


@pytest.mark.parametrize(("backend", "named"), [(None, "disabled"), ("rpc://", "rpc")])
def test_an_unreadable_backend_is_not_supported(backend: str | None, named: str) -> None:
    """No backend, or one that only the sender can read, raises NotSupported with the remedy."""
    app = SpyApp(backend=backend)
    with pytest.raises(NotSupported, match=rf"result backend: {named}.*result_backend"):
        CeleryAppDispatcher(app).status("t")


@pytest.mark.parametrize("error", [NotImplementedError("no backend"), AttributeError("get_task_meta")], ids=repr)
def test_a_backend_without_results_is_not_supported(error: Exception) -> None:
    """Celery's disabled backends and an app without AsyncResult raise NotSupported."""
    app = SpyApp()
    app.AsyncResult = raising(error)
    with pytest.raises(NotSupported, match="result_backend"):
        CeleryAppDispatcher(app).status("t")
    bare: Any = types.SimpleNamespace(send_task=raising(error))
    with pytest.raises(NotSupported, match="result_backend"):
        CeleryAppDispatcher(bare).status("t")


def test_an_unreachable_backend_is_unavailable() -> None:
    """TransportUnavailable names the task, and the driver's error is its cause."""
    app = SpyApp(backend=f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(TransportUnavailable, match="'id-1'") as caught:
        CeleryAppDispatcher(app).status("id-1")
    assert caught.value.__cause__ is not None
    assert caught.value.fate_unknown is False


# Unusable apps are refused at start.


NO_APPS: dict[str, Any] = {
    "None": None,
    "a name": "app",
    "an object": object(),
    "the class": Celery,
    "no method": types.SimpleNamespace(send_task=None),
}


@pytest.mark.parametrize("app", NO_APPS.values(), ids=NO_APPS.keys())
def test_a_value_that_is_no_app_is_refused(app: Any) -> None:
    """The constructor raises ConfigurationError for an object without send_task."""
    with pytest.raises(ConfigurationError, match=r"send_task.*app object"):
        CeleryAppDispatcher(app)


def test_the_dispatcher_never_imports_celery() -> None:
    """A process that dispatches through another kind of app never imports celery."""
    script = (
        "import sys, types; from transports.celery.app_dispatcher import CeleryAppDispatcher as D; "
        "app = types.SimpleNamespace(send_task=lambda *a, **k: types.SimpleNamespace(id='i')); "
        "context = types.SimpleNamespace(executor_name='x', organization_id=None, to_dict=dict); "
        "assert D(app).dispatch_async(context) == 'i'; assert 'celery' not in sys.modules"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}, check=True)


# A real broker and a real worker.

WORKER = """
import os
from celery import Celery

app = Celery("worker", broker=os.environ["BROKER"], backend="rpc://")
app.conf.update(worker_enable_remote_control=False, worker_send_task_events=False, broker_connection_retry=False)


@app.task(name="execute_extraction")
def execute_extraction(context):
    operation = context["operation"]
    if operation == "raise":
        raise ValueError("the invoice does not add up")
    return {"success": True, "data": {"ran": operation}} if operation == "extract" else {}
"""


def context_of(executor: str, operation: str) -> Context:
    return Context(executor_name=executor, fields={"operation": operation})


@pytest.fixture(scope="module")
def broker(rabbitmq_url: str) -> Iterator[Any]:
    """A client app of the machine's RabbitMQ, and what deletes a queue of it."""
    app = Celery("client", broker=rabbitmq_url, backend="rpc://", set_as_current=False)
    try:
        yield app
    finally:
        app.backend.result_consumer.stop()  # with its consumer goes its queue
        app.close()


def delete_queue(app: Any, queue: str) -> None:
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete(queue)
        connection.default_channel.exchange_delete(queue)


@pytest.fixture(scope="module")
def executor(broker: Any, rabbitmq_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of an executor whose queue a real Celery worker, a process of its own, works on."""
    name = f"t-{uuid.uuid4()}"
    directory = tmp_path_factory.mktemp("celery-worker")
    (directory / "executor_worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "celery", "-A", "executor_worker", "worker", "-P", "solo", "-l", "WARNING"]
    command += ["-Q", f"celery_executor_{name}", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    env = {**os.environ, "BROKER": rabbitmq_url, "PYTHONPATH": str(directory)}
    with (directory / "log").open("w") as log:
        worker = subprocess.Popen([*command], cwd=directory, env=env, stdout=log, stderr=log)
    try:
        yield name
    finally:
        worker.kill()  # it has nothing left to finish, and would take nine seconds to leave
        worker.wait()
        delete_queue(broker, f"celery_executor_{name}")


def test_a_real_worker_runs_dispatches(broker: Any, executor: str) -> None:
    """Over RabbitMQ a result returns, a raised error fails with its text, and an empty reply is a failure."""
    dispatcher = CeleryAppDispatcher(broker)
    result = dispatcher.dispatch(context_of(executor, "extract"), timeout=40)
    assert result == ExecutionResult(success=True, data={"ran": "extract"})
    result = dispatcher.dispatch(context_of(executor, "raise"), timeout=20)
    assert result == ExecutionResult.failure("ValueError: the invoice does not add up")
    result = dispatcher.dispatch(context_of(executor, "nothing"), timeout=20)
    assert "MalformedPayload" in str(result.error)


def test_a_real_worker_runs_closed_gate_dispatches(broker: Any, executor: str) -> None:
    """With a closed or a failing gate the product's own path runs the task."""
    off = CeleryAppDispatcher(broker)
    for gate in (lambda context: False, raising(RuntimeError())):
        router = RoutingDispatcher(gate=gate, on=off, off=off)
        assert router.dispatch(context_of(executor, "extract"), timeout=40).data == {"ran": "extract"}


def test_a_queue_without_a_worker_is_a_timeout(broker: Any) -> None:
    """Without a worker a dispatch fails after its timeout, and names the time waited and the queue."""
    name = f"t-{uuid.uuid4()}"
    started = time.monotonic()
    try:
        result = CeleryAppDispatcher(broker).dispatch(context_of(name, "extract"), timeout=0.5)
    finally:
        delete_queue(broker, f"celery_executor_{name}")
    assert 0.5 <= time.monotonic() - started < 10
    assert result.success is False
    for part in ("TimeoutError", "of 0.5 s", f"celery_executor_{name}", "worker running"):
        assert part in str(result.error)
