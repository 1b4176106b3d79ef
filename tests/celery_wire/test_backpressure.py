"""Brokers and queues that take no messages for a while: no work is lost or done twice."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from brokers import PrivateBroker
from celery_wire.support import ALIVE, Pipe, received
from consumers import running
from proxy import Proxy
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.celery import CeleryTransport
from unstract_core import Consumer, Delivery, Settlement, TransportUnavailable, Verdict

pytestmark = pytest.mark.usefixtures("tidy")

Make: TypeAlias = Callable[..., CeleryTransport]

_LARGE = 8_000_000
BLOCKED = b"\x01\0\0\0\0\0\x08\0\x0a\0\x3c\x03low\xce"
UNBLOCKED = b"\x01\0\0\0\0\0\x04\0\x0a\0\x3d\xce"
"""The frames of connection.blocked and connection.unblocked."""
CONFIRMED = b"\0\x3c\0\x50"
"""The method basic.ack, by which the broker confirms a message."""
CONFIRM = 1.0
"""Seconds that a confirm is waited for here."""


def bounded(size: int) -> dict[str, Any]:
    """Return the arguments of a queue that refuses more than so many messages."""
    return {"x-max-length": size, "x-overflow": "reject-publish"}


def events(caplog: pytest.LogCaptureFixture, *names: str) -> list[tuple[str, str]]:
    """Return the level and the name of each of these events that was logged."""
    logged = [(record.levelname, vars(record).get("wire.event")) for record in caplog.records]
    return [(level, name) for level, name in logged if name in names and name is not None]


@pytest.fixture
def alarmed(private: PrivateBroker) -> Iterator[PrivateBroker]:
    """A RabbitMQ whose memory alarm a test may set; it is over afterwards."""
    private.hold(600)
    yield private
    private.alarm(on=False)
    private.hold()


def refusal(transport: CeleryTransport, queue: str) -> TransportUnavailable:
    """Return the error of a send that must fail."""
    with pytest.raises(TransportUnavailable) as caught:
        transport.send([message("t", queue)])
    return caught.value


def test_a_long_alarm_doubles_nothing(
    make_celery: Make, alarmed: PrivateBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """While the broker blocks publishers a worker keeps its connection and results, and settles each once later."""
    queue, calls, ran, begun = queue_name(), queue_name(), Counter[str](), []

    def task(name: str) -> str:
        ran[name] += 1
        begun.append(name)
        wait_until(lambda: len(begun) >= 4, timeout=ALIVE, what="four tasks to run at once")
        wait_until(lambda: caplog.messages.count("alarm is on") == 1, timeout=ALIVE, what="the alarm")
        return name

    worker = make_celery(alarmed.url, heartbeat=2, confirm_timeout=CONFIRM)
    sender, names = make_celery(alarmed.url, confirm_timeout=CONFIRM), {f"n{n}" for n in range(8)}
    pipe = Pipe(alarmed.url)
    pipe.declare(calls)
    consumer = Consumer(worker, {"t": task}, [queue], concurrency=4)
    with caplog.at_level(logging.INFO), running(consumer):
        sender.send([message("t", queue, name, task_id=name, on_success=then("done", calls)) for name in sorted(names)])
        wait_until(lambda: len(begun) >= 4, timeout=ALIVE, what="the tasks to begin")
        inside: Any = consumer._running
        link = inside._subscription._connection
        connection = link._live[0]
        alarmed.alarm()
        logging.getLogger("test").warning("alarm is on")
        wait_until(lambda: link.blocked, timeout=ALIVE, what="the broker to block the worker")
        taken = len(begun)
        first, second = refusal(sender, queue), refusal(sender, queue)
        time.sleep(2.5 * CONFIRM)
        assert link._live[0] is connection
        assert len(begun) <= max(taken, 4)
        alarmed.alarm(on=False)
        wait_until(lambda: consumer.counters["settled"] >= 8, timeout=ALIVE, what="all to be settled")
    assert "low on memory" in str(first)
    assert "low on memory" in str(second)
    assert "nothing was done" in str(second)
    assert not second.fate_unknown
    assert Counter({name: ran[name] for name in names}) == Counter(names)
    assert Counter(message.args[0] for message in pipe.left(calls)) == Counter(names)
    assert events(caplog, "broker_blocked", "broker_unblocked") == [
        ("WARNING", "broker_blocked"),
        ("INFO", "broker_unblocked"),
    ]
    assert events(caplog, "lease_lost") == []
    pipe._connection.release()


def test_a_large_result_waits_for_an_alarms_end(make_celery: Make, alarmed: PrivateBroker) -> None:
    """A result larger than every buffer keeps its connection while the broker blocks, and is sent once afterwards."""
    queue, calls, sent, ran, go = queue_name(), queue_name(), queue_name(), list[int](), threading.Event()

    def task() -> str:
        ran.append(1)
        go.wait(ALIVE)
        return "x" * _LARGE

    worker = make_celery(alarmed.url, heartbeat=2, confirm_timeout=CONFIRM)
    sender, pipe = make_celery(alarmed.url, confirm_timeout=CONFIRM), Pipe(alarmed.url)
    pipe.declare(calls)
    pipe.declare(sent)
    consumer = Consumer(worker, {"t": task}, [queue])
    with running(consumer):
        sender.send([message("t", queue, task_id="large", on_success=then("done", calls))])
        wait_until(lambda: ran, timeout=ALIVE, what="the task to begin")
        inside: Any = consumer._running
        link = inside._subscription._connection
        connection = link._live[0]
        alarmed.alarm()
        go.set()
        wait_until(lambda: link.blocked, timeout=ALIVE, what="the broker to block the worker")
        with pytest.raises(TransportUnavailable, match="low on memory") as caught:
            sender.send([message("t", sent, "y" * _LARGE)])
        time.sleep(1.5 * CONFIRM)
        assert link._live[0] is connection
        alarmed.alarm(on=False)
        wait_until(lambda: consumer.counters["settled"], timeout=ALIVE, what="the result to be settled")
        assert link._live[0] is connection
    assert caught.value.fate_unknown
    sender.send([message("t", sent, "small")])  # over the connection that has the rest of the large one
    assert [len(message.args[0]) for message in pipe.left(calls)] == [_LARGE]
    assert [len(message.args[0]) for message in pipe.take(sent, 2)] == [_LARGE, len("small")]
    assert ran == [1]
    pipe._connection.release()


def test_a_release_in_an_alarm_is_delivered_once(make_celery: Make, alarmed: PrivateBroker) -> None:
    """A message of a quorum queue that is released during an alarm is delivered once, as its first attempt."""
    queue, quorum, asked = queue_name(), {"x-queue-type": "quorum"}, 2
    transport = make_celery(alarmed.url, confirm_timeout=CONFIRM, queue_arguments=quorum)
    transport.send([message("t", queue, n) for n in range(asked)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        held: list[Delivery] = []
        while len(held) < asked:
            held += subscription.receive(limit=asked, wait=0.1)
        alarmed.alarm()
        for delivery in held:  # the first finds out that the broker blocks, the second knows it
            with pytest.raises(TransportUnavailable, match="low on memory"):
                subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)])
        alarmed.alarm(on=False)
        deliveries: list[Delivery] = []
        ends = time.monotonic() + 2
        while len(deliveries) < asked or time.monotonic() < ends:
            deliveries += subscription.receive(limit=5, wait=0.1)
    assert Counter(delivery.payload.args[0] for delivery in deliveries if delivery.payload) == Counter(range(asked))
    assert {delivery.attempt for delivery in deliveries} == {1}


def test_each_alarm_is_logged_after_a_break(
    through: Make, between: Proxy, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of an alarm is logged when another connection has published, and the next alarm is logged again."""
    transport = through()
    transport.send([message("t", queue)])
    with caplog.at_level(logging.INFO), contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        for _ in range(2):
            between.say(BLOCKED)
            while not subscription._connection.blocked:
                subscription.receive(limit=0, wait=0.1)
            between.cut()
            (delivery,) = received(subscription)
            assert subscription.settle([Settlement(delivery, Verdict.RETRY)]) == [True]
    assert events(caplog, "broker_blocked", "broker_unblocked") == 2 * [
        ("WARNING", "broker_blocked"),
        ("INFO", "broker_unblocked"),
    ]


