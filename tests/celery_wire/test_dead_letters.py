"""Dead letters on a broker: their content, and operations on them that lose and double nothing."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import pickle
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import kombu
import pytest
from celery import Celery, signature
from celery_wire.letters import (
    JSON,
    Put,
    arguments,
    bury,
    bury_next,
    kit_over,
    letter_headers,
    letter_id,
    numbered,
    put_letters,
    standing,
    to_publish,
)
from celery_wire.support import ALIVE, Bench, Pipe
from consumers import running
from proxy import Proxy
from queues import queue_name

from contract_tests.checking import CheckedTransport
from contract_tests.kit import Kit, wait_until
from contract_tests.messages import message, then
from transports.celery import CeleryTransport
from transports.celery.broker import Broker
from unstract_core import Consumer, Tasks, TransportNotReady, TransportUnavailable

MakeCelery = Callable[..., CeleryTransport]
QUORUM_QUEUES = {"x-queue-type": "quorum"}


@attrs.frozen
class Over:
    """A broker, the way to its transports, and to what stands behind them."""

    url: str
    kit: Kit

    def standing(self, queue: str) -> list[Any]:
        return standing(self.url, queue)


@pytest.fixture(params=["rabbitmq", "quorum", "redis", "memory"])
def over(request: pytest.FixtureRequest) -> Iterator[Over]:
    """Each broker in turn; its queues are deleted afterwards."""
    url, ours = "memory://dead-letters", "celery+memory://dead-letters"
    if request.param != "memory":
        url = ours = request.getfixturevalue("redis_url" if request.param == "redis" else "rabbitmq_url")
    if request.param == "quorum":
        ours += "?x-queue-type=quorum"
    with kit_over(ours) as kit:
        yield Over(url, kit)


@pytest.fixture
def letters(over: Over) -> Iterator[CheckedTransport]:
    """A transport over that broker."""
    with over.kit.open() as transport:
        yield transport


@pytest.fixture
def dead(pipe: Pipe, queue: str) -> str:
    """The queue of the dead letters of `queue`, which is there."""
    return pipe.declare(f"{queue}.dead")


def test_a_dead_letter_has_the_message_and_reason(bench: Bench) -> None:
    """A dead letter has every header and property of its message, and its reason, attempts, queue, time and id."""
    task_id = str(uuid.uuid4())
    came = {"task": "nobody", "id": task_id, "lang": "py", "retries": 2, "argsrepr": "()", "x-org-id": "acme"}
    bench.put("[[], {}, {}]", came, correlation_id="the-key", priority=7)
    letter = bench.pipe.buried(bench.queue)
    burial = {name: letter.headers.pop(name) for name in list(letter.headers) if name.startswith("x-dead-")}
    assert letter.headers == came
    assert {"correlation_id": "the-key", "priority": 7, "delivery_mode": 2}.items() <= letter.properties.items()
    assert burial["x-dead-reason"].startswith("UnknownTask: no task 'nobody'")
    assert (burial["x-dead-attempts"], burial["x-dead-queue"]) == (3, bench.queue)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(burial["x-dead-at"])
    assert datetime.timedelta() <= age < datetime.timedelta(minutes=1)
    assert uuid.UUID(burial["x-dead-id"]).version == 4
    assert len(burial) == 5


BODIES: dict[str, tuple[bytes, str, str]] = {
    "a pickle": (pickle.dumps(([1], {}, {})), "application/x-python-serialize", "binary"),
    "not JSON": (b"[[], {}", "application/json", "utf-8"),
    "not UTF-8": (b'[["\xff"], {}, {}]', "application/json", "utf-8"),
    "nothing": (b"", "application/json", "utf-8"),
    "JSON, oddly spaced": (b'[ [1.50],\n{"a" : 1e2} , {} ]', "application/json", "utf-8"),
    "a megabyte": (json.dumps([["x" * 1_000_000], {}, {}]).encode(), "application/json", "utf-8"),
    "a megabyte of noise": (bytes(range(256)) * 4096, "application/octet-stream", "binary"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_dead_letter_keeps_the_body(over: Over, letters: CheckedTransport, case: str) -> None:
    """The body of a dead letter and of its replay equals the message's, with content type and encoding."""
    queue = over.kit.queue()
    body, content_type, encoding = BODIES[case]
    with to_publish(over.url) as connection:
        channel = connection.channel()
        letters.unchecked._settings.queue(queue).bind(channel).declare()
        producer = kombu.Producer(channel)
        for task_id in ("kept", "replayed"):
            producer.publish(
                body,
                exchange="",
                routing_key=queue,
                content_type=content_type,
                content_encoding=encoding,
                headers={"task": "t", "id": task_id},
            )
    bury_next(letters, queue, 2)
    _, replayed = letters.dead.find(queue=queue)[::-1]
    letters.dead.replay([replayed.id])
    for name, task_id in ((f"{queue}.dead", "kept"), (queue, "replayed")):
        (raw,) = over.standing(name)
        assert raw.headers["id"] == task_id
        assert (_as_bytes(raw), raw.content_type, raw.content_encoding) == (body, content_type, encoding)


