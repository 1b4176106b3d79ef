"""The golden corpus: what was readable once is read to the same value for ever, and run."""

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
    """A message as text and as the bytes of that text."""
    return [golden.raw, golden.raw.encode()] if isinstance(golden.raw, str) else [golden.raw]


@pytest.mark.parametrize("golden", [one for one in READABLE if one.reads_as is not None], ids=lambda one: one.name)
def test_what_was_readable_is_read_and_written_again_to_the_same_value(golden: Readable) -> None:
    """As text and as bytes; and what is written then is read as the same task, and written to the same value."""
    for raw in forms(golden):
        payload = from_wire(raw)
        assert some.same(to_wire(payload), written(golden))
        assert some.same(to_wire(from_wire(to_json(payload))), written(golden))
        assert some.same([payload.args, payload.kwargs], [golden.args, golden.kwargs])


@pytest.mark.parametrize("golden", [one for one in READABLE if one.reads_as is None], ids=lambda one: one.name)
def test_what_is_read_and_cannot_be_written_again_is_refused_at_its_path(golden: Readable) -> None:
    """A value of a foreign writer that is outside the domain reaches its task as it is, and goes no further."""
    for raw in forms(golden):
        payload = from_wire(raw)
        with pytest.raises(PayloadError) as caught:
            to_wire(payload)
        assert caught.value.path == golden.refused_at
        assert golden.args is None or some.same(payload.args, golden.args)
        assert golden.kwargs is None or some.same(payload.kwargs, golden.kwargs)


@unreadable
def test_what_was_unreadable_names_the_same_paths_and_gives_the_same_addresses(golden: Unreadable) -> None:
    """Every problem at its path, and whatever can be found of its sender."""
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
    """Store a message between two others behind the transport's back, and run all three; return what the tasks got."""
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
def test_a_readable_message_is_run_with_what_it_holds(golden: Readable, kit: Kit, transport: CheckedTransport) -> None:
    """Stored as another writer left it: the task gets its args and kwargs, the callback follows, the neighbours run."""
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
def test_an_unreadable_message_is_buried_and_its_sender_told(
    golden: Unreadable, kit: Kit, transport: CheckedTransport
) -> None:
    """Each address that was found is told why; the neighbours run."""
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
def test_a_file_of_another_format_is_refused(fields: dict[str, Any]) -> None:
    """A key that is misspelt, or forgotten, is not passed over."""
    with pytest.raises((TypeError, KeyError)):
        golden_corpus.read("x", fields)


def test_only_an_unreadable_message_of_the_same_text_is_superseded() -> None:
    """What was readable once stays as it was; an unreadable message may be read better, and counts once."""
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


def test_every_kind_of_file_is_in_the_corpus() -> None:
    """What the tests above run over is not empty: each version of the wire, rows, and every way to be read or not."""
    assert {one.name.rpartition("/")[0] for one in MESSAGES} == {"rows", "wire/v1"}
    assert {one.reads_as is None for one in READABLE} == {True, False}
    assert {isinstance(one.raw, bytes) for one in UNREADABLE} == {True, False}


def test_json_values_are_equal_by_value_and_not_by_notation() -> None:
    """For whoever stores numbers in another notation than ours."""
    assert golden_corpus.equal({"a": [1.0, 1e16], "b": None}, {"b": None, "a": [1, 10**16]})
    for left, right in [(True, 1), (0, False), ([True], [1]), ({"a": 1}, {"a": 1, "b": 1}), ([1], [1, 1]), ("1", 1)]:
        assert not golden_corpus.equal(left, right)