def test_a_missing_confirm_after_an_alarm_reconnects(through: Make, between: Proxy, queue: str) -> None:
    """A settlement waits for `confirm_timeout` seconds after the alarm, and is then made over a new connection."""
    transport, errors = through(confirm_timeout=CONFIRM), list[str]()
    transport.send([message("t", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        (delivery,) = received(subscription)
        retry = Settlement(delivery, Verdict.RETRY)

        def settled() -> bool:
            try:
                return subscription.settle([retry]) == [True]
            except TransportUnavailable as exc:
                errors.append(str(exc))
                return False

        between.swallow(CONFIRMED)
        between.say(BLOCKED)
        assert not settled()
        between.say(UNBLOCKED)
        wait_until(settled, timeout=ALIVE, what="the settlement")
    assert "has not confirmed it yet" in errors[0]
    assert any("takes messages again and has not confirmed one within 1 s" in error for error in errors)


def test_a_sender_keeps_no_unconfirmed_tags(through: Make, between: Proxy, queue: str) -> None:
    """The pooled connection of a sender keeps no tags of confirms that are never asked for."""
    transport: Any = through(confirm_timeout=0.3)
    transport.send([message("t", queue)])
    between.swallow(CONFIRMED)
    between.say(BLOCKED)
    assert refusal(transport, queue).fate_unknown
    (connection,) = transport._publishers._idle
    assert connection.blocked
    assert connection._publisher._confirms._unconfirmed == {}


def test_a_worker_drains_the_queue_it_fills(
    make_celery: Make, pipe: Pipe, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks that a full queue refuses wait until the same worker has made room, and none is dead-lettered."""
    monkeypatch.setattr("unstract_core.worker.settler.PATIENCE", 0.0)
    full, run = pipe.declare(queue_name(), **bounded(1)), list[int]()
    transport = make_celery(queue_arguments={full: bounded(1)})
    transport.send([message("t", queue, n, on_success=then("done", full)) for n in range(20)])
    tasks = {"t": lambda n: n, "done": lambda n: run.append(n)}
    with running(Consumer(transport, tasks, [queue, full], prefetch=30)):
        wait_until(lambda: len(run) == 20, timeout=ALIVE, what="every callback to be run")
    assert sorted(run) == list(range(20))
    assert pipe.left(f"{queue}.dead") == []


def test_a_full_queue_blocks_no_other_queue(
    make_celery: Make, pipe: Pipe, make_queue: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Only the queue whose callbacks are refused is paused, with one WARNING for it and one INFO for the end."""
    full, first, other = pipe.declare(queue_name(), **bounded(1)), make_queue(), make_queue()
    pipe.put(full, b"in the way")
    transport, ran = make_celery(queue_arguments={full: bounded(1)}), Counter[str]()
    transport.send([message("t", first, "first", on_success=then("done", full)) for _ in range(6)])
    consumer = Consumer(transport, {"t": lambda n: ran.update([n])}, [first, other], prefetch=1)
    with caplog.at_level(logging.INFO), running(consumer):
        wait_until(lambda: ran["first"] > 3, timeout=ALIVE, what="more than three results to wait")
        transport.send([message("t", other, "other") for _ in range(20)])
        wait_until(lambda: ran["other"] == 20, timeout=ALIVE, what="the other queue's tasks to be run")
        assert ran["first"] == 4
        assert pipe.one(full).body == b"in the way"
        assert len(pipe.take(full, 6)) == 6
        wait_until(lambda: events(caplog, "queue_has_room"), timeout=ALIVE, what="the room to be logged")
    assert ran == {"first": 6, "other": 20}
    assert events(caplog, "queue_full", "queue_has_room") == [("WARNING", "queue_full"), ("INFO", "queue_has_room")]


def test_a_drain_ends_despite_a_full_queue(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A drain raises at its timeout and names the deliveries that it could not settle."""
    full = pipe.declare(queue_name(), **bounded(1))
    pipe.put(full, b"in the way")
    transport = make_celery(queue_arguments={full: bounded(1)})
    transport.send([message("t", queue, on_success=then("done", full))])
    with pytest.raises(TransportUnavailable, match="1 messages could not be settled"):
        Consumer(transport, {"t": lambda: None}, [queue]).drain(timeout=1)


def test_two_full_queues_make_progress(make_celery: Make) -> None:
    """With a worker for each, two full queues whose callbacks go to the other one make progress until all have run."""
    one, other = queue_name(), queue_name()
    options: dict[str, Any] = {"queue_arguments": {name: bounded(5) for name in (one, other)}, "confirm_timeout": 5.0}
    called: list[int] = []

    def task(number: int) -> int:
        time.sleep(0.02)
        return number

    tasks: dict[str, Callable[[int], object]] = {"t": task, "done": called.append}
    sender, sent = make_celery(**options), 0
    consumers = [Consumer(make_celery(**options), tasks, [name], concurrency=4) for name in (one, other)]
    with running(*consumers):
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            queue, next_queue = ((one, other), (other, one))[sent % 2]
            with contextlib.suppress(TransportUnavailable):
                sender.send([message("t", queue, sent, on_success=then("done", next_queue))])
                sent += 1
        wait_until(lambda: len(called) >= sent, timeout=60, what="all to be called back")
    assert sorted(called) == list(range(sent))
