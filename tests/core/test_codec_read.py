"""The tolerant reader: what it ignores, what it supplies, and that it never coerces and raises one error only."""

from __future__ import annotations

import copy
import json
import types
from typing import Any

import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    FairnessKey,
    MalformedPayload,
    PayloadError,
    TaskPayload,
    from_wire,
    to_wire,
)
from unstract_core.codec import Salvage, salvage

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = ["task_name", "args", "kwargs", "queue", "fairness", "reply_key", "on_success", "on_error", "task_id"]


def wire_of(**fields: Any) -> dict[str, Any]:
    return {"task_name": "t", "args": [], "kwargs": {}, "queue": "q", "fairness": None, **fields}


def problems_of(raw: Any) -> tuple[str, ...]:
    with pytest.raises(MalformedPayload) as caught:
        from_wire(raw)
    error = caught.value
    assert error.problems
    assert all(" @ $" in problem for problem in error.problems)
    return error.problems


@given(
    some.payloads(), st.dictionaries(some.names.filter(lambda name: name not in MEMBERS), some.json_values, max_size=3)
)
def test_unknown_keys_are_ignored_at_every_level(written: TaskPayload, unknown: dict[str, Any]) -> None:
    """A newer backend may add keys to the message, to fairness and to a continuation; an older worker reads on."""
    new = {f"x-{key}": value for key, value in unknown.items()}
    wire = {**new, **to_wire(written)}
    for key in ("fairness", "on_success", "on_error"):
        if wire.get(key) is not None:
            wire[key] = {**new, **wire[key]}
    assert from_wire(wire) == written
    assert from_wire(json.dumps(wire)) == written


@given(some.names, some.names)
def test_absent_members_get_their_defaults(task_name: str, queue: str) -> None:
    """Only task_name and queue are needed; null is the same as absent for what is optional."""
    expected = TaskPayload(task_name=task_name, queue=queue)
    assert from_wire({"task_name": task_name, "queue": queue}) == expected
    assert (
        from_wire(wire_of(task_name=task_name, queue=queue, reply_key=None, on_success=None, on_error=None)) == expected
    )
    assert from_wire(wire_of(task_name=task_name, queue=queue, task_id=None, fairness={})).fairness == FairnessKey()


def test_a_continuation_without_kwargs_has_none() -> None:
    """kwargs may be absent from a continuation."""
    read = from_wire(wire_of(on_error={"task_name": "e", "queue": "c"}))
    assert read.on_error == ContinuationSpec(task_name="e", kwargs={}, queue="c")


def test_the_messages_of_the_product_are_readable() -> None:
    """The rows that the product writes today: fire and forget, blocking, and with callbacks."""
    context = {"executor_name": "legacy", "operation": "ide_index", "run_id": "r", "executor_params": {"a": 1.5}}
    fairness = {"org_id": "org_1", "workload_type": "non_api", "pipeline_priority": 5}
    base = wire_of(task_name="execute_extraction", args=[context], queue="celery_executor_legacy", fairness=fairness)
    callback_kwargs: dict[str, Any] = {
        "callback_kwargs": {"executor_task_id": "id-1", "log_events_id": "room", "prompt_ids": ["p"]}
    }
    ok = {"task_name": "ide_prompt_complete", "kwargs": callback_kwargs, "queue": "ide_callback"}
    failed = {"task_name": "ide_prompt_error", "kwargs": callback_kwargs, "queue": "ide_callback"}

    plain = from_wire(base)
    assert (plain.args, plain.fairness) == ([context], FairnessKey("org_1", "non_api", 5))
    assert from_wire({**base, "reply_key": "reply-1"}).reply_key == "reply-1"
    chained = from_wire(json.dumps({**base, "on_success": ok, "on_error": failed, "task_id": "id-1"}))
    assert chained.on_success == ContinuationSpec(
        task_name="ide_prompt_complete", kwargs=callback_kwargs, queue="ide_callback"
    )
    assert chained.on_error is not None
    assert (chained.on_error.task_name, chained.task_id) == ("ide_prompt_error", "id-1")


