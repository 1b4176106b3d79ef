"""Compressed messages: every compression of kombu is read, within the memory limit."""

from __future__ import annotations

import bz2
import json
import lzma
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from typing import Any

import kombu
import pytest
import strategies as some
from celery_wire.letters import bury_next
from celery_wire.support import ALIVE, Bench, Pipe, callbacks
from hypothesis import given
from hypothesis import strategies as st
from kombu import compression

from transports.celery import CeleryTransport
from transports.celery.compression import NotDecompressed, as_sent, readable_body
from unstract_core import Message, TaskPayload
from unstract_core.values.limits import MAX_SIZE

NAMES = sorted({*compression.encoders(), "gzip", "zlib", "bzip2", "bzip", "lzma", "xz"})
TWO_GIB = 2**31
CHILD = """
    import resource, sys
    from unstract_core import Consumer, Tasks
    from transports.celery import CeleryTransport

    url, queue = sys.argv[1:]
    tasks = Tasks()
    tasks.register("note")(lambda: None)
    transport = CeleryTransport(url)
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 400 * 2**20,) * 2)
    Consumer(transport, tasks, [queue], concurrency=1).drain(timeout=60)
    transport.close()
"""


def zlib_bomb(size: int) -> bytes:
    """Return a stream of zeros, made of one block again and again."""
    block = 2**24
    stream = zlib.compressobj(9)
    first, again = (stream.compress(bytes(block)) + stream.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (size // block - 1)


BOMBS: dict[str, Callable[[], bytes]] = {
    "application/x-gzip": lambda: zlib_bomb(TWO_GIB),
    "bzip2": lambda: bz2.compress(bytes(2**26)) * (TWO_GIB // 2**26),
    "xz": lambda: lzma.compress(bytes(2**26)) * (TWO_GIB // 2**26),
}


def compressed(body: bytes, name: Any) -> kombu.Message:
    """Return a message whose body stays as it is, as our channels hand it out."""
    message: kombu.Message = as_sent(kombu.Message)(body=body, headers={"compression": name})
    return message


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_message_runs(bench: Bench, name: str) -> None:
    """A message runs under each of kombu's names of its compression."""
    body, _ = compression.compress(json.dumps([[name], {}, {}]), name)
    bench.put(body, {"task": "note", "id": "the-id", "compression": name})
    bench.the_next_one_runs()
    assert name in bench.ran


def test_a_bomb_is_dead_lettered_in_bounded_memory(rabbitmq_url: str, pipe: Pipe, queue: str) -> None:
    """A body of 2 GiB is dead-lettered compressed, its sender is answered, and the next message runs."""
    bombs = {name: make() for name, make in BOMBS.items()}
    answer_queue = pipe.declare(callbacks(queue))
    for name, bomb in bombs.items():
        pipe.put(
            queue, bomb, {"task": "note", "id": name, "compression": name}, correlation_id=name, reply_to=answer_queue
        )
    pipe.put(queue, "[[], {}, {}]", {"task": "note", "id": "good"}, correlation_id="good", reply_to=answer_queue)
    child = [sys.executable, "-c", textwrap.dedent(CHILD), rabbitmq_url, queue]
    done = subprocess.run(child, capture_output=True, text=True, timeout=2 * ALIVE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {
        message.properties["correlation_id"]: message.json for message in pipe.take(answer_queue, len(bombs) + 1)
    }
    assert answers.pop("good")["status"] == "SUCCESS"
    for name, bomb in bombs.items():
        letter = pipe.buried(queue, name)
        assert letter.headers["compression"] == name
        assert letter.body == bomb
        assert f"the decompressed body is larger than {MAX_SIZE} bytes" in letter.headers["x-dead-reason"]
        assert "larger than" in answers[name]["result"]["exc_message"][0]


@given(st.binary(max_size=2000), st.sampled_from(NAMES), st.integers(0, 3), st.binary(max_size=4))
def test_a_body_reads_as_in_kombu(body: bytes, name: str, copies: int, behind: bytes) -> None:
    """Reading in pieces has the result of kombu's decoder, and fails where that fails."""
    stored = compression.compress(body, name)[0] * copies + behind
    for cut in (stored, stored[:-1]):
        try:
            expected: bytes | None = compression.decompress(cut, name)
        except Exception:
            expected = None
        try:
            decompressed: bytes | None = readable_body(compressed(cut, name))
        except NotDecompressed:
            decompressed = None
        assert decompressed == expected or (not cut and decompressed is None)


@pytest.mark.parametrize("name", NAMES)
def test_a_body_is_decompressed_up_to_the_limit(name: str) -> None:
    """A body of the largest size is read, and a body that is one byte larger is not."""
    with some.size_limit(3 * 2**20):
        stored, _ = compression.compress(bytes(3 * 2**20), name)
        assert readable_body(compressed(stored, name)) == bytes(3 * 2**20)
        stored, _ = compression.compress(bytes(3 * 2**20 + 1), name)
        with pytest.raises(NotDecompressed, match="larger than 3145728 bytes"):
            readable_body(compressed(stored, name))


@pytest.mark.parametrize("name", ["odd", [None], {"a": 1}, 7, "x" * 1000])
def test_an_unknown_compression_is_named(name: Any) -> None:
    """The error names the compression and the known ones."""
    with pytest.raises(NotDecompressed, match=r"not a known compression \(application/x-bz2, ") as caught:
        readable_body(compressed(b"", name))
    assert len(str(caught.value)) < 400


def test_too_many_streams_are_refused() -> None:
    """A body of very many empty streams is refused before it costs time."""
    with pytest.raises(NotDecompressed, match="more than 1000 streams"):
        readable_body(compressed(bz2.compress(b"") * 100_000, "bzip2"))


def test_an_oversized_answer_fails_its_call(transport: CeleryTransport, pipe: Pipe, queue: str) -> None:
    """A caller gets a failure for an answer beyond the limit, and a compressed answer like any other."""
    keys = ["bomb", "fine"]
    transport.send([Message(TaskPayload(task_name="t", queue=queue, reply_key=key), queue) for key in keys])
    bomb = bz2.compress(bytes(2 * MAX_SIZE))
    answer = zlib.compress(json.dumps({"status": "SUCCESS", "result": [1]}).encode())
    for sent, body, name in zip(pipe.take(queue, 2), (bomb, answer), ("bzip2", "gzip"), strict=True):
        to, key = sent.properties["reply_to"], sent.properties["correlation_id"]
        pipe.put(to, body, {"compression": name}, correlation_id=key)
    failed, fine = (transport.reply(key, timeout=ALIVE) for key in keys)
    assert failed is not None
    assert fine is not None
    assert (failed.status, fine.result) == ("failed", [1])
    assert failed.error.startswith("MalformedPayload: the answer cannot be read: the decompressed body is larger than")


@pytest.mark.parametrize("broker", ["rabbitmq", "redis", "memory"])
def test_a_returned_message_stays_compressed(broker: str, request: pytest.FixtureRequest, queue: str) -> None:
    """A message that is released, retried or dead-lettered with its result stays compressed."""
    url = "memory://" if broker == "memory" else request.getfixturevalue(f"{broker}_url")
    transport = CeleryTransport(url)
    body, kind = compression.compress(json.dumps([[7], {}, {}]), "bzip2")
    try:
        with kombu.Connection(url) as connection:
            connection.Producer().publish(
                body,
                routing_key=queue,
                content_type="application/json",
                content_encoding="utf-8",
                headers={"task": "t", "id": "the-id", "compression": kind},
                declare=[kombu.Queue(queue)] if broker != "rabbitmq" else [],
            )
        subscription = transport.subscribe([queue], lease=60)
        (held,) = subscription.receive(limit=1, wait=ALIVE)
        subscription.close()  # which returns it
        assert held.payload is not None
        (again,) = bury_next(transport, queue, 1, result={"paid": 1})
        assert again.payload == held.payload
        (letter,) = transport.dead.find(queue=queue)
        assert letter.result == {"paid": 1}
        transport.dead.replay([letter.id])
        with kombu.Connection(url) as connection:
            got = connection.channel().basic_get(queue, no_ack=True)
            headers = got.properties["application_headers"] if broker == "rabbitmq" else got.headers
            assert headers["compression"] == kind
            assert broker != "rabbitmq" or bz2.decompress(got.body) == body_of(7)
    finally:
        transport.close()


def body_of(argument: Any) -> bytes:
    return json.dumps([[argument], {}, {}]).encode()
