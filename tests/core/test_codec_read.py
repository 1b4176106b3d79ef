"""The tolerant reader: ignored keys, defaults, and MalformedPayload as its only error."""

from __future__ import annotations

import copy
import json
import types
from typing import Any

import attrs
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
def test_reader_ignores_unknown_keys(written: TaskPayload, unknown: dict[str, Any]) -> None:
    """A newer release may add keys to the message, to fairness and to a continuation."""
    new = {f"x-{key}": value for key, value in unknown.items()}
    wire = {**new, **to_wire(written)}
    for key in ("fairness", "on_success", "on_error"):
        if wire.get(key) is not None:
            wire[key] = {**new, **wire[key]}
    assert from_wire(wire) == written
    assert from_wire(json.dumps(wire)) == written


@given(some.names, some.names)
def test_absent_members_get_defaults(task_name: str, queue: str) -> None:
    """Only task_name is required; null is the same as absent."""
    expected = TaskPayload(task_name=task_name, queue=queue)
    assert from_wire({"task_name": task_name, "queue": queue}) == expected
    assert (
        from_wire(wire_of(task_name=task_name, queue=queue, reply_key=None, on_success=None, on_error=None)) == expected
    )
    assert from_wire(wire_of(task_name=task_name, queue=queue, task_id=None, fairness={})).fairness == FairnessKey()


EMPTY: list[Any] = [None, False, 0, 0.0, "", [], {}]
AS_ABSENT = ["args", "kwargs", "reply_key", "on_success", "on_error", "task_id"]


@given(some.payloads(), st.data())
def test_reader_accepts_rows_that_the_product_runs(written: TaskPayload, data: st.DataObject) -> None:
    """A message is readable if any key except the task name is dropped, null or empty."""
    wire, expected = to_wire(written), written
    for key in data.draw(st.sets(st.sampled_from([*AS_ABSENT, "queue", "fairness", "headers"]))):
        empties: list[Any] = EMPTY if key in AS_ABSENT else [None]
        if data.draw(st.booleans()):
            wire.pop(key, None)
        else:
            wire[key] = data.draw(st.sampled_from(empties))
        absent: Any = {"args": [], "kwargs": {}, "queue": "the row's"}.get(key)
        expected = attrs.evolve(expected, **{key: absent})
    assert from_wire(wire, "the row's") == expected
    assert from_wire(json.dumps(wire), "the row's") == expected
    found = salvage({**wire, "task_name": None})
    assert (found.task_id, found.reply_key, found.on_error) == (expected.task_id, expected.reply_key, expected.on_error)


@given(some.names, some.names, any_json)
def test_message_without_queue_gets_that_of_its_row(task_name: str, queue: str, odd: Any) -> None:
    """A text under `queue` is the queue; any other value is replaced by the queue of the row."""
    wire = {"task_name": task_name, "queue": odd}
    named = odd if isinstance(odd, str) and odd else None
    assert from_wire(wire, queue) == TaskPayload(task_name=task_name, queue=named or queue)
    assert from_wire({"task_name": task_name}, queue).queue == queue
    with pytest.raises(PayloadError) as refused:
        to_wire(from_wire({"task_name": task_name}))
    assert refused.value.path == "$.queue"


@given(some.payloads(awaits="both", task_id=True), any_json)
def test_invalid_fairness_leaves_a_message_readable(written: TaskPayload, odd: Any) -> None:
    """An invalid `fairness` changes neither the task, its values nor its addresses."""
    whole = {"org_id": "o", "workload_type": "api", "pipeline_priority": 3}
    for fairness in (odd, *({**whole, key: odd} for key in whole)):
        read = from_wire({**to_wire(written), "fairness": fairness})
        assert attrs.evolve(read, fairness=written.fairness) == written
        assert read.fairness is None or 1 <= read.fairness.pipeline_priority <= 10
    assert from_wire(wire_of(fairness={**whole, "org_id": 42})).fairness == FairnessKey("42", "api", 3)
    assert from_wire(wire_of(fairness={**whole, "pipeline_priority": 7.0})).fairness == FairnessKey("o", "api", 7)