def _as_bytes(raw: Any) -> bytes:
    return raw.body.encode() if isinstance(raw.body, str) else bytes(raw.body)


@pytest.mark.parametrize(
    ("body", "content_type", "shown"),
    [
        ("[[1], {}", "application/json", {"body": "[[1], {}"}),
        (b"\x80\xff", "application/x-python-serialize", {"body": "gP8="}),
        ('[[1], {"a": 2}, {"chain": [{}]}]', "application/json", {"args": [1], "kwargs": {"a": 2}}),
        ("[[NaN], {}, {}]", "application/json", {"args": [None], "kwargs": {}}),
    ],
    ids=["not JSON", "a pickle", "a chain", "a value outside the domain"],
)
def test_an_unreadable_dead_letter_is_shown(
    transport: CeleryTransport, queue: str, dead: str, pipe: Pipe, body: bytes | str, content_type: str, shown: Any
) -> None:
    """A dead letter shows its arguments if they are readable, else its body: text unchanged, other bytes in base64."""
    put_letters(pipe, queue, (body, letter_headers(), content_type))
    (letter,) = transport.dead.find(queue=queue)
    assert isinstance(letter.message, dict)
    assert letter.message == {"queue": queue, "task_id": "task-0", "task_name": "t", "fairness": None, **shown}


def test_a_dead_letter_keeps_the_result(letters: CheckedTransport, over: Over) -> None:
    """The result of a task that ran is in the body's third part, and `find` and `get` return it."""
    queue = over.kit.queue()
    letters.send([message("t", queue, 1, on_success=then("saved", "elsewhere"))])
    bury_next(letters, queue, 1, reason="result delivery failed", result={"paid": [5, None]})
    (letter,) = letters.dead.find(queue=queue)
    assert (letter.result, letter.reason) == ({"paid": [5, None]}, "result delivery failed")
    assert letters.dead.get([letter.id]) == [letter]
    (raw,) = over.standing(f"{queue}.dead")
    args, kwargs, embed = raw.decode()
    assert (args, kwargs, embed["x-dead-result"]) == ([1], {}, {"paid": [5, None]})
    assert embed["callbacks"][0]["task"] == "saved"


