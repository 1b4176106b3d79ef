"""Odd input: messages that run, properties that no client can read, and callbacks that cannot be sent."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import Any

import kombu
import pytest
from celery_wire.support import Bench
from hypothesis import example, given, settings
from hypothesis import strategies as st
from queues import queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, Tasks

TASK = {"task": "note", "id": "the-id"}

RUNS: dict[str, tuple[bytes | str, dict[str, Any], dict[str, Any]]] = {
    "embed is null": ("[[1], {}, null]", {}, {}),
    "embed is empty": ("[[1], {}, {}]", {}, {}),
    "embed knows more": ('[[1], {}, {"callbacks": [], "errbacks": null, "chain": [], "later": 1}]', {}, {}),
    "retries are a text": ("[[1], {}, {}]", {"retries": "many"}, {}),
    "retries are negative": ("[[1], {}, {}]", {"retries": -7}, {}),
    "time limits are null": ("[[1], {}, {}]", {"timelimit": None}, {}),
    "the lineage is odd": ("[[1], {}, {}]", {"root_id": 7, "parent_id": [], "group": {}, "group_index": "x"}, {}),
    "the owner is odd": ("[[1], {}, {}]", {"x-org-id": {"a": 1}}, {}),
    "the fairness is odd": ("[[1], {}, {}]", {"x-fairness-key": "acme"}, {}),
    "unknown headers": ("[[1], {}, {}]", {"lang": 7, "x-odd": [1, {"a": None}], "stamps": 1}, {}),
    "the priority is beyond all": ("[[1], {}, {}]", {}, {"priority": 255}),
    "the charset is unknown": ("[[1], {}, {}]", {}, {"content_encoding": "klingon"}),
    "the body is compressed": (zlib.compress(b"[[1], {}, {}]"), {"compression": "application/x-gzip"}, {}),
    "the time it expires is to come": ("[[1], {}, {}]", {"expires": "9999-01-01T00:00:00"}, {}),
    "the eta has no zone and is past": ("[[1], {}, {}]", {"eta": "2020-01-01T00:00:00"}, {}),
    "an envelope is known": (
        '[[{"__type__": "uuid", "__value__": {"hex": "00"}}], {}, {}]'.replace('"00"', f'"{"0" * 32}"'),
        {},
        {},
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_messages_that_celery_tolerates_run(bench: Bench, case: str) -> None:
    """Odd messages that Celery accepts are run and answered."""
    body, headers, properties = RUNS[case]
    before = len(bench.ran)
    bench.put(body, TASK | headers, correlation_id="the-id", reply_to=bench.outcome_queue, **properties)
    assert bench.pipe.one(bench.outcome_queue).json["status"] == "SUCCESS"
    assert len(bench.ran) == before + 1


def test_a_message_of_ten_megabytes_is_run(bench: Bench) -> None:
    """A message of ten megabytes and the next one are run."""
    text = "x" * 10_000_000
    bench.put(json.dumps([[text], {}, {}]), TASK, correlation_id="the-id", reply_to=bench.outcome_queue)
    assert bench.pipe.one(bench.outcome_queue).json["status"] == "SUCCESS"
    assert bench.ran.pop() == text
    bench.the_next_one_runs()


def test_a_large_bad_message_is_dead_lettered_whole(bench: Bench) -> None:
    """The dead letter of a bad message of ten megabytes has its whole body."""
    body = "x" * 10_000_000
    bench.put(body, TASK)
    bench.the_next_one_runs()
    assert bench.pipe.buried(bench.queue).body == body.encode()


@pytest.mark.parametrize("case", ["a queue of the broker's own", "a queue with other arguments"])
def test_an_unsendable_callback_fails_the_dispatch(bench: Bench, case: str) -> None:
    """Its errback gets the failure, the dead letter has the result, and other messages run meanwhile."""
    target = "amq.odd"
    if case == "a queue with other arguments":
        target = bench.pipe.declare(queue_name(), **{"x-max-priority": 3})
    errback = {"task": "failed", "kwargs": {"callback_kwargs": {}}, "options": {"queue": bench.outcome_queue}}
    embed = {"callbacks": [{"task": "t", "options": {"queue": target}}], "errbacks": [errback]}
    for _ in range(5):
        bench.put(json.dumps([[1], {}, embed]), TASK)
    bench.the_next_one_runs()
    for callback in bench.pipe.take(bench.outcome_queue, 5):
        assert callback.args == ["the-id"]
        assert callback.kwargs["callback_kwargs"]["error"].startswith(
            "result delivery failed: TransportRefused: settle"
        )
    assert all(message.embed["x-dead-result"] == "noted" for message in bench.pipe.take(f"{bench.queue}.dead", 5))


def text(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def long_text(value: bytes) -> bytes:
    return b"S" + struct.pack(">I", len(value)) + value


def frame(more: dict[bytes, bytes] | None = None, *, correlation_id: bytes = b"the-id") -> bytes:
    """Return the properties of a good message, with more headers, in the format of their frame."""
    headers = {b"task": long_text(b"note"), b"id": long_text(b"the-id"), **(more or {})}
    table = b"".join(text(name) + value for name, value in headers.items())
    flags = struct.pack(">H", 0x8000 | 0x4000 | 0x2000 | 0x0400)
    return (
        flags
        + text(b"application/json")
        + text(b"utf-8")
        + struct.pack(">I", len(table))
        + table
        + text(correlation_id)
    )


UNREADABLE = {
    "a text that is not UTF-8": frame(correlation_id=b"\xff\xfe"),
    "a moment in milliseconds": frame({b"sent": b"T" + struct.pack(">Q", 1_700_000_000_000)}),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("body", [b"[[1], {}, {}]", b""], ids=["with a body", "without"])
def test_unreadable_properties_are_dead_lettered(bench: Bench, case: str, body: bytes) -> None:
    """A message with properties that py-amqp cannot read is dead-lettered instead of breaking connections."""
    bench.pipe.put_frame(bench.queue, body, UNREADABLE[case])
    bench.the_next_one_runs()
    assert "the message's properties and headers cannot be read" in bench.reason()


READABLE = {
    "bytes": frame({b"odd": b"x" + struct.pack(">I", 3) + b"\xff\x00a"}),
    "a text that is not UTF-8": frame({b"odd": long_text(b"\xff")}),
    "a name that is not UTF-8": frame({b"\xff": long_text(b"odd")}),
    "a decimal": frame({b"odd": b"D\xff" + struct.pack(">i", -5)}),
    "a moment": frame({b"odd": b"T" + struct.pack(">Q", 1_700_000_000)}),
    "all that a frame can hold": frame({b"a": long_text(b"y" * 60_000), b"b": long_text(b"y" * 70_890)}),
}


@pytest.mark.parametrize("case", READABLE)
def test_unused_headers_of_any_kind_are_accepted(bench: Bench, case: str) -> None:
    """A good message runs and a bad one is dead-lettered, with any values in unused headers."""
    before = len(bench.ran)
    bench.pipe.put_frame(bench.queue, b"[[1], {}, {}]", READABLE[case])
    bench.pipe.put_frame(bench.queue, b"[[1], {}", READABLE[case])
    bench.the_next_one_runs()
    assert len(bench.ran) == before + 2
    assert "not JSON that can be read" in bench.reason()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["id", "task", "retries", "eta", "expires", "timelimit", "group", "root_id", "ignore_result", "compression"]
NAMES += ["x-fairness-key", "x-org-id", "x-delivery-count", "x-dead-id", "x-death", "stamps", "odd"]
headers = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, values)) | st.builds(
    lambda more: {**TASK, **more}, st.dictionaries(st.sampled_from(NAMES[2:]), values, max_size=3)
)
json_bodies = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["callbacks", "errbacks", "chain", "task", "options", "queue", "a"]), inner)
    ),
    max_leaves=12,
).map(json.dumps)
bodies = json_bodies | st.binary(max_size=30) | json_bodies.map(lambda text: f"[[], {{}}, {text}]")
properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": st.sampled_from(["application/json", "application/x-python-serialize", "x"]) | st.none(),
        "content_encoding": st.sampled_from(["utf-8", "binary", "klingon", ""]),
        "priority": st.integers(0, 255),
        "correlation_id": st.text(max_size=20),
    },
)


@settings(max_examples=100)
@given(batch=st.lists(st.tuples(bodies, headers, properties), min_size=1, max_size=5))
def test_no_message_stops_the_consumer(
    at_work: Bench, batch: list[tuple[bytes | str, dict[str, Any], dict[str, Any]]]
) -> None:
    """After any message the next one is run."""
    for body, headers, more in batch:
        at_work.put(body, headers, **more)
    at_work.the_next_one_runs()
    at_work.ran.clear()


@settings(max_examples=50)
@example(batch=[(b"", {"compression": [None]})])
@given(batch=st.lists(st.tuples(bodies, headers), min_size=1, max_size=5))
def test_no_message_stops_a_memory_consumer(batch: list[tuple[bytes | str, dict[str, Any]]]) -> None:
    """Over memory:// the good message behind bad ones is run, and the bad ones are dead-lettered."""
    queue, ran = queue_name(), list[Any]()
    tasks = Tasks()
    tasks.register("note")(lambda *args, **kwargs: ran.extend(args))
    transport = CeleryTransport("memory://odd-messages")
    with contextlib.closing(transport), kombu.Connection("memory://odd-messages") as connection:
        kombu.Queue(queue, kombu.Exchange(queue), queue).bind(connection.default_channel).declare()
        producer = kombu.Producer(connection.default_channel)
        for body, headers in batch:
            producer.publish(body, exchange="", routing_key=queue, headers=headers, content_type="application/json")
        producer.publish([["good"], {}, {}], exchange="", routing_key=queue, headers=TASK)
        Consumer(transport, tasks, [queue]).drain(timeout=5)
    assert "good" in ran
