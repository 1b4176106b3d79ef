"""ExecutorDispatcher: the messages of its three methods, and the result of every failure."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NoReturn

import attrs
import pytest
import strategies as some
from core.recording import RecordingTransport
from core.signatures import fields_of
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    Dispatcher,
    DispatchHandle,
    ExecutionResult,
    ExecutorDispatcher,
    FairnessKey,
    PayloadError,
    Reply,
    SignatureError,
    TransportError,
    TransportRefused,
    TransportUnavailable,
    from_wire,
    normalise,
)
from unstract_core.producer.executor import fairness_from_headers

CONTENT = "the contents of the document"


@attrs.define
class Context:
    """An execution context like the product's."""

    executor_name: Any = "legacy"
    organization_id: Any = None
    executor_params: Any = None
    run_id: str = "run-1"

    def to_dict(self) -> Any:
        return attrs.asdict(self)


contexts = st.builds(
    Context,
    executor_name=st.sampled_from(["legacy", "agentic", "agentic_table"]) | some.names,
    organization_id=st.none() | some.names,
    executor_params=some.json_objects,
)
headers = st.none() | st.builds(
    lambda key, others: {**others, "x-fairness-key": attrs.asdict(key)},
    some.fairness_keys,
    st.dictionaries(some.names, st.integers(), max_size=2),
)
results = st.one_of(
    st.builds(ExecutionResult, success=st.just(True), data=some.json_objects, metadata=some.json_objects),
    st.builds(ExecutionResult.failure, some.texts.filter(bool), some.json_objects),
)


def completed(result: Any) -> RecordingTransport:
    return RecordingTransport(answer=Reply("", "completed", result=result))


def dispatcher(transport: RecordingTransport) -> ExecutorDispatcher:
    return ExecutorDispatcher(Dispatcher(transport))


def check_address(transport: RecordingTransport, context: Context, sent_headers: Any) -> None:
    """Check that the execution goes to its executor's queue with the context as its only argument."""
    message = transport.only().message
    payload = from_wire(transport.only().written)
    fairness = FairnessKey(**sent_headers["x-fairness-key"]) if sent_headers else None
    assert payload.task_name == "execute_extraction"
    assert payload.args == [context.to_dict()]
    assert payload.kwargs == {}
    assert payload.queue == message.queue == f"celery_executor_{context.executor_name}"
    assert payload.fairness == fairness
    assert message.priority == (fairness.pipeline_priority if fairness else 5)
    assert message.org_id == (context.organization_id or (fairness and fairness.org_id) or "")


# The messages.


@given(contexts, headers, results, st.floats(0.01, 1e6))
def test_dispatch_returns_the_result_of_the_executor(
    context: Context, sent_headers: Any, result: ExecutionResult, timeout: float
) -> None:
    """A blocking dispatch waits under its reply key for the timeout, and returns the executor's result."""
    transport = completed(normalise(result))
    assert dispatcher(transport).dispatch(context, timeout, sent_headers) == result
    check_address(transport, context, sent_headers)
    payload = from_wire(transport.only().written)
    assert transport.replies == [{"key": payload.reply_key, "timeout": timeout, "consume": True}]
    assert (payload.on_success, payload.on_error, payload.task_id) == (None, None, None)


@given(contexts, headers)
def test_dispatch_async_returns_the_id_of_its_status(context: Context, sent_headers: Any) -> None:
    """The id is a str and the payload's task_id, and the call does not wait."""
    transport = RecordingTransport()
    found = dispatcher(transport).dispatch_async(context, sent_headers)
    check_address(transport, context, sent_headers)
    payload = from_wire(transport.only().written)
    assert found == payload.task_id
    assert (payload.reply_key, payload.on_success, payload.on_error) == (None, None, None)
    assert transport.replies == []


@given(contexts, headers, some.continuations | st.none(), some.continuations | st.none(), some.names | st.none())
def test_dispatch_with_callback_carries_the_callbacks(
    context: Context,
    sent_headers: Any,
    on_success: ContinuationSpec | None,
    on_error: ContinuationSpec | None,
    task_id: str | None,
) -> None:
    """The payload has the callbacks and the caller's id, and the handle has the id."""
    transport = RecordingTransport()
    ok, failed = (
        spec and fields_of(task=spec.task_name, kwargs=spec.kwargs, options={"queue": spec.queue})
        for spec in (on_success, on_error)
    )
    handle = dispatcher(transport).dispatch_with_callback(context, ok, failed, task_id, sent_headers)  # type: ignore[arg-type]  # a serialised signature is a mapping
    check_address(transport, context, sent_headers)
    payload = from_wire(transport.only().written)
    assert isinstance(handle, DispatchHandle)
    assert handle.id == payload.task_id
    assert task_id in (None, handle.id)
    assert (payload.on_success, payload.on_error, payload.reply_key) == (on_success, on_error, None)


