"""The strict writer: the exact shape of a message, and the path of an invalid value."""

from __future__ import annotations

import copy
import enum
import json
import math
from typing import Any

import attrs
import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    FairnessKey,
    PayloadError,
    TaskPayload,
    from_wire,
    to_wire,
)
from unstract_core.codec import MAX_NAME_BYTES, to_json, value_to_json

ALWAYS = ["task_name", "args", "kwargs", "queue", "fairness"]
WHEN_SET = ["reply_key", "on_success", "on_error", "task_id", "headers"]
CONTINUATION = ["task_name", "kwargs", "queue"]


def payload(**fields: Any) -> TaskPayload:
    return TaskPayload(**{"task_name": "t", "queue": "q", **fields})


def continuation(**fields: Any) -> ContinuationSpec:
    return ContinuationSpec(**{"task_name": "t", "queue": "q", **fields})


def refusal(written: TaskPayload) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        to_wire(written)
    with pytest.raises(PayloadError):
        to_json(written)
    return caught.value


def test_simplest_message_equals_the_documented_one() -> None:
    """The writer always writes five keys, in the order of the wire."""
    simple = payload(task_name="execute_extraction", args=[{}], queue="celery_executor_legacy")
    assert json.dumps(to_wire(simple)) == (
        '{"task_name": "execute_extraction", "args": [{}], "kwargs": {}, '
        '"queue": "celery_executor_legacy", "fairness": null}'
    )


@given(some.payloads())
def test_unset_optional_keys_are_not_written(written: TaskPayload) -> None:
    """reply_key, on_success, on_error, task_id and headers are written only if they are set, in the wire's order."""
    wire = to_wire(written)
    assert list(wire) == ALWAYS + [key for key in WHEN_SET if getattr(written, key) is not None]
    for key in ("on_success", "on_error"):
        assert key not in wire or list(wire[key]) == CONTINUATION
    if wire["fairness"] is not None:
        assert list(wire["fairness"]) == ["org_id", "workload_type", "pipeline_priority"]
    assert list(json.loads(to_json(written))) == list(wire)


@given(some.payloads())
def test_written_values_are_plain_json(written: TaskPayload) -> None:
    """The members of a written message are JSON values that every transport can carry."""
    wire = to_wire(written)
    assert type(wire) is dict
    for value in [
        *wire["args"],
        *wire["kwargs"].values(),
        *(wire[key] for key in wire if key not in ("args", "kwargs")),
    ]:
        assert some.outside(value) is None


@given(some.payloads())
def test_read_of_a_written_payload_is_equal(written: TaskPayload) -> None:
    """Reading a written message returns an equal payload: from the dict, from text and from bytes."""
    text = to_json(written)
    assert from_wire(to_wire(written)) == written
    assert from_wire(text) == written
    assert from_wire(text.encode()) == written
    assert from_wire(json.dumps(to_wire(written), ensure_ascii=False).encode()) == written


@given(some.payloads())
def test_rewriting_a_message_keeps_every_byte(written: TaskPayload) -> None:
    """A message that is read and written again is byte for byte the same."""
    text = to_json(written)
    assert to_json(from_wire(text)) == text


@given(some.convertibles, some.convertibles, some.convertibles)
def test_writer_normalises_args_and_all_kwargs(arg: Any, kwarg: Any, callback: Any) -> None:
    """args, kwargs and the kwargs of both continuations are normalised by the same rules."""
    spec = continuation(kwargs={"x": callback})
    wire = to_wire(payload(args=[arg], kwargs={"x": kwarg}, on_success=spec, on_error=spec))
    back = from_wire(json.dumps(wire, allow_nan=False))
    assert to_wire(back) == wire
    for members in (wire["args"], wire["kwargs"].values(), wire["on_success"]["kwargs"].values()):
        assert all(some.outside(value) is None for value in members)


@given(some.payloads(awaits="both"))
def test_written_dict_is_independent_of_the_payload(written: TaskPayload) -> None:
    """Later changes to the caller's dicts and lists do not reach the message."""
    wire = to_wire(written)
    before = copy.deepcopy(wire)
    assert written.on_success is not None
    assert written.on_error is not None
    for members in (written.kwargs, written.on_success.kwargs, written.on_error.kwargs):
        for value in members.values():
            _spoil(value)
        members["late"] = "change"
    for value in written.args:
        _spoil(value)
    written.args.append("late change")
    assert wire == before