def test_a_replay_has_no_old_result(transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """A replay is the message as it was sent, so that its next dead letter has no earlier result."""
    transport.send([message("t", queue, 1)])
    before = pipe.one(queue)
    pipe.put(queue, before.body, before.headers)
    bury_next(transport, queue, 1, result="of the first time")
    assert len(transport.dead.replay(queue=queue)) == 1
    bury_next(transport, queue, 1)
    (letter,) = transport.dead.find(queue=queue)
    assert letter.result is None
    assert pipe.buried(queue).json == before.json


def test_dead_letters_of_one_task_have_own_ids(transport: CeleryTransport, queue: str) -> None:
    """Dead letters of messages with the same task id have different ids, also after a replay."""
    for n in range(2):
        transport.send([message("t", queue, n, task_id="the-same")])
        bury_next(transport, queue, 1)
    second, first = transport.dead.find(queue=queue)
    assert first.id != second.id
    assert transport.dead.replay([first.id]) == [first.id]
    assert arguments(transport, queue) == [1]
    bury_next(transport, queue, 1)
    assert arguments(transport, queue) == [1, 0]
    assert transport.dead.get([first.id]) == []


def test_foreign_messages_are_dead_letters(transport: CeleryTransport, queue: str, dead: str, pipe: Pipe) -> None:
    """Messages of other programs, without headers, doubled or malformed, are shown, replayed and purged one by one."""
    odd = {"x-dead-at": datetime.datetime(2026, 1, 2), "x-dead-reason": 7, "x-dead-attempts": "many"}
    put_letters(
        pipe,
        queue,
        ("[[1], {}, {}]", {"task": "t", "id": "tenant/7"}, JSON),
        ("[[2], {}, {}]", None, JSON),
        ("[[2], {}, {}]", None, JSON),
        ("[[3], {}, {}]", letter_headers(0, {"x-dead-id": "a/b", "x-dead-at": "2026-01-01T00:00:00"}), JSON),
        ("[[4], {}, {}]", letter_headers(0, {"x-dead-id": {}, "x-dead-at": "0001-01-01T00:00:00+14:00"}), JSON),
        ("[[5], {}, {}]", letter_headers(0, odd), JSON),
    )
    letters = transport.dead.find(queue=queue)
    assert len({letter.id for letter in letters}) == 6
    for letter in letters:
        (same,) = transport.dead.get([letter.id])
        assert (same.id, same.message) == (letter.id, letter.message)
    ids = {json.dumps(letter.message, sort_keys=True): letter.id for letter in letters}
    assert len(ids) == 5
    first, *rest = [letter.id for letter in letters]
    assert transport.dead.replay([first]) == [first]
    assert transport.dead.purge(ids=rest[:1]) == 1
    assert transport.dead.purge(queue=queue) == 4
    assert transport.dead.find(queue=queue) == []


def test_dead_letters_keep_any_header(transport: CeleryTransport, queue: str, dead: str, pipe: Pipe) -> None:
    """Bytes, nested tables, times and decimals in headers survive burial, listing and replay."""
    headers = {
        "task": "t",
        "id": "the-id",
        "bytes": b"\xff\x00",
        "nested": {"a": [1, {"b": None}, [True, 0.5]], "ä": {}},
        "moment": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "decimal": decimal.Decimal("-1.5"),
        "large": 2**62,
        "text": "ä\0\x1b",
    }
    pipe.put(queue, "[[1], {}", headers)
    bury_next(transport, queue, 1)
    (letter,) = transport.dead.find(queue=queue)
    assert transport.dead.get([letter.id]) == [letter]
    assert transport.dead.replay([letter.id]) == [letter.id]
    assert pipe.one(queue).headers == headers


def test_an_unknown_compression_is_kept(transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """A dead letter and its replay keep the compression of the message, even an unknown one."""
    pipe.put(queue, b"not for us", {"task": "t", "id": "the-id", "compression": "application/x-odd"})
    known = {"task": "t", "id": "readable", "compression": "application/x-gzip"}
    pipe.put(queue, zlib.compress(b"[[1], {}, {}]"), known)
    bury_next(transport, queue, 2)
    readable, unknown = transport.dead.find(queue=queue)
    assert [isinstance(letter.message, dict) and letter.message.get("body") for letter in (readable, unknown)] == [
        None,
        "not for us",
    ]
    assert len(transport.dead.replay(queue=queue)) == 2
    replayed, compressed = pipe.take(queue, 2)
    assert (replayed.body, replayed.headers["compression"]) == (b"not for us", "application/x-odd")
    assert (zlib.decompress(compressed.body), compressed.headers) == (b"[[1], {}, {}]", known)


def test_large_headers_leave_room_for_the_reason(transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """The largest header is left out, and the dead letter has its reason and can be shown and replayed."""
    headers = {"task": "t", "id": "the-id", "argsrepr": "x" * 60_000, "kwargsrepr": "ä" * 35_000}
    pipe.put(queue, "[[1], {}, {}]", headers)
    bury_next(transport, queue, 1, reason="ä" * 4000)
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.reason, letter.task_name) == ("ä" * 4000, "t")
    transport.dead.replay([letter.id])
    raw = pipe.one(queue)
    assert raw.args == [1]
    assert {"task": "t", "id": "the-id"}.items() <= raw.headers.items()


def test_reading_keeps_the_order_of_dead_letters(over: Over, letters: CheckedTransport) -> None:
    """After any number of reads all dead letters are in their queue, in the order of their burial."""
    queue = over.kit.queue()
    ids = bury(letters, queue, *range(5))
    for _ in range(3):
        assert [letter.id for letter in letters.dead.find(queue=queue)] == ids[::-1]
        assert [letter.id for letter in letters.dead.get([ids[3], ids[1]])] == [ids[1], ids[3]]
        assert letters.dead.replay(["nothing", f"{queue}/nothing"]) == []
        assert letters.dead.purge(queue=queue, older_than=3600) == 0
    assert [raw.decode()[0] for raw in over.standing(f"{queue}.dead")] == [[n] for n in range(5)]


def test_the_newest_dead_letters_come_first(letters: CheckedTransport, over: Over) -> None:
    """`find` returns up to `limit` dead letters of a named queue, and none for a missing queue."""
    queue, other = over.kit.queue(), over.kit.queue()
    ids = bury(letters, queue, *range(4))
    bury(letters, other, 9)
    assert [letter.id for letter in letters.dead.find(queue=queue, limit=3)] == ids[:0:-1]
    assert arguments(letters, other) == [9]
    assert letters.dead.find(queue="absent") == []


NOTHING = ["", "/", "x", "absent/x", "/x", "absent/", f"{'q' * 300}/x", "a\nb/x", "a\0b/x", "\udcff/x", "a/b/c", "//"]


def test_unknown_ids_change_nothing(transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """An unknown id raises no error, touches no dead letter, and creates no queue."""
    (id,) = bury(transport, queue, 1)
    nothing = [*NOTHING, f"{queue}/", f"{queue}/x", queue, f"{id}x"]
    assert transport.dead.get(nothing) == []
    assert transport.dead.replay(nothing) == []
    assert transport.dead.purge(ids=nothing) == 0
    for name in ("absent", "q" * 300, "a\nb", "a\0b", "\udcff", ""):
        assert transport.dead.find(queue=name) == []
        assert transport.dead.replay(queue=name) == []
    assert [letter.id for letter in transport.dead.find(queue=queue)] == [id]
    for name in ("absent.dead", "ab.dead", ".dead"):
        with pytest.raises(Exception, match="NOT_FOUND"):
            _fresh_channel(pipe).queue_declare(name, passive=True)


def _fresh_channel(pipe: Pipe) -> Any:
    return pipe._connection.channel()


def test_an_id_belongs_to_its_queue(letters: CheckedTransport, over: Over) -> None:
    """An id together with another queue's name matches no dead letter."""
    queue, other = over.kit.queue(), over.kit.queue()
    (id,) = bury(letters, queue, 1)
    bury(letters, other, 9)
    assert letters.dead.replay([id], queue=other) == []
    assert letters.dead.purge(ids=[id], queue=other) == 0
    assert letters.dead.get([id.replace(queue, other)]) == []
    assert (arguments(letters, queue), arguments(letters, other)) == ([1], [9])


def test_concurrent_reads_lose_nothing(over: Over, letters: CheckedTransport) -> None:
    """Each of two readers sees some dead letters, none of them twice, and afterwards all are in the queue."""
    queue = over.kit.queue()
    ids = bury(letters, queue, *range(20))
    seen: list[list[str]] = []

    def look(transport: CheckedTransport) -> None:
        for _ in range(4):
            seen.append([letter.id for letter in transport.dead.find(queue=queue)])
            seen.append([letter.id for letter in transport.dead.get(ids[::2])])

    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(over.kit.open()) for _ in range(2)]
        threads = [threading.Thread(target=look, args=(one,)) for one in (letters, *others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ALIVE)
    assert len(seen) == 24
    for some_ids in seen:
        assert set(some_ids) <= set(ids)
        assert len(set(some_ids)) == len(some_ids)
    assert sorted(letter.id for letter in letters.dead.find(queue=queue)) == sorted(ids)
    assert len(over.standing(f"{queue}.dead")) == 20


def test_concurrent_replays_replay_once(over: Over, letters: CheckedTransport) -> None:
    """Two replays at the same time replay each dead letter once."""
    queue = over.kit.queue()
    ids = bury(letters, queue, *range(20))
    replayed: list[str] = []
    with over.kit.open() as other:
        threads = [
            threading.Thread(target=lambda one=one: replayed.extend(one.dead.replay(queue=queue)))
            for one in (letters, other, letters, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ALIVE)
    replayed += letters.dead.replay(queue=queue)
    assert sorted(replayed) == sorted(ids)
    assert sorted(raw.decode()[0][0] for raw in over.standing(queue)) == list(range(20))
    assert over.standing(f"{queue}.dead") == []


def test_reads_keep_dead_letters_of_quorum_queues(make_celery: MakeCelery, pipe: Pipe) -> None:
    """Reads do not use up the requeues after which a quorum queue of RabbitMQ 4 drops a message."""
    queue = pipe.declare(queue_name())
    pipe.declare(f"{queue}.dead", **QUORUM_QUEUES, **{"x-delivery-limit": 2})
    strangers = letter_headers(2000, {"x-death": [{"count": 1, "reason": "rejected"}], "odd": b"\xff"})
    put_letters(pipe, queue, ("[[], {", strangers, JSON))
    transport = make_celery(declare=False)
    bury(transport, queue, *range(3))
    ids = [letter.id for letter in transport.dead.find(queue=queue)]
    for _ in range(6):
        assert [letter.id for letter in transport.dead.find(queue=queue)] == ids
    *ours, stranger = pipe.take(f"{queue}.dead", 4)
    assert [message.args for message in ours] == [[0], [1], [2]]
    del stranger.headers["x-delivery-count"]
    assert (stranger.body, stranger.headers) == (b"[[], {", strangers)
    assert pipe.left(f"{queue}.dead") == []


def test_a_quorum_queue_loses_no_removal(make_celery: MakeCelery, pipe: Pipe) -> None:
    """After reads, purges and replays of many dead letters of a quorum queue none is lost or doubled."""
    queue = pipe.declare(queue_name(), **QUORUM_QUEUES)
    dead = pipe.declare(f"{queue}.dead", **QUORUM_QUEUES)
    put_letters(pipe, queue, *numbered(*range(200)))
    transport = make_celery(declare=False)
    for _ in range(4):
        assert arguments(transport, queue) == list(range(200))
    wait_until(lambda: pipe.count(dead) == 200, what="the letters to be back")
    assert [message.args[0] for message in pipe.take(dead, 3)] == [0, 1, 2]
    assert transport.dead.purge(ids=[letter_id(queue, n) for n in range(3, 143)]) == 140
    assert arguments(transport, queue) == list(range(143, 200))
    assert len(transport.dead.replay(queue=queue)) == 57
    assert [message.args[0] for message in pipe.take(queue, 57)] == list(range(143, 200))
    assert (pipe.left(queue), pipe.left(dead)) == ([], [])


def test_an_interrupt_keeps_every_dead_letter(
    over: Over, letters: CheckedTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the dead letters are out returns them to their queue."""
    queue = over.kit.queue()
    ids = bury(letters, queue, *range(3))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for patched in ("transports.celery.dead_letters.replay_copy", "transports.celery.dead_letters._with_ids"):
        with monkeypatch.context() as patch:
            patch.setattr(patched, interrupted)
            with pytest.raises(KeyboardInterrupt):
                letters.dead.replay(queue=queue)
        assert [letter.id for letter in letters.dead.find(queue=queue)] == ids[::-1]
    assert [raw.decode()[0] for raw in over.standing(f"{queue}.dead")] == [[n] for n in range(3)]


def test_a_lost_connection_keeps_every_dead_letter(
    through: MakeCelery, between: Proxy, transport: CeleryTransport, queue: str
) -> None:
    """When the connection breaks while the dead letters are out, the broker has them again."""
    ids = bury(transport, queue, 1, 2)
    looking = through()
    assert len(looking.dead.find(queue=queue)) == 2
    between.lose_the_answer_to(f"{queue}.dead".encode())
    with pytest.raises(TransportUnavailable) as caught:
        looking.dead.find(queue=queue)
    assert not caught.value.fate_unknown
    wait_until(lambda: len(transport.dead.find(queue=queue)) == 2, what="the letters to be back")
    assert [letter.id for letter in looking.dead.find(queue=queue)] == ids[::-1]


def test_a_replay_equals_the_sent_message(product: Celery, transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """Body, headers, id, links, correlation_id and reply_to equal the first message's; attempts and times do not."""
    links = {"link": signature("saved", kwargs={"k": 1}, queue="a"), "link_error": signature("failed", queue="b")}
    sent = product.send_task(
        "t", args=[1], kwargs={"x": "ä"}, queue=queue, retries=3, headers={"x-fairness-key": {"org_id": "o"}}, **links
    )
    before = pipe.one(queue)
    properties = {name: before.properties[name] for name in ("correlation_id", "reply_to", "priority")}
    pipe.put(queue, before.body, before.headers, **properties)
    bury_next(transport, queue, 1)
    (letter,) = transport.dead.find(queue=queue)
    assert letter.attempts == 4
    assert transport.dead.replay([letter.id]) == [letter.id]
    after = pipe.one(queue)
    assert after.body == before.body
    assert after.headers == before.headers | {"retries": 0, "eta": None, "expires": None}
    assert after.headers["id"] == sent.id
    assert after.properties == before.properties


def test_a_replay_is_due_at_attempt_one(letters: CheckedTransport, over: Over) -> None:
    """A replay waits for no eta, has not expired, and begins with attempt 1."""
    queue = over.kit.queue()
    letters.send([message("t", queue, 1, task_id="the-id")])
    headers = {"retries": 4, "eta": "2020-01-01T00:00:00", "expires": "2020-01-01T00:00:00"}
    (raw,) = over.standing(queue)
    with to_publish(over.url) as connection:
        producer = kombu.Producer(connection.channel(), serializer="json")
        producer.publish(raw.decode(), exchange="", routing_key=queue, headers=raw.headers | headers)
    bury_next(letters, queue, 1)
    assert len(letters.dead.replay(queue=queue)) == 1
    with contextlib.closing(letters.subscribe([queue], lease=60)) as subscription:
        delivery = over.kit.take_one(subscription)
    assert (delivery.id, delivery.attempt, delivery.problem) == ("the-id", 1, None)


def test_a_replay_answers_a_waiting_client(
    product: Celery, transport: CeleryTransport, queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """The task of a replay runs, its callbacks are sent, and a waiting Celery client gets the result."""
    callback_queue = make_queue()
    asked = product.send_task("double", args=[21], queue=queue)
    product.send_task("double", args=[4], queue=queue, link=signature("saved", kwargs={"k": 1}, queue=callback_queue))
    product.send_task("fail", queue=queue, link_error=signature("failed", queue=callback_queue), task_id="failing")
    bury_next(transport, queue, 3)
    tasks = Tasks()
    tasks.register("double")(lambda n: 2 * n)
    tasks.register("fail")(lambda: 1 / 0)
    with running(Consumer(transport, tasks, [queue])):
        assert len(transport.dead.replay(queue=queue)) == 3
        assert asked.get(timeout=ALIVE) == 42
        saved, failed = sorted(pipe.take(callback_queue, 2), key=lambda one: str(one.headers["task"]), reverse=True)
    assert (saved.args, saved.kwargs, failed.args) == ([8], {"k": 1}, ["failing"])
    assert transport.dead.find(queue=queue) == []


def test_a_replay_answers_a_waiting_caller(transport: CeleryTransport, queue: str) -> None:
    """The reply of a replay arrives under the key of the first message."""
    transport.send([message("double", queue, 21, reply_key="the-key")])
    bury_next(transport, queue, 1)
    assert len(transport.dead.replay(queue=queue)) == 1
    Consumer(transport, {"double": lambda n: 2 * n}, [queue]).drain(timeout=ALIVE)
    reply = transport.reply("the-key", timeout=ALIVE)
    assert reply is not None
    assert reply.result == 42


def test_replays_keep_the_order_of_burial(letters: CheckedTransport, over: Over) -> None:
    """Dead letters are replayed once each, in the order of burial, behind the messages that wait."""
    queue = over.kit.queue()
    ids = bury(letters, queue, *range(6))
    letters.send([message("t", queue, "waiting")])
    chosen = [ids[4], ids[0], f"{queue}/nothing", ids[2], ids[0]]
    assert letters.dead.replay(chosen) == [ids[0], ids[2], ids[4]]
    assert letters.dead.replay(chosen) == []
    assert [raw.decode()[0][0] for raw in over.standing(queue)] == ["waiting", 0, 2, 4]
    assert arguments(letters, queue) == [1, 3, 5]


@pytest.mark.parametrize("why", ["is full", "was deleted", "is there with other arguments"])
def test_a_refused_replay_keeps_the_dead_letter(make_celery: MakeCelery, pipe: Pipe, why: str) -> None:
    """A replay that the broker refuses raises with the reason and the message, and the dead letter keeps its place."""
    queue = queue_name()
    dead = pipe.declare(f"{queue}.dead")
    if why == "is full":
        pipe.declare(queue, **{"x-max-length": 0, "x-overflow": "reject-publish"})
    elif why == "is there with other arguments":
        pipe.declare(queue, **{"x-max-priority": 3})
    put_letters(pipe, queue, *numbered(0, 1, 2))
    transport = make_celery(declare=why == "is there with other arguments")
    said = {"is full": "nacked", "was deleted": "no such queue exists", "is there with other arguments": "3"}[why]
    kind = TransportUnavailable if why == "is full" else TransportNotReady
    for _ in range(2):
        with pytest.raises(kind, match=f"replay dead letters: .*{queue}.*{said}"):
            transport.dead.replay(queue=queue)
        assert [letter.id for letter in transport.dead.find(queue=queue)] == [letter_id(queue, n) for n in (2, 1, 0)]
    assert [message.args for message in pipe.left(dead)] == [[0], [1], [2]]


def test_a_replay_declares_a_deleted_queue(transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """A transport that declares its queues declares a deleted one again, and every replay arrives."""
    bury(transport, queue, 1, 2)
    pipe._channel.queue_delete(queue)
    with pytest.raises(TransportNotReady, match="no such queue exists"):
        transport.dead.replay(queue=queue)
    assert len(transport.dead.replay(queue=queue)) == 2
    assert [message.args for message in pipe.take(queue, 2)] == [[1], [2]]


def test_a_crash_in_a_replay_loses_nothing(
    through: MakeCelery, between: Proxy, transport: CeleryTransport, queue: str, pipe: Pipe
) -> None:
    """After a crash between confirm and removal both messages exist, and a second replay has the same task id."""
    bury(transport, queue, "before", "the-marker", "after")
    replaying = through()
    replaying.dead.find(queue=queue)
    between.lose_the_answer_to(b'[["the-marker"]')
    with pytest.raises(TransportUnavailable) as caught:
        replaying.dead.replay(queue=queue)
    assert caught.value.fate_unknown
    wait_until(lambda: len(transport.dead.find(queue=queue)) == 2, what="the letters to be back")
    assert arguments(transport, queue) == ["the-marker", "after"]
    assert len(replaying.dead.replay(queue=queue)) == 2
    messages = pipe.take(queue, 4)
    assert [message.args for message in messages] == [["before"], ["the-marker"], ["the-marker"], ["after"]]
    assert messages[1].headers["id"] == messages[2].headers["id"]
    assert pipe.left(queue) == []


def test_purge_removes_exactly_the_filtered(transport: CeleryTransport, queue: str, dead: str, pipe: Pipe) -> None:
    """`purge` filters by id, by queue, by age, and by all of them together."""
    now = datetime.datetime.now(datetime.UTC)
    letters: list[Put] = [(json.dumps([["undated"], {}, {}]), None, JSON)]
    for n, age in enumerate((7200, 3600, 1800, 0, -60)):  # the last by a clock that is ahead
        buried_at = (now - datetime.timedelta(seconds=age)).isoformat()
        letters.append((json.dumps([[n], {}, {}]), letter_headers(n, {"x-dead-at": buried_at}), JSON))
    put_letters(pipe, queue, *letters)
    assert transport.dead.purge(ids=[]) == 0
    assert transport.dead.purge(queue="absent") == 0
    assert transport.dead.purge(ids=[letter_id(queue, 2)], older_than=3000) == 0
    assert transport.dead.purge(ids=[letter_id(queue, 2), letter_id(queue, 1)], older_than=3000) == 1
    assert transport.dead.purge(queue=queue, older_than=3000) == 1
    assert arguments(transport, queue) == [2, 3, "undated", 4]
    assert transport.dead.purge(ids=[letter_id(queue, 4)]) == 1
    assert transport.dead.purge(queue=queue) == 3
    assert transport.dead.find(queue=queue) == []
    assert pipe.left(dead) == []


UNFIT = {
    "is not there": "no such queue exists",
    "is full": "nacked",
    "has other arguments": "the queue exists with other arguments",
}


@pytest.mark.parametrize("why", UNFIT)
def test_a_failed_burial_is_retried_with_pauses(
    make_celery: MakeCelery, pipe: Pipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A message whose dead letter queue is missing or full is kept, logged once, and retried with pauses."""
    queue = pipe.declare(queue_name())
    if why == "is full":
        pipe.declare(f"{queue}.dead", **{"x-max-length": 0, "x-overflow": "reject-publish"})
    elif why == "has other arguments":
        pipe.declare(f"{queue}.dead", **{"x-max-priority": 3})
    tries: list[str] = []
    publish = Broker.publish

    def counted(self: Broker, doing: str, *args: Any, **options: Any) -> Any:
        tries.append(doing)
        return publish(self, doing, *args, **options)

    monkeypatch.setattr(Broker, "publish", counted)
    tasks = Tasks()
    tasks.register("t")(lambda: None)
    with running(Consumer(make_celery(declare=why == "has other arguments"), tasks, [queue])):
        pipe.put(queue, "[[], {}, {}]", {"task": "nobody", "id": "the-id"})
        wait_until(lambda: len(tries) >= 3, what="the burial to be tried again")
        threading.Event().wait(1)
        assert len(tries) <= 15
        (away,) = [record for record in caplog.records if "transport_away" in record.getMessage()]
        assert f"queue '{queue}.dead'" in away.getMessage()
        assert UNFIT[why] in away.getMessage()
        pipe._channel.queue_delete(f"{queue}.dead")
        pipe.declare(f"{queue}.dead")
        assert pipe.buried(queue).headers["id"] == "the-id"
    assert pipe.left(queue) == []


def test_dead_letters_use_the_same_queue_type(make_celery: MakeCelery, pipe: Pipe) -> None:
    """`<queue>.dead` is declared with the queue type of its queue, and with no other argument of it."""
    queue = queue_name()
    transport = make_celery(queue_arguments={**QUORUM_QUEUES, "x-max-length": 100})
    assert len(bury(transport, queue, 1)) == 1
    pipe.declare(f"{queue}.dead", **QUORUM_QUEUES)
    pipe.declare(queue, **QUORUM_QUEUES, **{"x-max-length": 100})