# The timeout.


@pytest.fixture
def timeout_variable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Return a function that sets or unsets EXECUTOR_RESULT_TIMEOUT."""

    def change(text: str | None) -> None:
        if text is None:
            monkeypatch.delenv("EXECUTOR_RESULT_TIMEOUT", raising=False)
        else:
            monkeypatch.setenv("EXECUTOR_RESULT_TIMEOUT", text)

    return change


def waited(timeout: float | None = None) -> Any:
    transport = completed(None)
    dispatcher(transport).dispatch(Context(), timeout)
    return [asked["timeout"] for asked in transport.replies]


@pytest.mark.parametrize("text", ["1", "0.5", "120", " 90 ", "1e3"])
def test_default_timeout_comes_from_the_variable(timeout_variable: Callable[[str | None], None], text: str) -> None:
    """Without an argument, the timeout is EXECUTOR_RESULT_TIMEOUT in seconds."""
    timeout_variable(text)
    assert waited() == [float(text)]


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "nan", "inf", "-inf", "1h", "1,5", "0x10"])
def test_invalid_variable_means_an_hour_with_warning(
    timeout_variable: Callable[[str | None], None], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A value that is not a positive number is ignored with one warning, and the timeout is 3600 s."""
    timeout_variable(text)
    assert waited() == [3600.0]
    (record,) = [each for each in caplog.records if "timeout" in each.getMessage()]
    assert record.levelno == logging.WARNING
    assert "EXECUTOR_RESULT_TIMEOUT" in record.getMessage()


def test_default_timeout_is_an_hour(timeout_variable: Callable[[str | None], None]) -> None:
    """Without the argument and the variable, the timeout is 3600 s."""
    timeout_variable(None)
    assert waited() == [3600.0]


def test_timeout_argument_overrides_the_variable(timeout_variable: Callable[[str | None], None]) -> None:
    """An explicit timeout overrides EXECUTOR_RESULT_TIMEOUT."""
    timeout_variable("5")
    assert waited(7.5) == [7.5]


# dispatch never raises.


def raises(*_: object) -> NoReturn:
    raise RuntimeError(CONTENT)


class Unprintable:
    """A name that cannot even be logged."""

    __str__ = __repr__ = __format__ = raises


def hostile(**members: Any) -> Any:
    """Return a context with these members instead of its own."""
    own: dict[str, Any] = {
        "executor_name": "legacy",
        "organization_id": None,
        "run_id": "r",
        "to_dict": lambda self: {},
    }
    return type("Hostile", (), {**own, **members})()