def test_shared_kwargs_are_copied_for_each_continuation() -> None:
    """Both callbacks may share one kwargs object; the written copies are independent."""
    shared = {"callback_kwargs": {"executor_task_id": "id"}}
    spec = continuation(kwargs=shared)
    wire = to_wire(payload(on_success=spec, on_error=spec))
    wire["on_error"]["kwargs"]["callback_kwargs"]["error"] = "x"
    assert wire["on_success"]["kwargs"] == shared == {"callback_kwargs": {"executor_task_id": "id"}}


class Kind(str, enum.Enum):  # noqa: UP042 - the older form is what the product's own enums use
    API = "api"


def test_str_enum_workload_type_becomes_text() -> None:
    """The product's enum is written as its text."""
    wire = to_wire(payload(fairness=FairnessKey(workload_type=Kind.API)))  # type: ignore[arg-type]  # what is tested
    assert some.same(wire["fairness"], {"org_id": None, "workload_type": "api", "pipeline_priority": 5})


OFFENDERS: list[tuple[str, dict[str, Any]]] = [
    ("$.task_name", {"task_name": ""}),
    ("$.task_name", {"task_name": None}),
    ("$.task_name", {"task_name": 7}),
    ("$.task_name", {"task_name": b"t"}),
    ("$.task_name", {"task_name": "a\x00"}),
    ("$.task_name", {"task_name": "\ud800"}),
    ("$.queue", {"queue": ""}),
    ("$.queue", {"queue": None}),
    ("$.queue", {"queue": ["q"]}),
    ("$.args", {"args": "text"}),
    ("$.args", {"args": {}}),
    ("$.args", {"args": None}),
    ("$.args[0]", {"args": [math.nan]}),
    ("$.args[0].x", {"args": [{"x": object()}]}),
    ("$.args[1][0]", {"args": [1, [b"bytes"]]}),
    ("$.kwargs", {"kwargs": []}),
    ("$.kwargs", {"kwargs": None}),
    ("$.kwargs.x", {"kwargs": {"x": math.inf}}),
    ('$.kwargs["a b"].y', {"kwargs": {"a b": {"y": "\x00"}}}),
    ("$.reply_key", {"reply_key": ""}),
    ("$.reply_key", {"reply_key": 5}),
    ("$.task_id", {"task_id": ""}),
    ("$.task_id", {"task_id": 5}),
    ("$.fairness", {"fairness": "org"}),
    ("$.fairness", {"fairness": {"org_id": None, "workload_type": "api", "pipeline_priority": 5}}),
    ("$.fairness.org_id", {"fairness": FairnessKey(org_id=7)}),  # type: ignore[arg-type]
    ("$.fairness.org_id", {"fairness": FairnessKey(org_id="a\x00")}),
    ("$.fairness.workload_type", {"fairness": FairnessKey(workload_type="batch")}),  # type: ignore[arg-type]
    ("$.fairness.workload_type", {"fairness": FairnessKey(workload_type=None)}),  # type: ignore[arg-type]
    ("$.fairness.workload_type", {"fairness": FairnessKey(workload_type=["api"])}),  # type: ignore[arg-type]
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=0)}),
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=11)}),
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=True)}),
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=5.0)}),  # type: ignore[arg-type]
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority="7")}),  # type: ignore[arg-type]
    ("$.fairness.pipeline_priority", {"fairness": FairnessKey(pipeline_priority=None)}),  # type: ignore[arg-type]
    ("$.on_success", {"on_success": "task"}),
    ("$.on_success", {"on_success": {"task_name": "t", "kwargs": {}, "queue": "q"}}),
    ("$.on_success.task_name", {"on_success": continuation(task_name="")}),
    ("$.on_success.queue", {"on_success": continuation(queue=None)}),
    ("$.on_success.kwargs", {"on_success": continuation(kwargs=[])}),
    ("$.on_success.kwargs.x", {"on_success": continuation(kwargs={"x": {"__type__": 1, "__value__": 2}})}),
    ("$.on_error", {"on_error": 5}),
    ("$.on_error.task_name", {"on_error": continuation(task_name=7)}),
    ("$.on_error.queue", {"on_error": continuation(queue="")}),
    ("$.on_error.kwargs.a.b[2]", {"on_error": continuation(kwargs={"a": {"b": [0, 1, object()]}})}),
]


@pytest.mark.parametrize(
    ("path", "fields"), OFFENDERS, ids=[f"{number} {path}" for number, (path, _) in enumerate(OFFENDERS)]
)
def test_writer_rejects_invalid_values_by_path(path: str, fields: dict[str, Any]) -> None:
    """Wrong types, empty names and values outside the domain raise PayloadError with their path."""
    assert refusal(payload(**fields)).path == path