@pytest.mark.parametrize(
    ("odd", "text"), [(7, "7"), (1.5, "1.5"), (True, "true"), (["x", 1], '["x",1]'), ({"x": 1}, '{"x":1}')]
)
def test_numeric_address_is_read_as_its_text(odd: Any, text: str) -> None:
    """A number as a reply key, an id or a continuation's queue becomes its text, as in the product's database."""
    assert from_wire(wire_of(reply_key=odd)).reply_key == salvage(wire_of(reply_key=odd)).reply_key == text
    assert from_wire(wire_of(task_id=odd)).task_id == salvage(wire_of(task_id=odd)).task_id == text
    if type(odd) in (int, float):
        read = from_wire(wire_of(on_error={"task_name": "e", "queue": odd}))
        assert read.on_error == ContinuationSpec(task_name="e", queue=text)


def test_continuation_without_kwargs_has_empty_ones() -> None:
    """A continuation may omit kwargs."""
    read = from_wire(wire_of(on_error={"task_name": "e", "queue": "c"}))
    assert read.on_error == ContinuationSpec(task_name="e", kwargs={}, queue="c")


def test_reader_accepts_messages_of_the_product() -> None:
    """The rows that the product writes today are readable: without a reply, blocking, and with callbacks."""
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


NO_NAME: list[Any] = [None, 7, True, 1.5, [], {}, ""]
NO_QUEUE: list[Any] = [None, True, [], {}, ""]
NO_OBJECT_AT_ALL: list[Any] = ["{}", 1, True, ["x"]]
WRONG: dict[str, tuple[Any, list[Any]]] = {
    "$.task_name": (lambda bad: wire_of(task_name=bad), NO_NAME),
    "$.args": (lambda bad: wire_of(args=bad), [{"x": 1}, "[]", 1, True]),
    "$.kwargs": (lambda bad: wire_of(kwargs=bad), NO_OBJECT_AT_ALL),
    "$.on_success": (lambda bad: wire_of(on_success=bad), [7, "t", ["x"], True]),
    "$.on_success.task_name": (lambda bad: wire_of(on_success={"task_name": bad, "queue": "q"}), NO_NAME),
    "$.on_success.queue": (lambda bad: wire_of(on_success={"task_name": "t", "queue": bad}), NO_QUEUE),
    "$.on_success.kwargs": (
        lambda bad: wire_of(on_success={"task_name": "t", "queue": "q", "kwargs": bad}),
        NO_OBJECT_AT_ALL,
    ),
    "$.on_error": (lambda bad: wire_of(on_error=bad), [7, "t", ["x"], True]),
    "$.on_error.queue": (lambda bad: wire_of(on_error={"task_name": "t", "queue": bad}), NO_QUEUE),
    "$.on_error.kwargs": (
        lambda bad: wire_of(on_error={"task_name": "t", "queue": "q", "kwargs": bad}),
        NO_OBJECT_AT_ALL,
    ),
}


@pytest.mark.parametrize("path", WRONG)
def test_reader_rejects_an_invalid_task_by_path(path: str) -> None:
    """A string is not a list and `true` is not a name: each is rejected with its path, from a dict and from text."""
    make, offenders = WRONG[path]
    for offender in offenders:
        for raw in (make(offender), json.dumps(make(offender))):
            (problem,) = problems_of(raw)
            assert problem.endswith(f" @ {path}"), offender


@pytest.mark.parametrize("key", ["task_name", "queue"])
def test_reader_names_a_missing_member(key: str) -> None:
    """A required member that is absent is reported by its name."""
    if key == "task_name":
        assert problems_of({"queue": "q"}) == ("required field missing @ $.task_name",)
    wire = wire_of(on_error={"task_name": "t", "queue": "q"})
    del wire["on_error"][key]
    assert problems_of(wire) == (f"required field missing @ $.on_error.{key}",)


def test_reader_reports_every_problem_at_once() -> None:
    """A message with several faults lists each of them."""
    problems = problems_of({"task_name": 1, "args": "x", "kwargs": 7, "on_error": 5, "on_success": {"queue": "q"}})
    assert {problem.rpartition(" @ ")[2] for problem in problems} == {
        "$.task_name", "$.args", "$.kwargs", "$.on_error", "$.on_success.task_name",
    }  # fmt: skip


@given(some.payloads(awaits="both"), some.names)
def test_reply_key_with_continuations_is_malformed(written: TaskPayload, key: str) -> None:
    """The reader rejects a reply key beside a continuation, as the type does."""
    assert "reply_key" in problems_of({**to_wire(written), "reply_key": key})[0]


