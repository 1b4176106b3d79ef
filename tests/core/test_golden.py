"""The golden corpus: a message that was readable once stays readable, has the same values, and is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import strategies as some
from queues import receive_all

from contract_tests import golden_corpus
from contract_tests.checking import CheckedTransport
from contract_tests.golden_corpus import Readable, Unreadable, WireMessage
from contract_tests.kit import Kit
from contract_tests.messages import message, parsed
from transports.memory.harness import MemoryHarness
from unstract_core import Consumer, MalformedPayload, PayloadError, from_wire, to_wire
from unstract_core.codec import salvage, to_json
from unstract_core.continuation import with_error
from unstract_core.values import cut

MESSAGES = list(golden_corpus.wire_messages())
READABLE = [one for one in MESSAGES if isinstance(one, Readable)]
UNREADABLE = [one for one in MESSAGES if isinstance(one, Unreadable)]

readable = pytest.mark.parametrize("golden", READABLE, ids=lambda one: one.name)
unreadable = pytest.mark.parametrize("golden", UNREADABLE, ids=lambda one: one.name)


def written(golden: Readable) -> dict[str, Any]:
    assert golden.reads_as is not None
    return golden.reads_as


def forms(golden: Readable | Unreadable) -> list[str | bytes]:
    """Return a message as text and as bytes."""
    return [golden.raw, golden.raw.encode()] if isinstance(golden.raw, str) else [golden.raw]


@pytest.mark.parametrize("golden", [one for one in READABLE if one.reads_as is not None], ids=lambda one: one.name)
def test_readable_message_round_trips_to_the_same_value(golden: Readable) -> None:
    """A readable message, as text and as bytes, is written again with the same values."""
    for raw in forms(golden):
        payload = from_wire(raw)
        assert some.same(to_wire(payload), written(golden))
        assert some.same(to_wire(from_wire(to_json(payload))), written(golden))
        assert some.same([payload.args, payload.kwargs], [golden.args, golden.kwargs])


@pytest.mark.parametrize("golden", [one for one in READABLE if one.reads_as is None], ids=lambda one: one.name)
def test_unwritable_value_is_rejected_at_its_path(golden: Readable) -> None:
    """A foreign value outside the domain reaches its task, and is rejected when it is written."""
    for raw in forms(golden):
        payload = from_wire(raw)
        with pytest.raises(PayloadError) as caught:
            to_wire(payload)
        assert caught.value.path == golden.refused_at
        assert golden.args is None or some.same(payload.args, golden.args)
        assert golden.kwargs is None or some.same(payload.kwargs, golden.kwargs)


@unreadable
def test_unreadable_message_keeps_its_paths_and_addresses(golden: Unreadable) -> None:
    """Every problem has its path, and salvage finds the same addresses."""
    for raw in forms(golden):
        with pytest.raises(MalformedPayload) as caught:
            from_wire(raw)
        assert tuple(problem.rpartition(" @ ")[2] for problem in caught.value.problems) == golden.problems
        assert salvage(raw) == golden.salvage


@pytest.fixture
def kit() -> Kit:
    return Kit(MemoryHarness())


@pytest.fixture
def transport(kit: Kit) -> Iterator[CheckedTransport]:
    with kit.open() as transport:
        yield transport


def run(kit: Kit, transport: CheckedTransport, raw: str | bytes, queue: str) -> list[tuple[Any, ...]]:
    """Store a message between two others, run all three, and return the arguments that the tasks got."""
    ran: list[tuple[Any, ...]] = []

    def noting(name: str) -> Any:
        return lambda *args, **kwargs: ran.append((name, list(args), kwargs))

    names = {"neighbour"} | {from_wire(one.raw).task_name for one in READABLE}
    tasks = {name: noting(name) for name in names}
    transport.send([message("neighbour", queue, "before")])
    kit.inject(transport, queue, raw)  # type: ignore[arg-type]  # bytes, where a message is no text
    transport.send([message("neighbour", queue, "after")])
    Consumer(transport, tasks, [queue]).drain(timeout=10)
    assert transport.queues([queue])[0].ready == 0
    assert [args for name, args, _ in ran if name == "neighbour"] == [["before"], ["after"]]
    return [one for one in ran if one[0] != "neighbour"]


@readable
def test_readable_message_is_run_with_its_arguments(golden: Readable, kit: Kit, transport: CheckedTransport) -> None:
    """A message of another writer is run with its args and kwargs, and its callback and its neighbours are run."""
    queue = kit.queue()
    payload = from_wire(golden.raw)
    ((name, args, kwargs),) = run(kit, transport, golden.raw, queue)
    assert name == payload.task_name
    assert golden.args is None or some.same(args, golden.args)
    assert golden.kwargs is None or some.same(kwargs, golden.kwargs)
    assert transport.dead.find() == []
    if payload.reply_key is not None:
        assert kit.answered(transport, payload.reply_key).status == "completed"
    if payload.on_success is not None:
        (delivery,) = receive_all(transport, payload.on_success.queue)
        assert delivery.payload is not None
        assert (delivery.payload.task_name, delivery.payload.args) == (payload.on_success.task_name, [None])


@unreadable
def test_unreadable_message_becomes_a_dead_letter(golden: Unreadable, kit: Kit, transport: CheckedTransport) -> None:
    """Each address that salvage finds gets the error, and the neighbouring messages are run."""
    queue = kit.queue()
    assert run(kit, transport, golden.raw, queue) == []
    (letter,) = transport.dead.find()
    reason, found = letter.reason, golden.salvage
    assert reason.startswith("MalformedPayload: ")
    dispatch = cut(found.task_id or letter.id)
    key = found.reply_key or (dispatch if found.task_id or found.on_error else None)
    if key is not None:
        reply = kit.answered(transport, key)
        assert (reply.status, reply.error) == ("failed", reason)
    if found.on_error is not None:
        (delivery,) = receive_all(transport, found.on_error.queue)
        assert some.same(parsed(delivery.raw)["args"], [dispatch])
        assert some.same(parsed(delivery.raw)["kwargs"], with_error(found.on_error.kwargs, reason))
        assert delivery.payload is not None
        assert delivery.payload.task_name == found.on_error.task_name
        assert delivery.payload.fairness == found.fairness


SIMPLE = {"about": "x", "text": "{}"}


@pytest.mark.parametrize(
    "fields",
    [
        {**SIMPLE, "reads_as": {"args": [], "kwargs": {}}, "reads": 1},
        {**SIMPLE, "problems": []},
        {**SIMPLE, "problems": [], "salvage": {"task_id": None}},
        {"text": "{}", "refused_at": "$"},
    ],
    ids=["an unknown key", "no salvage", "half a salvage", "no sentence"],
)
def test_corpus_file_of_another_format_is_rejected(fields: dict[str, Any]) -> None:
    """A misspelt or missing key of a corpus file is an error."""
    with pytest.raises((TypeError, KeyError)):
        golden_corpus.read("x", fields)


def test_only_unreadable_messages_can_be_superseded() -> None:
    """A readable message keeps its meaning; an unreadable one may become readable, and is counted once."""
    salvage = {"task_id": None, "reply_key": None, "on_error": None, "fairness": None}
    unreadable = golden_corpus.read("old", {**SIMPLE, "problems": ["$.task_name"], "salvage": salvage})
    readable = golden_corpus.read("new", {**SIMPLE, "reads_as": {"args": [], "kwargs": {}}, "supersedes": "old"})
    assert golden_corpus.current({"old": unreadable, "new": readable}) == {"new": readable}
    others: list[dict[str, WireMessage]] = [
        {"new": readable},
        {"old": attrs.evolve(unreadable, raw="[]"), "new": readable},
        {"old": attrs.evolve(readable, supersedes=None), "new": readable},
        {"old": unreadable, "new": readable, "newer": readable},
    ]
    for found in others:
        with pytest.raises(ValueError, match="not an unreadable message with the same text"):
            golden_corpus.current(found)


def test_corpus_has_every_kind_of_file() -> None:
    """The corpus has each version of the wire, rows, and readable and unreadable messages."""
    assert {one.name.rpartition("/")[0] for one in MESSAGES} == {"rows", "wire/v1"}
    assert {one.reads_as is None for one in READABLE} == {True, False}
    assert {isinstance(one.raw, bytes) for one in UNREADABLE} == {True, False}


def test_json_values_are_equal_by_value() -> None:
    """Two notations of one number are equal."""
    assert golden_corpus.equal({"a": [1.0, 1e16], "b": None}, {"b": None, "a": [1, 10**16]})
    for left, right in [(True, 1), (0, False), ([True], [1]), ({"a": 1}, {"a": 1, "b": 1}), ([1], [1, 1]), ("1", 1)]:
        assert not golden_corpus.equal(left, right)