@given(some.burying(some.unfit_scalars), st.sampled_from(["args", "kwargs", "on_success", "on_error"]))
def test_path_leads_to_the_exact_invalid_value(found: some.Planted, where: str) -> None:
    """The path leads from the root of the message to the invalid value."""
    places: dict[str, Any] = {"args": ["first", found.whole], "kwargs": {"x": found.whole}}
    fields = {where: places.get(where, continuation(kwargs={"x": found.whole}))}
    root = {"args": "$.args[1]", "kwargs": "$.kwargs.x"}.get(where, f"$.{where}.kwargs.x")
    assert refusal(payload(**fields)).path == root + found.path[1:]


NAME_PLACES: dict[str, Any] = {
    "$.task_name": lambda name: payload(task_name=name),
    "$.queue": lambda name: payload(queue=name),
    "$.reply_key": lambda name: payload(reply_key=name),
    "$.task_id": lambda name: payload(task_id=name),
    "$.on_success.task_name": lambda name: payload(on_success=continuation(task_name=name)),
    "$.on_success.queue": lambda name: payload(on_success=continuation(queue=name)),
    "$.on_error.task_name": lambda name: payload(on_error=continuation(task_name=name)),
    "$.on_error.queue": lambda name: payload(on_error=continuation(queue=name)),
}


@pytest.mark.parametrize("path", NAME_PLACES)
@given(st.sampled_from("aé€😀"), st.integers(1, 300))
def test_writer_rejects_names_over_255_bytes(path: str, character: str, count: int) -> None:
    """A name of 255 bytes of UTF-8 is accepted, and a longer one is rejected by its path."""
    written = NAME_PLACES[path](character * count)
    if count * len(character.encode()) <= 255:
        assert from_wire(to_json(written)) == written
    else:
        assert refusal(written).path == path
    assert MAX_NAME_BYTES == 255


@given(some.json_values)
def test_writer_accepts_only_a_payload(value: Any) -> None:
    """A value of another type is rejected at the root."""
    assert refusal(value).path == "$"


@given(some.payloads(awaits="both"), some.names)
def test_payload_type_rejects_reply_key_with_continuation(written: TaskPayload, key: str) -> None:
    """No payload can have a reply_key and a callback, neither when it is created nor when it is evolved."""
    changes: list[dict[str, Any]] = [{"on_success": None}, {"on_error": None}, {}]
    for fields in changes:
        with pytest.raises(PayloadError) as caught:
            attrs.evolve(written, reply_key=key, **fields)
        assert caught.value.path == "$.reply_key"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        written.reply_key = key  # type: ignore[misc]  # what is tested


@given(some.payloads(awaits="reply"), some.continuations)
def test_payload_type_rejects_continuation_with_reply_key(written: TaskPayload, spec: ContinuationSpec) -> None:
    """A callback cannot be added to a payload with a reply_key either."""
    for change in ({"on_success": spec}, {"on_error": spec}):
        fields: dict[str, Any] = change
        with pytest.raises(PayloadError):
            attrs.evolve(written, **fields)


def test_each_argument_may_have_64_levels() -> None:
    """args and kwargs themselves do not count as a level."""
    deep = some.nest(64)
    written = payload(args=[deep], kwargs={"x": deep}, on_success=continuation(kwargs={"x": deep}))
    assert from_wire(to_json(written)) == written
    assert refusal(payload(args=[some.nest(65)])).path == "$.args[0]" + "[0]" * 64


@given(some.anything)
def test_writer_writes_or_raises_payload_error(value: Any) -> None:
    """The writer returns JSON text that can be read back, or raises PayloadError."""
    for written in (payload(args=[value]), payload(kwargs={"x": value}), payload(kwargs=value), payload(args=value)):
        text = some.attempt(to_json, written)
        if isinstance(text, PayloadError):
            assert text.path.startswith(("$.args", "$.kwargs"))
        else:
            assert to_json(from_wire(text)) == text


@given(some.json_values)
def test_single_value_is_written_as_compact_json(value: Any) -> None:
    """One value becomes compact JSON text that reads back as an equal value."""
    text = value_to_json(value)
    assert some.same(json.loads(text), value)
    assert text == json.dumps(value, separators=(",", ":"))


def _spoil(value: Any) -> None:
    if isinstance(value, dict):
        value["late"] = "change"
    elif isinstance(value, list):
        value.append("late change")
