"""The golden messages of Celery clients are read as when they were captured, and run."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import kombu
import pytest
import strategies as some
from celery_wire.letters import kit_over
from celery_wire.support import delete_queues
from kombu.serialization import dumps

from contract_tests.kit import wait_until
from tools.golden import CORPUS, QUEUE, Golden, add, corpus, read, reading, received
from transports.celery import CeleryTransport
from transports.celery.decode import read_message
from transports.celery.encode import Outgoing, task_message
from unstract_core import (
    Consumer,
    Message,
    Settlement,
    TaskPayload,
    TransportUnavailable,
    Verdict,
    current_delivery,
    from_wire,
    to_wire,
)
from unstract_core.codec import to_json

FILES = corpus()
VERSIONS = sorted({path.parent.name for path in FILES})
CAPTURED = [version for version in VERSIONS if version[0].isdigit()]
NEWEST = max(CAPTURED, key=lambda version: [int(part) for part in version.split(".")])
RELEASES = ["5.3", "5.4", "5.5", "5.6", "5.7"]
QUEUES = ("ide_callback", "counts", "alarms", "celery")
"""Where the callbacks of the golden messages go."""
ADDRESS = read(FILES[0]).properties["reply_to"]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def test_every_version_has_every_shape() -> None:
    """The corpus has the same messages from each version of Celery."""
    assert [version.rpartition(".")[0] for version in CAPTURED] == RELEASES
    shapes = {version: {path.stem for path in FILES if path.parent.name == version} for version in CAPTURED}
    assert shapes == dict.fromkeys(CAPTURED, shapes[NEWEST])
    assert len(shapes[NEWEST]) >= 46


@every_file
def test_a_captured_message_reads_the_same(path: Path) -> None:
    """Each captured message still gives the same payload or problem, and the same properties of the delivery."""
    golden = read(path)
    assert some.same(reading(golden), golden.expected)
    assert golden.text() == path.read_text(encoding="utf-8")


@every_file
def test_a_read_message_is_in_normal_form(path: Path) -> None:
    """A message that was read is written and read again as the same value, on both wires."""
    wire = read(path).expected.get("payload")
    if wire is None:
        return
    payload = from_wire(wire)
    assert some.same(to_wire(payload), wire)
    assert some.same(to_wire(from_wire(to_json(payload))), wire)
    again = read_message(_arrived(_written(payload)), QUEUE, default_queue="celery").payload
    assert again is not None
    assert some.same(to_wire(again), wire)


def _written(payload: TaskPayload) -> Outgoing:
    return task_message(Message(payload, payload.queue), reply_to=ADDRESS if payload.reply_key else "")


def _arrived(outgoing: Outgoing) -> kombu.Message:
    content_type, content_encoding, body = dumps(outgoing.body, serializer="json")
    properties = {**outgoing.properties, "content_type": content_type, "content_encoding": content_encoding}
    return received(outgoing.headers, properties, body.encode())


@attrs.frozen
class Seen:
    """The outcome of messages: the tasks that ran, by id, and the messages in each queue."""

    ran: dict[str, tuple[str, list[Any], dict[str, Any]]]
    came: dict[str, list[kombu.Message]]


def play(url: str, goldens: list[Golden], names: Mapping[str, str], *, fails: bool) -> Seen:
    """Publish messages as they are to the queue that stands for QUEUE, let a Consumer work on it, and look around.

    `names` says which queue stands for which; every one is emptied.
    """
    ran: dict[str, tuple[str, list[Any], dict[str, Any]]] = {}

    def work(name: str, *args: Any, **kwargs: Any) -> str:
        delivery = current_delivery()
        assert delivery is not None
        ran[delivery.id] = (name, list(args), kwargs)
        payload = delivery.payload
        if fails and payload is not None and (payload.on_success or payload.on_error or payload.reply_key):
            raise ValueError("bad")
        return "the result"

    tasks = {name: functools.partial(work, name) for name in ("execute_extraction", "step")}
    transport = CeleryTransport(url, default_queue=names["celery"])
    with contextlib.closing(transport), kombu.Connection(url) as connection, connection.channel() as channel:
        queues = {mine: kombu.Queue(name, kombu.Exchange(name), name)(channel) for mine, name in names.items()}
        for queue in queues.values():
            queue.declare()
        for golden in goldens:
            _publish(channel, golden, names)
        consumer = Consumer(transport, tasks, [names[QUEUE]])

        def ended() -> bool:
            consumer.drain(timeout=15)
            return consumer.counters["settled"] + consumer.counters["buried"] >= len(goldens)

        wait_until(ended, timeout=60, what="the end of every message")
        return Seen(
            ran, {mine: list(iter(functools.partial(queue.get, no_ack=True), None)) for mine, queue in queues.items()}
        )


def _publish(channel: Any, golden: Golden, names: Mapping[str, str]) -> None:
    body, properties = golden.body, dict(golden.properties)
    for mine, name in names.items():
        body = body.replace(f'"{mine}"'.encode(), f'"{name}"'.encode())
    if "reply_to" in properties:
        properties["reply_to"] = names[ADDRESS]
    known = {name: properties.pop(name, None) for name in ("content_type", "content_encoding", "priority")}
    message = channel.prepare_message(body, headers=golden.headers, properties=properties, **known)
    channel.basic_publish(message, exchange="", routing_key=names[QUEUE])


def check(goldens: list[Golden], seen: Seen, *, fails: bool) -> None:
    """Check that each good message ran with its arguments and sent its follow-ups, and the others are dead letters."""
    buried = [golden for golden in goldens if is_refused(golden)]
    ran = {golden.expected["delivery"]["id"]: golden.expected["payload"] for golden in goldens if golden not in buried}
    assert seen.ran.keys() == ran.keys()
    for id, one in ran.items():  # in any order, because a released message may have run last
        assert some.same(list(seen.ran[id]), [one["task_name"], one["args"], one["kwargs"]]), id
    sent = {mine: sorted(map(_outcome, messages)) for mine, messages in seen.came.items() if mine in QUEUES}
    expected: dict[str, list[str]] = {mine: [] for mine in QUEUES}
    for golden in goldens:
        for queue, *outcome in _follow_ups(golden, failed=fails or golden in buried):
            expected[queue].append(json.dumps(outcome, sort_keys=True))
    assert sent == {mine: sorted(outcome) for mine, outcome in expected.items()}
    letters = {message.properties["correlation_id"]: message for message in seen.came[f"{QUEUE}.dead"]}
    assert letters.keys() == {golden.properties["correlation_id"] for golden in buried}
    for golden in buried:
        letter = letters[golden.properties["correlation_id"]]
        assert golden.expected.get("problem", "expired") in letter.headers["x-dead-reason"]
    answered = {
        message.properties["correlation_id"]: json.loads(message.body)["status"] for message in seen.came[ADDRESS]
    }
    awaited = [golden for golden in goldens if golden.headers.get("ignore_result") is not True]
    for golden in awaited:
        status = answered.pop(golden.properties["correlation_id"])
        assert (status == "SUCCESS") == (golden not in buried and not fails)
    assert answered.keys() == {id for golden in buried for id in _later(golden)}


def is_refused(golden: Golden) -> bool:
    """Whether it is buried unrun: it cannot be read or honoured, or has expired."""
    expires = golden.expected["delivery"]["expires"]
    return "problem" in golden.expected or (expires is not None and expires < "2021")


def _outcome(message: kombu.Message) -> str:
    args, kwargs, _ = json.loads(message.body)
    if "callback_kwargs" in kwargs:
        kwargs["callback_kwargs"].pop("error", None)
    return json.dumps([message.headers["parent_id"], message.headers["task"], args, kwargs], sort_keys=True)


def _follow_ups(golden: Golden, *, failed: bool) -> Iterator[tuple[Any, ...]]:
    """Yield the queue, parent, task and arguments of each signature in a message."""
    id = golden.expected["delivery"]["id"]
    for link in _embed(golden).get("errbacks" if failed else "callbacks") or ():
        first = [] if link["immutable"] else [id if failed else "the result"]
        yield link["options"].get("queue", "celery"), id, link["task"], [*first, *link["args"]], link["kwargs"]


def _embed(golden: Golden) -> Any:
    """Return the part of a body that has links; of one that is not JSON, and hides none from us, none."""
    try:
        body = json.loads(golden.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else body[2]


def _later(golden: Golden) -> list[str]:
    """Return the later tasks of a refused chain, whose senders also get the failure."""
    return [link["options"]["task_id"] for link in _embed(golden).get("chain") or () if "task_id" in link["options"]]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("version", CAPTURED)
def test_a_consumer_runs_each_versions_messages(version: str, fails: bool) -> None:
    """Over kombu's broker in the process a consumer runs the captured messages unchanged."""
    goldens = [read(path) for path in FILES if path.parent.name == version]
    names = {name: name for name in (QUEUE, f"{QUEUE}.dead", ADDRESS, *QUEUES)}
    check(goldens, play("memory://golden", goldens, names, fails=fails), fails=fails)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_consumer_runs_newest_messages_over_rabbitmq(rabbitmq_url: str, fails: bool) -> None:
    """Over RabbitMQ a consumer runs the newest captured messages, with queues of the test for their outcomes."""
    goldens = [read(path) for path in FILES if path.parent.name == NEWEST]
    queue = f"golden-{uuid.uuid4()}"
    names = {name: f"{queue}-{name}" for name in (ADDRESS, *QUEUES)} | {QUEUE: queue, f"{QUEUE}.dead": f"{queue}.dead"}
    try:
        seen = play(rabbitmq_url, goldens, names, fails=fails)
    finally:
        delete_queues(rabbitmq_url, [name for name in names.values() if not name.endswith(".dead")])
    check(goldens, seen, fails=fails)


