"""CeleryAppDispatcher: what reaches the app is what the product's own dispatcher gives it, and no failure is lost."""

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
    """What `send_task` returns: a result whose `get` is this."""
    return lambda: types.SimpleNamespace(id=id, get=get)


def answering(reply: Any) -> SpyApp:
    return SpyApp(result_of(lambda **_: reply))


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


OK = {"success": True, "data": {"total": "118.40"}, "metadata": {}, "error": None}


# What reaches the app.

OPTIONS = {"headers": "headers", "on_success": "link", "on_error": "link_error", "task_id": "task_id"}
"""The caller's names for what the app gets, and the app's own."""


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
def test_the_app_gets_what_the_products_dispatcher_gives_it_and_nothing_more(
    context: Context, call: tuple[str, dict[str, Any], int]
) -> None:
    """One send_task of the caller's own objects, without empty headers and without other options that are None."""
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
    """`within` is refused with what to do instead, and nothing is sent; None is the same as leaving it out."""
    app = answering(OK)
    with pytest.raises(NotSupported, match=r"cannot join a transaction .*after the commit"):
        getattr(CeleryAppDispatcher(app), method)(Context(), within=object())
    assert app.calls == []
    getattr(CeleryAppDispatcher(app), method)(Context(), within=None)
    assert len(app.calls) == 1


def test_nothing_of_the_callers_is_changed() -> None:
    """The caller's dicts and signatures are as they were after a real send."""
    app = SpyApp()
    ok = signature("done", kwargs={"callback_kwargs": {"a": 1}}, queue="ide_callback", app=app)
    headers = {"x-fairness-key": {"org_id": "acme"}}
    before = copy.deepcopy((dict(ok), headers))
    CeleryAppDispatcher(app).dispatch_with_callback(Context(), on_success=ok, on_error=ok, headers=headers)
    assert (dict(ok), headers) == before


@pytest.mark.parametrize("callbacks", [True, False])
def test_the_message_is_the_one_that_celery_sends_by_itself(callbacks: bool) -> None:
    """To the byte: body, headers and properties are those of `app.send_task`, called as the product calls it."""
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
    """Same names in the same order with the same defaults, so that either dispatcher takes any call."""
    ours, products = (
        [(each.name, each.kind, each.default) for each in inspect.signature(getattr(of, method)).parameters.values()]
        for of in (CeleryAppDispatcher, ExecutorDispatcher)
    )
    assert ours == products