NOT_TEXT: list[Any] = [7, True, 1.5, [], {}]
NOT_TEXT_AT_ALL: list[Any] = [None, *NOT_TEXT, ""]
WRONG: dict[str, tuple[Any, list[Any]]] = {
    "$.task_name": (lambda bad: wire_of(task_name=bad), NOT_TEXT_AT_ALL),
    "$.queue": (lambda bad: wire_of(queue=bad), NOT_TEXT_AT_ALL),
    "$.args": (lambda bad: wire_of(args=bad), [None, {}, "[]", 1, True]),
    "$.kwargs": (lambda bad: wire_of(kwargs=bad), [None, [], "{}", 1, False]),
    "$.reply_key": (lambda bad: wire_of(reply_key=bad), [*NOT_TEXT, ""]),
    "$.task_id": (lambda bad: wire_of(task_id=bad), [*NOT_TEXT, ""]),
    "$.fairness": (lambda bad: wire_of(fairness=bad), [7, "org", [], True]),
    "$.fairness.org_id": (lambda bad: wire_of(fairness={"org_id": bad}), NOT_TEXT),
    "$.fairness.workload_type": (
        lambda bad: wire_of(fairness={"workload_type": bad}),
        [None, "API", "batch", "", 1, ["api"], {}],
    ),
    "$.fairness.pipeline_priority": (
        lambda bad: wire_of(fairness={"pipeline_priority": bad}),
        [None, "7", 7.0, True, 0, 11, -1, [], 2**70],
    ),
    "$.on_success": (lambda bad: wire_of(on_success=bad), [7, "t", [], True]),
    "$.on_success.task_name": (lambda bad: wire_of(on_success={"task_name": bad, "queue": "q"}), NOT_TEXT_AT_ALL),
    "$.on_success.queue": (lambda bad: wire_of(on_success={"task_name": "t", "queue": bad}), NOT_TEXT_AT_ALL),
    "$.on_success.kwargs": (
        lambda bad: wire_of(on_success={"task_name": "t", "queue": "q", "kwargs": bad}),
        [None, [], "{}", 0],
    ),
    "$.on_error": (lambda bad: wire_of(on_error=bad), [7, "t", [], True]),
    "$.on_error.kwargs": (
        lambda bad: wire_of(on_error={"task_name": "t", "queue": "q", "kwargs": bad}),
        [None, [], "{}", 0],
    ),
}


@pytest.mark.parametrize("path", WRONG)
def test_a_reader_never_coerces_and_names_the_path(path: str) -> None:
    """ "7" is no 7, True no 1, null no list: each is refused under its path, from a dict and from text."""
    make, offenders = WRONG[path]
    for offender in offenders:
        for raw in (make(offender), json.dumps(make(offender))):
            (problem,) = problems_of(raw)
            assert problem.endswith(f" @ {path}"), offender


@pytest.mark.parametrize("key", ["task_name", "queue"])
def test_a_missing_member_is_named(key: str) -> None:
    """What has no default and is absent is reported under its own name."""
    wire = wire_of(on_error={"task_name": "t", "queue": "q"})
    del wire[key]
    assert problems_of(wire) == (f"required field missing @ $.{key}",)
    wire = wire_of(on_error={"task_name": "t", "queue": "q"})
    del wire["on_error"][key]
    assert problems_of(wire) == (f"required field missing @ $.on_error.{key}",)


def test_every_problem_is_reported_at_once() -> None:
    """A message with several faults names each, so that its writer mends them in one go."""
    problems = problems_of({"task_name": 1, "args": {}, "fairness": {"pipeline_priority": "7"}, "on_error": 5})
    assert {problem.rpartition(" @ ")[2] for problem in problems} == {
        "$.task_name", "$.args", "$.queue", "$.fairness.pipeline_priority", "$.on_error",
    }  # fmt: skip


@given(some.payloads(awaits="both"), some.names)
def test_a_message_with_reply_key_and_continuations_is_malformed(written: TaskPayload, key: str) -> None:
    """The type's own rule holds on the way in as well."""
    assert "reply_key" in problems_of({**to_wire(written), "reply_key": key})[0]


@given(any_json)
def test_any_json_is_read_or_malformed(value: Any) -> None:
    """No JSON value, as a Python value or as text, makes the reader raise anything but MalformedPayload."""
    for raw in (value, json.dumps(value), json.dumps(value).encode()):
        _read_or_malformed(raw)
    if not isinstance(value, dict):
        problems_of(json.dumps(value))


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda data: b'{"task_name": "' + data + b'"}'))
def test_any_bytes_are_read_or_malformed(data: bytes) -> None:
    """No bytes make the reader raise anything but MalformedPayload."""
    _read_or_malformed(data)
    _read_or_malformed(data.decode("latin-1"))


@given(some.payloads(), st.data())
def test_a_damaged_message_is_read_or_malformed(written: TaskPayload, data: st.DataObject) -> None:
    """A good message in which anything was replaced, removed or added is read or malformed, and can be searched."""
    wire = _damaged(json.loads(json.dumps(to_wire(written))), data)
    for raw in (wire, json.dumps(wire)):
        _read_or_malformed(raw)
        _well_formed(salvage(raw))