@given(any_json)
def test_any_json_is_read_or_malformed(value: Any) -> None:
    """No JSON value, as a Python value or as text, makes the reader raise any other error."""
    for raw in (value, json.dumps(value), json.dumps(value).encode()):
        _read_or_malformed(raw)
    if not isinstance(value, dict):
        problems_of(json.dumps(value))


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda data: b'{"task_name": "' + data + b'"}'))
def test_any_bytes_are_read_or_malformed(data: bytes) -> None:
    """No bytes make the reader raise any other error."""
    _read_or_malformed(data)
    _read_or_malformed(data.decode("latin-1"))


@given(some.payloads(), st.data())
def test_damaged_message_is_read_or_malformed(written: TaskPayload, data: st.DataObject) -> None:
    """A valid message with a replaced, removed or added part is read or malformed, and salvage never raises."""
    wire = _damaged(json.loads(json.dumps(to_wire(written))), data)
    for raw in (wire, json.dumps(wire)):
        _read_or_malformed(raw)
        _well_formed(salvage(raw))


NO_OBJECT: list[Any] = [
    "", " ", "nul", "{", '{"a": NaN}', '{"a": Infinity}', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff",
    b"\xef\xbb\xbf[]", "\ufeff{}", '"\\ud800"', "{'a': 1}", None, 7, [], bytearray(b"{}"), object(), (1, 2),
]  # fmt: skip


@pytest.mark.parametrize("raw", NO_OBJECT, ids=[f"{number}" for number in range(len(NO_OBJECT))])
def test_input_other_than_an_object_is_malformed(raw: Any) -> None:
    """Invalid, deep, long or foreign input is malformed at the root, and has no addresses to salvage."""
    assert problems_of(raw)[0].endswith("@ $")
    assert salvage(raw) == Salvage()


def test_reader_accepts_any_mapping() -> None:
    """A mapping need not be a dict."""
    assert from_wire(types.MappingProxyType(wire_of())) == TaskPayload(task_name="t", queue="q")


def test_failed_read_leaves_the_message_unchanged() -> None:
    """A malformed message is not modified, so that its dead letter shows the original."""
    wire = wire_of(on_error={"task_name": "", "kwargs": {"a": []}})
    before = copy.deepcopy(wire)
    problems_of(wire)
    salvage(wire)
    assert wire == before


BREAKS: dict[str, dict[str, Any]] = {
    "no task name": {"task_name": None},
    "kwargs a string": {"kwargs": "x"},
    "args an object": {"args": {"x": 1}},
    "args a number and no queue": {"args": 5, "queue": None},
    "an odd priority": {
        "args": 5,
        "fairness": {"org_id": "o", "workload_type": "api", "pipeline_priority": "7"},
    },
    "the other continuation broken": {"on_success": {"task_name": 5}},
    "two addresses": {"reply_key": "reply-1"},
}


@pytest.mark.parametrize("breakage", BREAKS)
@given(some.payloads(awaits="on_error", task_id=True))
def test_salvage_finds_id_and_callback(breakage: str, written: TaskPayload) -> None:
    """salvage finds task_id and on_error in a malformed message."""
    wire = {**to_wire(written), **BREAKS[breakage]}
    problems_of(wire)
    for raw in (wire, json.dumps(wire), json.dumps(wire).encode()):
        found = salvage(raw)
        assert found.task_id == written.task_id
        assert found.on_error == written.on_error
        assert found.reply_key == BREAKS[breakage].get("reply_key")
        odd = breakage == "an odd priority"
        assert found.fairness == (FairnessKey("o", "api") if odd else written.fairness)


@pytest.mark.parametrize("breakage", [name for name in BREAKS if name != "two addresses"])
@given(some.payloads(awaits="reply"))
def test_salvage_finds_the_reply_key(breakage: str, written: TaskPayload) -> None:
    """salvage finds the reply key of a blocked caller in a malformed message."""
    wire = {**to_wire(written), **BREAKS[breakage]}
    problems_of(wire)
    assert salvage(wire).reply_key == salvage(json.dumps(wire)).reply_key == written.reply_key


@given(some.payloads(awaits="on_error", task_id=True))
def test_salvage_reads_each_address_on_its_own(written: TaskPayload) -> None:
    """An invalid address does not prevent salvage from finding the others."""
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
    """Replace, remove or add a part at any depth."""
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
