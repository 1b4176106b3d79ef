"""Dispatcher: the payload of each method, the calls to the transport, and the rejected arguments."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import attrs
import pytest
import strategies as some
from core.recording import RecordingTransport
from core.signatures import as_object, fields_of
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ConfigurationError,
    ContinuationSpec,
    ContractError,
    Dispatcher,
    DispatchHandle,
    FairnessKey,
    PayloadError,
    Reply,
    ReplyTimeout,
    SignatureError,
    TaskFailed,
    TaskPayload,
    TransportClosed,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    from_wire,
)

args_lists = st.lists(some.json_values, max_size=3)
requests = st.fixed_dictionaries(
    {"args": args_lists | args_lists.map(tuple), "kwargs": some.json_objects, "queue": some.names},
    optional={
        "org_id": some.names,
        "fairness": some.fairness_keys,
        "delay": st.integers(0, 10**6) | st.floats(0, 1e6),
    },
)


def expected(task_name: str, request: dict[str, Any], **fields: Any) -> TaskPayload:
    return TaskPayload(
        task_name=task_name,
        args=list(request["args"]),
        kwargs=request["kwargs"],
        queue=request["queue"],
        fairness=request.get("fairness"),
        **fields,
    )


def check_address(transport: RecordingTransport, request: dict[str, Any]) -> None:
    """Check the queue, organisation, priority and delay of the sent message."""
    message = transport.only().message
    fairness: FairnessKey | None = request.get("fairness")
    assert message.queue == request["queue"]
    assert message.org_id == (request.get("org_id") or (fairness and fairness.org_id) or "")
    assert message.priority == (5 if fairness is None else fairness.pipeline_priority)
    assert message.delay == request.get("delay", 0.0)


@given(some.names, requests)
def test_send_builds_a_payload_with_new_id(task_name: str, request: dict[str, Any]) -> None:
    """`send` sets no reply_key and no continuation; the handle's id is a new UUID and the payload's task_id."""
    transport = RecordingTransport()
    handle = Dispatcher(transport).send(task_name, **request)
    assert from_wire(transport.only().written) == expected(task_name, request, task_id=handle.id)
    assert str(uuid.UUID(handle.id)) == handle.id
    check_address(transport, request)


@given(some.names, requests, some.names | st.none(), some.continuations | st.none(), some.continuations | st.none())
def test_send_with_callback_carries_continuations_and_id(
    task_name: str,
    request: dict[str, Any],
    task_id: str | None,
    on_success: ContinuationSpec | None,
    on_error: ContinuationSpec | None,
) -> None:
    """The signatures become continuations; the id is the caller's, or else a new UUID."""
    transport = RecordingTransport()
    signatures: dict[str, Any] = {
        name: spec and as_object(fields_of(task=spec.task_name, kwargs=spec.kwargs, options={"queue": spec.queue}))
        for name, spec in (("on_success", on_success), ("on_error", on_error))
    }
    handle = Dispatcher(transport).send_with_callback(task_name, task_id=task_id, **signatures, **request)
    payload = expected(task_name, request, task_id=handle.id, on_success=on_success, on_error=on_error)
    assert from_wire(transport.only().written) == payload
    assert handle.id == task_id or (task_id is None and str(uuid.UUID(handle.id)) == handle.id)
    check_address(transport, request)


@given(some.names, requests, some.json_values, st.floats(0.001, 1e6))
def test_call_waits_under_a_new_reply_key(task_name: str, request: dict[str, Any], result: Any, timeout: float) -> None:
    """`call` sends a new reply_key and no task_id, waits once for the timeout, and consumes the reply."""
    transport = RecordingTransport(answer=Reply("", "completed", result=result))
    returned = Dispatcher(transport).call(task_name, timeout=timeout, **request)
    assert some.same(returned, result)
    (asked,) = transport.replies
    assert asked == {"key": asked["key"], "timeout": timeout, "consume": True}
    assert str(uuid.UUID(asked["key"])) == asked["key"]
    assert from_wire(transport.only().written) == expected(task_name, request, reply_key=asked["key"])
    assert transport.only().within is None
    check_address(transport, request)


@given(some.texts)
def test_call_raises_the_error_text_of_the_task(error: str) -> None:
    """A failed reply becomes TaskFailed with the text of the task's exception."""
    transport = RecordingTransport(answer=Reply("", "failed", error=error))
    with pytest.raises(TaskFailed) as caught:
        Dispatcher(transport).call("t", queue="q", timeout=1)
    assert str(caught.value) == error