@pytest.mark.parametrize("shape", ["protocol-1", "plain"])
def test_any_message_survives_a_broken_connection(rabbitmq_url: str, shape: str) -> None:
    """A message of any shape is dead-lettered once after its connection broke, and not delivered again."""
    golden = read(CORPUS / NEWEST / f"{shape}.json")
    with kit_over(rabbitmq_url) as kit, kit.open() as transport, kombu.Connection(rabbitmq_url) as connection:
        queue, channel = kit.queue(), connection.default_channel
        with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
            _publish(channel, golden, {QUEUE: queue, ADDRESS: kit.queue()})
            delivery = kit.take_one(subscription)
            kit.expire(transport, queue)
            settlement, settled = Settlement(delivery, Verdict.BURY, reason="because"), list[bool]()
            while not settled:
                with contextlib.suppress(TransportUnavailable):
                    settled = list(subscription.settle([settlement]))
            assert settled == [True]
            assert subscription.receive(limit=1, wait=0.5) == []
        letters = kombu.Queue(f"{queue}.dead")(channel)
        assert letters.get(no_ack=True) is not None
        assert letters.get(no_ack=True) is None


def test_golden_messages_are_only_added(tmp_path: Path) -> None:
    """The same content again is no change, and other content is refused without touching the file."""
    golden, path = read(FILES[0]), tmp_path / "new" / "one.json"
    assert add(path, golden)
    before = path.read_bytes()
    assert add(path, golden)
    assert not add(path, attrs.evolve(golden, headers={**golden.headers, "lang": "odd"}))
    assert path.read_bytes() == before == FILES[0].read_bytes()