HOSTILE: dict[str, Callable[[], Any]] = {
    "to_dict raises": lambda: hostile(to_dict=raises),
    "to_dict returns no JSON": lambda: hostile(to_dict=lambda self: object()),
    "to_dict returns itself": lambda: hostile(to_dict=lambda self: self),
    "name raises": lambda: hostile(executor_name=property(raises)),
    "name is None": lambda: hostile(executor_name=None),
    "name is empty of text": lambda: hostile(executor_name="\x00"),
    "name is too long": lambda: hostile(executor_name="x" * 300),
    "name cannot be printed": lambda: hostile(executor_name=Unprintable()),
    "organisation raises": lambda: hostile(organization_id=property(raises)),
    "organisation is a number": lambda: hostile(organization_id=7),
    "organisation cannot be printed": lambda: hostile(organization_id=Unprintable()),
    "run id raises": lambda: hostile(run_id=property(raises), to_dict=raises),
    "run id cannot be printed": lambda: hostile(run_id=Unprintable(), to_dict=raises),
    "every attribute raises": lambda: hostile(__getattribute__=raises),
    "no context at all": lambda: None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_context_becomes_a_failure(name: str) -> None:
    """If the context's code raises, a blocking dispatch returns a failure with a text, and nothing is sent."""
    transport = completed({"success": True})
    result = dispatcher(transport).dispatch(HOSTILE[name](), 1)
    assert result.success is False
    assert result.error
    assert transport.sent == []


BAD_HEADERS: dict[str, Any] = {
    "no mapping": {"x-fairness-key": 7},
    "text": {"x-fairness-key": "org"},
    "bad priority": {"x-fairness-key": {"pipeline_priority": 11}},
    "null priority": {"x-fairness-key": {"pipeline_priority": None}},
    "bad workload": {"x-fairness-key": {"workload_type": "batch"}},
    "bad org": {"x-fairness-key": {"org_id": 7}},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_invalid_fairness_header_is_rejected(name: str) -> None:
    """A blocking dispatch returns a failure, the others raise PayloadError, and nothing is sent."""
    transport = completed({"success": True})
    result = dispatcher(transport).dispatch(Context(), 1, BAD_HEADERS[name])
    assert (result.success, bool(result.error)) == (False, True)
    for method in ("dispatch_async", "dispatch_with_callback"):
        with pytest.raises(PayloadError):
            getattr(dispatcher(transport), method)(Context(), headers=BAD_HEADERS[name])
    assert transport.sent == []


@pytest.mark.parametrize("sent_headers", [7, "text", ["x-fairness-key"], [("x-fairness-key", {})]], ids=repr)
def test_invalid_headers_become_a_failure(sent_headers: Any) -> None:
    """Headers of another type become a failure too."""
    assert dispatcher(completed({"success": True})).dispatch(Context(), 1, sent_headers).success is False


FAILURES: list[BaseException] = [
    TransportUnavailable("the database is away"),
    TransportUnavailable("no answer", fate_unknown=True),
    TransportRefused("no"),
    TransportError(""),
    RuntimeError("a driver's own"),
    ValueError(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("where", ["failure", "reply_failure"])
def test_transport_failure_becomes_a_failure_result(failure: BaseException, where: str) -> None:
    """A failed enqueue and a failed wait become ExecutionResult.failure with the error text."""
    result = dispatcher(RecordingTransport(**{where: failure})).dispatch(Context(), 1)  # type: ignore[arg-type]
    assert result.success is False
    assert result.error
    assert str(failure) in result.error


def test_timeout_becomes_a_failure_result() -> None:
    """A missing reply becomes a failure that names the queue."""
    result = dispatcher(RecordingTransport()).dispatch(Context(), 0.01)
    assert result.success is False
    assert "celery_executor_legacy" in str(result.error)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5", object()], ids=["0", "-1", "nan", "str", "object"])
def test_invalid_timeout_becomes_a_failure_result(timeout: Any) -> None:
    """An invalid timeout becomes a failure, and nothing is sent."""
    transport = completed({"success": True})
    assert dispatcher(transport).dispatch(Context(), timeout).success is False
    assert transport.sent == []


@given(some.texts)
def test_failed_task_becomes_a_failure_result(error: str) -> None:
    """The error text of the task is the text of the failure."""
    result = dispatcher(RecordingTransport(answer=Reply("", "failed", error=error))).dispatch(Context(), 1)
    assert result.success is False
    assert result.error
    assert error in result.error


def test_failure_without_text_names_task_and_queue() -> None:
    """An empty error text is replaced by one that names the task and the queue."""
    result = dispatcher(RecordingTransport(answer=Reply("", "failed", error=""))).dispatch(Context(), 1)
    expected = "execute_extraction on queue 'celery_executor_legacy' failed without an error text (TaskFailed)"
    assert result.error == expected


@given(some.json_values)
def test_any_reply_becomes_a_result(reply: Any) -> None:
    """Any reply becomes an ExecutionResult, and a success only if the reply says so."""
    result = dispatcher(completed(reply)).dispatch(Context(), 1)
    is_success = isinstance(reply, dict) and reply.get("success") is True
    assert isinstance(result, ExecutionResult)
    assert not result.success or is_success


BAD_REPLIES: list[Any] = [
    None, {}, [], "", 0, False, True, "ok", [{"success": True}], {"data": {}}, {"success": None}, {"success": "true"},
    {"success": 1}, {"success": True, "data": []}, {"success": True, "metadata": "x"}, {"success": True, "error": "x"},
    {"success": False}, {"success": False, "error": None}, {"success": False, "error": ""},
    {"success": False, "error": 5}, {"success": False, "error": {"a": 1}},
]  # fmt: skip


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=repr)
def test_malformed_reply_becomes_a_failure(reply: Any) -> None:
    """A reply that is not an execution result becomes a failure that names the fault."""
    result = dispatcher(completed(reply)).dispatch(Context(), 1)
    assert result.success is False
    assert "not an execution result" in str(result.error)


# The other two methods raise an enqueue failure.


@pytest.mark.parametrize("method", ["dispatch_async", "dispatch_with_callback"])
@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_enqueue_failure_is_logged_and_raised(
    method: str, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets the transport's error, and one ERROR event names the method and the executor."""
    context = Context(organization_id="org-1", executor_params={"text": CONTENT})
    with pytest.raises(type(failure)) as caught:
        getattr(dispatcher(RecordingTransport(failure=failure)), method)(context)
    assert caught.value is failure
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for part in (method, "legacy", "org-1", "run-1", type(failure).__name__):
        assert part in record.getMessage()


@pytest.mark.parametrize("method", ["dispatch", "dispatch_async", "dispatch_with_callback"])
@pytest.mark.parametrize("name", ["to_dict raises", "name raises", "organisation raises"])
def test_failure_log_has_no_content(method: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the context's values nor an exception's text is logged."""
    context = HOSTILE[name]()
    if method == "dispatch":
        dispatcher(RecordingTransport()).dispatch(context, 1)
    else:
        with pytest.raises(RuntimeError, match=CONTENT):
            getattr(dispatcher(RecordingTransport()), method)(context)
    assert len(caplog.records) == 1
    assert CONTENT not in caplog.text
    assert "RuntimeError" in caplog.text


def first(*_: object) -> NoReturn:
    raise LookupError("what went wrong first")


@pytest.mark.parametrize("method", ["dispatch_async", "dispatch_with_callback"])
@pytest.mark.parametrize("name", ["run_id", "organization_id", "executor_name"])
@pytest.mark.parametrize("value", [property(raises), Unprintable()], ids=["raises", "cannot be printed"])
def test_unloggable_context_does_not_hide_the_error(method: str, name: str, value: Any) -> None:
    """The caller gets the first error, not that of logging it."""
    with pytest.raises(LookupError, match="first"):
        getattr(dispatcher(RecordingTransport()), method)(hostile(to_dict=first, **{name: value}))


def test_invalid_callback_raises_before_the_send() -> None:
    """A signature that would lose a part raises SignatureError, and nothing is sent."""
    transport = RecordingTransport()
    with pytest.raises(SignatureError, match="queue"):
        dispatcher(transport).dispatch_with_callback(Context(), on_success={"task": "done"})
    assert transport.sends == 0


# The fairness header.


@given(some.fairness_keys)
def test_fairness_header_becomes_the_fairness_key(key: FairnessKey) -> None:
    """x-fairness-key becomes the fairness of the payload; other headers are not sent."""
    assert fairness_from_headers({"x-fairness-key": attrs.asdict(key), "x-other": object()}) == key
    assert fairness_from_headers({"x-fairness-key": {}}) == FairnessKey()
    for none in (None, {}, {"x-other": 1}, {"x-fairness-key": None}):
        assert fairness_from_headers(none) is None


# ExecutionResult.


@given(results)
def test_execution_result_round_trips_through_its_dict(result: ExecutionResult) -> None:
    """to_dict returns the product's four keys in order; from_dict reads them and ignores unknown keys."""
    fields = result.to_dict()
    assert list(fields) == ["success", "data", "metadata", "error"]
    assert ExecutionResult.from_dict(fields) == ExecutionResult.from_dict({**fields, "new": 1}) == result
    assert normalise(result) == fields


@given(st.booleans(), st.none() | some.texts)
def test_only_a_failure_has_an_error(success: bool, error: str | None) -> None:
    """The type rejects a success with an error and a failure without one."""
    if success == (error is None) and error != "":
        assert ExecutionResult(success, error=error).error == error
    else:
        with pytest.raises(PayloadError) as caught:
            ExecutionResult(success, error=error)
        assert caught.value.path == "$.error"


def test_failure_has_its_text_and_metadata() -> None:
    """failure() sets success to False, empty data, and the given metadata."""
    assert ExecutionResult.failure("no").to_dict() == {"success": False, "data": {}, "metadata": {}, "error": "no"}
    assert ExecutionResult.failure("no", {"a": 1}).metadata == {"a": 1}
    with pytest.raises(PayloadError):
        ExecutionResult.failure("")


@pytest.mark.parametrize("unfit", ["", "x" * 256, None, 7], ids=["empty", "long", "None", "int"])
def test_invalid_executor_name_is_rejected(unfit: Any) -> None:
    """An executor name that cannot be part of a queue name raises an error with its path."""
    transport = RecordingTransport()
    context = Context(executor_name=unfit)
    with pytest.raises(PayloadError, match="executor_name"):
        dispatcher(transport).dispatch_async(context)
    assert "executor_name" in (dispatcher(transport).dispatch(context).error or "")
    assert transport.sends == 0


def test_names_of_unsent_headers_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each dispatcher logs the names of unsent headers once, and never their values."""
    found = dispatcher(completed({"success": True}))
    sent_headers = {"x-tenant": "secret", "priority": 4711, "x-fairness-key": {"org_id": "o"}}
    for _ in range(2):
        found.dispatch(Context(), 1, sent_headers)
        found.dispatch_async(Context(), {"x-fairness-key": {"org_id": "o"}})
        found.dispatch_with_callback(Context(), headers={"x-other": "secret"})
    told = [one.getMessage() for one in caplog.records if getattr(one, "wire.event", "").startswith("dispatch_headers")]
    assert told == [
        'wire.dispatch_headers_left_out names="priority, x-tenant" count=2',
        "wire.dispatch_headers_left_out names=x-other count=1",
    ]