@pytest.mark.parametrize("timeout", [1e-9, 60.0], ids=["at the deadline", "before it"])
@pytest.mark.parametrize(
    "failure",
    [
        TransportUnavailable("read a reply: away", effect="nothing was done"),
        TransportUnavailable("read a reply: lost", fate_unknown=True),
        TransportNotReady("read a reply: no table", remedy="create the table"),
        TransportRefused("read a reply: refused"),
        TransportClosed("closed"),
    ],
    ids=repr,
)
def test_call_with_unreadable_reply_says_task_was_sent(failure: Exception, timeout: float) -> None:
    """The error says that the task may have run, so that a caller does not send it twice."""

    class Lost(RecordingTransport):
        def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
            raise failure

    with pytest.raises(ContractError) as caught:
        Dispatcher(Lost()).call("t", queue="q", timeout=timeout)
    assert isinstance(caught.value, ReplyTimeout) or getattr(caught.value, "fate_unknown", False)
    assert "nothing" not in str(caught.value)


def test_call_timeout_names_task_queue_and_wait() -> None:
    """A missing reply raises ReplyTimeout, a TimeoutError, with the task, the queue and the wait."""
    with pytest.raises(ReplyTimeout) as caught:
        Dispatcher(RecordingTransport()).call("extract", queue="ocr", timeout=2.5)
    assert isinstance(caught.value, TimeoutError)
    assert all(part in str(caught.value) for part in ("'extract'", "'ocr'", "2.5 s"))


@pytest.mark.parametrize("result", [None, {}, [], 0, False, ""], ids=repr)
def test_call_returns_an_empty_result(result: Any) -> None:
    """`call` returns the task's result, also if it is empty."""
    transport = RecordingTransport(answer=Reply("", "completed", result=result))
    assert some.same(Dispatcher(transport).call("t", queue="q", timeout=1), result)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), -float("inf")])
def test_call_rejects_an_invalid_timeout(timeout: float) -> None:
    """A timeout that is not positive is rejected before anything is sent."""
    transport = RecordingTransport()
    with pytest.raises(ConfigurationError, match="timeout"):
        Dispatcher(transport).call("t", queue="q", timeout=timeout)
    assert transport.sends == 0


@pytest.mark.parametrize("wrong", [DispatchHandle("id"), uuid.UUID(int=1), 5, None, {}, b"id"], ids=repr)
def test_status_rejects_an_invalid_id(wrong: Any) -> None:
    """A handle, a UUID or a number raises PayloadError with what to pass instead."""
    with pytest.raises(PayloadError, match=r"handle\.id") as caught:
        Dispatcher(RecordingTransport()).status(wrong)
    assert caught.value.path == "$.task_id"


@given(some.names)
def test_status_reads_without_consuming(task_id: str) -> None:
    """`status` asks once, without waiting, and leaves the status in place."""
    transport = RecordingTransport(answer=Reply("", "failed", error="E: x"))
    assert Dispatcher(transport).status(task_id) == Reply(task_id, "failed", error="E: x")
    assert transport.replies == [{"key": task_id, "timeout": 0, "consume": False}]
    assert Dispatcher(RecordingTransport()).status(task_id) is None


def test_cursor_is_passed_to_the_transport() -> None:
    """The transport gets the object that the caller passed as `within`."""
    cursor = object()
    for method in ("send", "send_with_callback"):
        transport = RecordingTransport()
        getattr(Dispatcher(transport), method)("t", queue="q", within=cursor)
        assert transport.only().within is cursor


def test_given_organisation_overrides_that_of_fairness() -> None:
    """An explicit org_id, also an empty one, overrides that of the fairness key."""
    fairness = FairnessKey(org_id="fair")
    for given_org, key, found in (("x", fairness, "x"), (None, fairness, "fair"), ("", fairness, ""), (None, None, "")):
        transport = RecordingTransport()
        Dispatcher(transport).send("t", queue="q", org_id=given_org, fairness=key)
        assert transport.only().message.org_id == found


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "args a str": ("$.args", {"args": "text"}),
    "args bytes": ("$.args", {"args": b"x"}),
    "args a dict": ("$.args", {"args": {}}),
    "args a set": ("$.args", {"args": {1}}),
    "args a generator": ("$.args", {"args": iter([1])}),
    "args None": ("$.args", {"args": None}),
    "an argument": ("$.args[1].x", {"args": [1, {"x": object()}]}),
    "kwargs a list": ("$.kwargs", {"kwargs": [("a", 1)]}),
    "kwargs a str": ("$.kwargs", {"kwargs": "text"}),
    "a keyword": ("$.kwargs.x", {"kwargs": {"x": float("nan")}}),
    "queue empty": ("$.queue", {"queue": ""}),
    "queue None": ("$.queue", {"queue": None}),
    "queue too long": ("$.queue", {"queue": "q" * 256}),
    "delay negative": ("$.delay", {"delay": -1}),
    "delay endless": ("$.delay", {"delay": float("inf")}),
    "delay NaN": ("$.delay", {"delay": float("nan")}),
    "delay a str": ("$.delay", {"delay": "5"}),
    "delay None": ("$.delay", {"delay": None}),
    "org_id a number": ("$.org_id", {"org_id": 7}),
    "org_id too long": ("$.org_id", {"org_id": "o" * 256}),
    "fairness a dict": ("$.fairness", {"fairness": {"org_id": "o"}}),
    "fairness a str": ("$.fairness", {"fairness": "o"}),
    "fairness org": ("$.", {"fairness": FairnessKey(org_id=7)}),  # type: ignore[arg-type]
    "fairness workload": ("$.fairness.workload_type", {"fairness": FairnessKey(workload_type="x")}),  # type: ignore[arg-type]
    "priority 0": ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=0)}),
    "priority 11": ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=11)}),
    "priority a str": ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority="7")}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["send", "send_with_callback", "call"])