def test_dispatch_waits_as_the_products_dispatcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get` with the timeout and disable_sync_subtasks=False: from the argument, else the variable, else an hour."""
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
def test_the_id_is_celerys(task_id: str) -> None:
    """dispatch_async returns the id as a str, dispatch_with_callback a handle that has it; nothing is waited for."""
    dispatcher = CeleryAppDispatcher(SpyApp(result_of(raising(AssertionError("waited")), task_id)))
    assert dispatcher.dispatch_async(Context()) == task_id
    assert dispatcher.dispatch_with_callback(Context()) == DispatchHandle(task_id)


# dispatch never raises.


@given(st.builds(ExecutionResult, success=st.just(True), data=some.json_objects, metadata=some.json_objects))
def test_dispatch_returns_the_executors_result(result: ExecutionResult) -> None:
    """What the task returned comes back as an ExecutionResult, and so does a failure that it returned."""
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
    """A failed enqueue and a failed task become a failure with the text "Type: message"; the log has the type."""
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
def test_an_interrupt_of_the_caller_passes(error: BaseException) -> None:
    """What ends the caller's own process is no failure of the executor."""
    with pytest.raises(type(error)):
        CeleryAppDispatcher(SpyApp(result_of(raising(error)))).dispatch(Context())


BAD_REPLIES: list[Any] = [
    None, {}, [], "", 0, False, True, "ok", [OK], {"data": {}}, {"success": None}, {"success": 1},
    {"success": True, "data": []}, {"success": True, "error": "x"}, {"success": False}, {"success": False, "error": ""},
]  # fmt: skip


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=repr)
def test_a_malformed_or_empty_reply_is_a_failure_that_says_so(reply: Any) -> None:
    """A reply that is no execution result fails with a text that names the fault."""
    result = CeleryAppDispatcher(answering(reply)).dispatch(Context(), 1)
    assert result.success is False
    assert str(result.error).startswith("MalformedPayload: the executor's reply is not an execution result")


@given(some.anything)
def test_dispatch_turns_any_reply_into_a_result(reply: Any) -> None:
    """Whatever the task returned, an ExecutionResult comes back; a success only where the reply says so."""
    result = CeleryAppDispatcher(answering(reply)).dispatch(Context(), 1)
    assert isinstance(result, ExecutionResult)
    assert not result.success or reply["success"] is True


class Hostile:
    """A context each of whose members raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(CONTENT)


@pytest.mark.parametrize("make", [lambda: None, Hostile, object], ids=["none", "hostile", "object"])
def test_dispatch_never_raises_for_a_hostile_context(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the context's own code does, a failure with a text comes back, and nothing is sent."""
    app = answering(OK)
    result = CeleryAppDispatcher(app).dispatch(make())
    assert (result.success, bool(result.error), app.calls) == (False, True, [])
    assert CONTENT not in caplog.text


@pytest.mark.parametrize("timeout", ["5", -1, object()], ids=["str", "-1", "object"])
def test_dispatch_turns_a_senseless_timeout_into_a_result(timeout: Any) -> None:
    """The app gets the timeout as it is; what its result makes of it is a failure like any other."""
    assert CeleryAppDispatcher(SpyApp()).dispatch(Context(), timeout).success is False


def test_a_timeout_says_how_long_and_which_queue() -> None:
    """Celery's own timeout becomes a failure that an operator can act on."""
    result = CeleryAppDispatcher(SpyApp()).dispatch(Context(), 0.05)
    assert result.success is False
    for part in ("TimeoutError: The operation timed out.", " of 0.05 s ", "'celery_executor_legacy'", "worker running"):
        assert part in str(result.error)


@pytest.mark.parametrize("error", [TimeoutError("the model"), CeleryTimeout("the model")], ids=["own", "celery"])
def test_a_tasks_own_timeout_is_not_taken_for_the_dispatchs(error: BaseException) -> None:
    """A task may raise a timeout of its own: its text stays in front, and the time waited shows whose it is."""
    result = CeleryAppDispatcher(SpyApp(result_of(raising(error)))).dispatch(Context(), 30)
    assert str(result.error).startswith("TimeoutError: the model (waited 0.0")
    assert "of 30 s" in str(result.error)
    assert "worker running" not in str(result.error)


# The other two let an enqueue failure out.


@pytest.mark.parametrize("method", ["dispatch_async", "dispatch_with_callback"])
@pytest.mark.parametrize("name", FAILURES)
def test_an_enqueue_failure_is_logged_and_let_out(method: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The caller must not answer 202: the very error reaches it, and one ERROR names method and executor."""
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
    """The result as it was stored."""
    task_id = str(uuid.uuid4())
    storing.backend.mark_as_done(task_id, result)
    found = CeleryAppDispatcher(storing).status(task_id)
    assert found == Reply(task_id, "completed", result=result)


@given(some.anything)
def test_a_result_is_made_to_fit(result: Any) -> None:
    """What a backend gives that the wire cannot carry, such as kombu's UUIDs and datetimes, is made to fit."""
    app = SpyApp()
    app.AsyncResult = lambda task_id: types.SimpleNamespace(state="SUCCESS", result=result)
    found = CeleryAppDispatcher(app).status("t")
    assert found is not None
    assert some.outside(found.result) is None
    assert some.same(found.result, normalise(result, lenient=True)) or "object at 0x" in repr(found.result)


def test_a_task_that_failed_or_was_revoked_has_its_error(storing: SpyApp) -> None:
    """Failed, with the text "Type: message" of what it raised."""
    dispatcher = CeleryAppDispatcher(storing)
    storing.backend.mark_as_failure("failed", ValueError("bad"))
    storing.backend.mark_as_revoked("revoked", "terminated")
    assert dispatcher.status("failed") == Reply("failed", "failed", error="ValueError: bad")
    assert dispatcher.status("revoked") == Reply("revoked", "failed", error="TaskRevokedError: terminated")


@pytest.mark.parametrize("state", ["PENDING", "RECEIVED", "STARTED", "RETRY", "PROGRESS"])
def test_a_task_that_has_not_ended_has_no_status(storing: SpyApp, state: str) -> None:
    """None while it waits, runs or is tried again, and for an id that Celery does not know."""
    task_id = str(uuid.uuid4())
    if state != "PENDING":
        storing.backend.store_result(task_id, ValueError("again") if state == "RETRY" else {}, state)
    assert CeleryAppDispatcher(storing).status(task_id) is None


@pytest.mark.parametrize(("backend", "named"), [(None, "disabled"), ("rpc://", "rpc")])
def test_a_backend_that_cannot_tell_is_not_supported(backend: str | None, named: str) -> None:
    """Without a backend, or with one that only the sender can read, and once: the remedy is named."""
    app = SpyApp(backend=backend)
    with pytest.raises(NotSupported, match=rf"result backend: {named}.*result_backend"):
        CeleryAppDispatcher(app).status("t")


@pytest.mark.parametrize("error", [NotImplementedError("no backend"), AttributeError("get_task_meta")], ids=repr)
def test_a_backend_that_has_no_such_method_is_not_supported(error: Exception) -> None:
    """Celery's stand-ins for a backend refuse in either way, and so does an app that has no results at all."""
    app = SpyApp()
    app.AsyncResult = raising(error)
    with pytest.raises(NotSupported, match="result_backend"):
        CeleryAppDispatcher(app).status("t")
    bare: Any = types.SimpleNamespace(send_task=raising(error))
    with pytest.raises(NotSupported, match="result_backend"):
        CeleryAppDispatcher(bare).status("t")


def test_a_backend_that_is_away_is_unavailable() -> None:
    """No answer is not the answer None: the error names the task, and the driver's own is its cause."""
    app = SpyApp(backend=f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(TransportUnavailable, match="'id-1'") as caught:
        CeleryAppDispatcher(app).status("id-1")
    assert caught.value.__cause__ is not None
    assert caught.value.fate_unknown is False


# What cannot work is refused at start.


NO_APPS: dict[str, Any] = {
    "None": None,
    "a name": "app",
    "an object": object(),
    "the class": Celery,
    "no method": types.SimpleNamespace(send_task=None),
}


@pytest.mark.parametrize("app", NO_APPS.values(), ids=NO_APPS.keys())
def test_what_is_no_app_is_refused_at_start(app: Any) -> None:
    """A ConfigurationError when the dispatcher is built, not at the first dispatch."""
    with pytest.raises(ConfigurationError, match=r"send_task.*app object"):
        CeleryAppDispatcher(app)


def test_celery_is_never_imported() -> None:
    """A process that dispatches through an app of another kind never loads celery."""
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


def test_a_real_worker_runs_what_is_dispatched(broker: Any, executor: str) -> None:
    """Over RabbitMQ: the result comes back, a task that raises fails with its text, and an empty reply says so."""
    dispatcher = CeleryAppDispatcher(broker)
    result = dispatcher.dispatch(context_of(executor, "extract"), timeout=40)
    assert result == ExecutionResult(success=True, data={"ran": "extract"})
    result = dispatcher.dispatch(context_of(executor, "raise"), timeout=20)
    assert result == ExecutionResult.failure("ValueError: the invoice does not add up")
    result = dispatcher.dispatch(context_of(executor, "nothing"), timeout=20)
    assert "MalformedPayload" in str(result.error)


def test_a_real_worker_runs_what_a_closed_gate_routes(broker: Any, executor: str) -> None:
    """With the gate off, and with one that is broken, the product's own path runs the task."""
    off = CeleryAppDispatcher(broker)
    for gate in (lambda context: False, raising(RuntimeError())):
        router = RoutingDispatcher(gate=gate, on=off, off=off)
        assert router.dispatch(context_of(executor, "extract"), timeout=40).data == {"ran": "extract"}


def test_a_queue_without_a_worker_is_a_timeout(broker: Any) -> None:
    """Over RabbitMQ: after the timeout a failure says how long was waited, and for which queue."""
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