NO_OBJECT: list[Any] = [
    "", " ", "nul", "{", '{"a": NaN}', '{"a": Infinity}', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff",
    b"\xef\xbb\xbf[]", "\ufeff{}", '"\\ud800"', "{'a': 1}", None, 7, [], bytearray(b"{}"), object(), (1, 2),
]  # fmt: skip


@pytest.mark.parametrize("raw", NO_OBJECT, ids=[f"{number}" for number in range(len(NO_OBJECT))])
def test_what_is_no_json_object_is_malformed(raw: Any) -> None:
    """Broken, over-deep, over-long or foreign input is malformed at the root, and nothing can be salvaged."""
    assert problems_of(raw)[0].endswith("@ $")
    assert salvage(raw) == Salvage()


def test_any_mapping_is_read() -> None:
    """A mapping need not be a dict."""
    assert from_wire(types.MappingProxyType(wire_of())) == TaskPayload(task_name="t", queue="q")


def test_a_failed_reading_does_not_change_the_message() -> None:
    """What is malformed is kept as it is, for whoever looks at the dead letter."""
    wire = wire_of(on_error={"task_name": "", "kwargs": {"a": []}})
    before = copy.deepcopy(wire)
    problems_of(wire)
    salvage(wire)
    assert wire == before


BREAKS: dict[str, dict[str, Any]] = {
    "no task name": {"task_name": None},
    "kwargs null": {"kwargs": None},
    "args an object": {"args": {}},
    "queue a number": {"queue": 5},
    "priority a text": {"fairness": {"org_id": "o", "workload_type": "api", "pipeline_priority": "7"}},
    "the other continuation broken": {"on_success": {"task_name": 5}},
    "two addresses": {"reply_key": "reply-1"},
}


@pytest.mark.parametrize("breakage", BREAKS)
@given(some.payloads(awaits="on_error", task_id=True))
def test_the_addresses_of_a_broken_message_are_found(breakage: str, written: TaskPayload) -> None:
    """task_id and on_error are found in a message that cannot be read, whatever else is wrong with it."""
    wire = {**to_wire(written), **BREAKS[breakage]}
    problems_of(wire)
    for raw in (wire, json.dumps(wire), json.dumps(wire).encode()):
        found = salvage(raw)
        assert found.task_id == written.task_id
        assert found.on_error == written.on_error
        assert found.reply_key == BREAKS[breakage].get("reply_key")
        assert found.fairness == (None if breakage == "priority a text" else written.fairness)


@pytest.mark.parametrize("breakage", [name for name in BREAKS if name != "two addresses"])
@given(some.payloads(awaits="reply"))
def test_the_reply_key_of_a_broken_message_is_found(breakage: str, written: TaskPayload) -> None:
    """A blocked caller's key is found in a message that cannot be read."""
    wire = {**to_wire(written), **BREAKS[breakage]}
    problems_of(wire)
    assert salvage(wire).reply_key == salvage(json.dumps(wire)).reply_key == written.reply_key


@given(some.payloads(awaits="on_error", task_id=True))
def test_a_broken_address_does_not_hide_the_others(written: TaskPayload) -> None:
    """Each address is looked for on its own."""
    wire = to_wire(written)
    assert salvage({**wire, "on_error": {"task_name": "e"}}).task_id == written.task_id
    assert salvage({**wire, "task_id": 5}).on_error == written.on_error


def _read_or_malformed(raw: Any) -> None:
    read = some.attempt(from_wire, raw)
    if isinstance(read, PayloadError):
        assert isinstance(read, MalformedPayload)
        assert read.problems
    else:
        assert type(read.task_name) is type(read.queue) is str
        assert type(read.args) is list
        assert type(read.kwargs) is dict


def _well_formed(found: Salvage) -> None:
    for name in (found.task_id, found.reply_key):
        assert name is None or (type(name) is str and name)
    assert found.on_error is None or (type(found.on_error.kwargs) is dict and found.on_error.queue)
    assert found.fairness is None or 1 <= found.fairness.pipeline_priority <= 10


def _damaged(wire: dict[str, Any], data: st.DataObject) -> Any:
    """Replace, remove or add something, at any depth."""
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = wire
        while isinstance(target, dict) and target and data.draw(st.booleans()):
            inner = target[data.draw(st.sampled_from(sorted(target)))]
            if not isinstance(inner, dict):
                break
            target = inner
        key = data.draw(st.sampled_from([*sorted(target), *MEMBERS]))
        if data.draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = data.draw(any_json)
    return wire