def test_invalid_argument_is_rejected_with_its_path(method: str, name: str) -> None:
    """Invalid arguments raise PayloadError with their path, and nothing is sent."""
    path, changed = BAD[name]
    transport = RecordingTransport()
    request: dict[str, Any] = {"queue": "q", **changed, **({"timeout": 1} if method == "call" else {})}
    with pytest.raises(PayloadError) as caught:
        getattr(Dispatcher(transport), method)("t", **request)
    assert caught.value.path.startswith(path)
    assert transport.sent == []
    assert transport.replies == []


@pytest.mark.parametrize("task_name", ["", None, 7, b"t", "t" * 256, "a\x00"], ids=lambda name: repr(name)[:12])
@pytest.mark.parametrize("method", ["send", "send_with_callback"])
def test_invalid_task_name_is_rejected(method: str, task_name: Any) -> None:
    """A name that a transport cannot carry raises PayloadError."""
    transport = RecordingTransport()
    with pytest.raises(PayloadError) as caught:
        getattr(Dispatcher(transport), method)(task_name, queue="q")
    assert caught.value.path == "$.task_name"
    assert transport.sent == []


@pytest.mark.parametrize("name", ["on_success", "on_error"])
@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("task", {"task": ""}),
        ("options.queue", {"options": {}}),
        ("args", {"args": (1,)}),
        ("immutable", {"immutable": True}),
        ("subtask_type", {"subtask_type": "chain"}),
        ("options.countdown", {"options": {"queue": "q", "countdown": 1}}),
        ("kwargs.a.b", {"kwargs": {"a": {"b": object()}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lossy_callback_is_rejected_with_its_path(name: str, path: str, changed: dict[str, Any]) -> None:
    """The error names the callback and its part; nothing is sent."""
    transport = RecordingTransport()
    with pytest.raises(SignatureError) as caught:
        Dispatcher(transport).send_with_callback("t", queue="q", **{name: as_object(fields_of(**changed))})
    assert caught.value.path == f"$.{name}.{path}"
    assert transport.sends == 0


def test_empty_task_id_is_rejected() -> None:
    """Only None is replaced by a new id."""
    with pytest.raises(PayloadError) as caught:
        Dispatcher(RecordingTransport()).send_with_callback("t", queue="q", task_id="")
    assert caught.value.path == "$.task_id"


@pytest.mark.parametrize("method", ["send", "send_with_callback", "call"])
def test_enqueue_failure_reaches_the_caller_unchanged(method: str) -> None:
    """The transport's error reaches the caller after one attempt, without waiting for a reply."""
    failure = TransportUnavailable("away", fate_unknown=True)
    transport = RecordingTransport(failure=failure)
    with pytest.raises(TransportUnavailable) as caught:
        getattr(Dispatcher(transport), method)("t", queue="q", **({"timeout": 1} if method == "call" else {}))
    assert caught.value is failure
    assert transport.sends == 1
    assert transport.replies == []


@given(some.json_arrays, some.json_objects)
def test_dispatch_leaves_the_arguments_unchanged(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Dispatch does not modify the caller's lists and dicts."""
    before = copy.deepcopy((args, kwargs))
    Dispatcher(RecordingTransport()).send_with_callback(
        "t",
        args=args,
        kwargs=kwargs,
        queue="q",
        on_success=as_object(fields_of(kwargs=kwargs)),
        on_error=as_object(fields_of(kwargs=kwargs)),
    )
    assert (args, kwargs) == before


@given(some.names)
def test_each_dispatch_has_a_unique_id(task_name: str) -> None:
    """Two dispatches never share an id, nor two calls a reply key."""
    transport = RecordingTransport(answer=Reply("", "completed"))
    dispatcher = Dispatcher(transport)
    ids = [dispatcher.send(task_name, queue="q").id for _ in range(3)]
    ids += [dispatcher.send_with_callback(task_name, queue="q").id for _ in range(3)]
    for _ in range(3):
        dispatcher.call(task_name, queue="q", timeout=1)
    ids += [asked["key"] for asked in transport.replies]
    assert len(set(ids)) == 9


def test_handle_has_only_an_id() -> None:
    """A handle has no method that waits."""
    handle = Dispatcher(RecordingTransport()).send("t", queue="q")
    assert [name for name in dir(handle) if not name.startswith("_")] == ["id"]
    assert handle == DispatchHandle(handle.id)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        handle.id = "other"  # type: ignore[misc]  # what is tested
