"""Redis as a broker: delays, a silent server, unread answers, and the order of messages."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import brokers
import pytest
import redis
from brokers import PrivateRedis
from celery_wire.support import ALIVE
from consumers import running

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport
from transports.celery.broker_settings import BrokerSettings
from transports.celery.incoming import Incoming
from unstract_core import Consumer, Dispatcher, Message, Settlement, TaskPayload, Tasks, TransportUnavailable, Verdict

SILENCE = 1.0
"""Seconds after which a silent server is given up in these tests."""


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateRedis]:
    with brokers.private_redis() as server:
        yield server


@pytest.fixture
def client(server: PrivateRedis) -> Iterator[Any]:
    with contextlib.closing(redis.Redis(port=server.port)) as client:
        client.flushall()
        yield client


@pytest.fixture
def make(server: PrivateRedis) -> Iterator[Callable[..., CeleryTransport]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(CeleryTransport(server.url, **options)))


@pytest.mark.parametrize(("options", "longest"), [({}, 600), ({"visibility_timeout": 60}, 24)])
def test_a_delay_stays_below_half_the_visibility(
    make: Callable[..., CeleryTransport], options: dict[str, Any], longest: float
) -> None:
    """A consumer keeps a delayed message for ten minutes, or for less than half of a shorter `visibility_timeout`."""
    settings: BrokerSettings = make(transport_options=options)._settings
    assert settings.longest_local_delay == longest


SPELLINGS = ["redis://h", "REDIS://h", "rediss://h", "redis+socket:///r.sock", "sentinel://h", "redis://a;redis://b"]


@pytest.mark.parametrize("url", SPELLINGS)
def test_every_redis_scheme_has_redis_limits(url: str) -> None:
    """Delays and waits are limited for each scheme that kombu has for Redis."""
    options = {"visibility_timeout": 60}
    with contextlib.closing(CeleryTransport(url, confirm_timeout=7.0, transport_options=options)) as transport:
        assert transport._settings.longest_local_delay == 24
        assert transport._settings.kombu_options["socket_timeout"] == 7.0


def test_a_delay_beyond_the_visibility_timeout_runs_once(make: Callable[..., CeleryTransport], client: Any) -> None:
    """A message whose delay is longer than `visibility_timeout` is run once, at its time."""
    transport = make(transport_options={"visibility_timeout": 2, "unacked_restore_throttle": 1})
    ran: list[float] = []
    tasks = Tasks()
    tasks.register("t")(lambda: ran.append(time.time()))
    due = time.time() + 4.5
    Dispatcher(transport).send("t", queue="delayed", delay=4.5)
    consumer = Consumer(transport, tasks, ["delayed"])
    worker = threading.Thread(target=consumer.run)
    worker.start()
    wait_until(lambda: ran, timeout=ALIVE, what="the task to run")
    wait_until(lambda: not client.exists("delayed", "unacked"), timeout=ALIVE, what="nothing to be left")
    consumer.stop()
    worker.join()
    assert len(ran) == 1
    assert ran[0] >= due


def test_a_silent_redis_ends_every_wait(server: PrivateRedis, make: Callable[..., CeleryTransport]) -> None:
    """Sending, calling, subscribing and reading dead letters raise TransportUnavailable if Redis does not answer."""
    limits = {"confirm_timeout": SILENCE, "connect_timeout": SILENCE}
    used, fresh = make(**limits), make(**limits)
    Dispatcher(used).send("t", queue="silent")
    calls: dict[str, Callable[[], Any]] = {
        "send": lambda: Dispatcher(used).send("t", queue="silent"),
        "the first send": lambda: Dispatcher(fresh).send("t", queue="silent"),
        "call": lambda: Dispatcher(make(**limits)).call("t", queue="silent", timeout=3),
        "subscribe": lambda: make(**limits).subscribe(["silent"], lease=10),
        "list dead letters": lambda: make(**limits).dead.find(queue="silent"),
    }
    raised: dict[str, BaseException] = {}

    def run(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as exc:
            raised[name] = exc

    server.freeze()
    try:
        threads = [threading.Thread(target=run, args=item, daemon=True) for item in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ALIVE)
    finally:
        server.thaw()
    assert raised.keys() == calls.keys()
    for name, error in raised.items():
        assert isinstance(error, TransportUnavailable), name
        assert "did not answer" in str(error)
        assert error.fate_unknown is (name == "send")


def test_a_worker_goes_on_when_redis_answers_again(
    server: PrivateRedis, make: Callable[..., CeleryTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose acknowledgements failed receives messages again when Redis is back."""
    transport = make(confirm_timeout=SILENCE, connect_timeout=SILENCE)
    acknowledge = Incoming.ack
    asked: list[Incoming] = []

    def freeze(arrived: Incoming) -> None:
        if not asked:
            server.freeze()
        asked.append(arrived)
        acknowledge(arrived)

    monkeypatch.setattr(Incoming, "ack", freeze)
    tasks = Tasks()
    tasks.register("t")(lambda number: number)
    dispatcher = Dispatcher(transport)
    with running(Consumer(transport, tasks, ["recovers"], concurrency=1)):
        dispatcher.send("t", args=[1], queue="recovers")
        try:
            wait_until(lambda: len(asked) >= 3, timeout=ALIVE, what="the acknowledgement to fail, again and again")
        finally:
            server.thaw()
        assert dispatcher.call("t", args=[2], queue="recovers", timeout=ALIVE) == 2


def test_an_unread_answer_expires(make: Callable[..., CeleryTransport], client: Any) -> None:
    """The list of answers of a caller that has ended has a time to live."""
    caller, worker = make(), make()
    caller.send([Message(TaskPayload(task_name="t", queue="asked", reply_key="k"), "asked")])
    address = caller._reply_queue.address
    caller.close()
    tasks = Tasks()
    tasks.register("t")(lambda: 1)
    Consumer(worker, tasks, ["asked"]).drain(timeout=ALIVE)
    assert client.llen(address) == 1
    assert 3600 <= client.ttl(address) <= 86400


def drained(transport: CeleryTransport, queue: str, number: int) -> list[Any]:
    """Return the first arguments of so many messages, in the order in which they come."""
    values: list[Any] = []
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        while len(values) < number:
            for held in subscription.receive(limit=1, wait=ALIVE):
                assert held.payload is not None
                values.append(held.payload.args[0])
                subscription.settle([Settlement(held, Verdict.ACK)])
    return values


def test_redis_delivers_in_order_of_sending(make: Callable[..., CeleryTransport], client: Any) -> None:
    """Messages, callbacks and retries arrive in the order of sending, with any priority."""
    transport = make()
    ranks = [*range(1, 11)] * 2
    random.Random(7).shuffle(ranks)
    for number, rank in enumerate(ranks):
        transport.send([message("t", "ranked", number, priority=rank)])
    assert drained(transport, "ranked", len(ranks)) == list(range(len(ranks)))


@pytest.mark.parametrize("limit", [1, 3, 5])
@pytest.mark.parametrize("way", ["settled", "closed", "both"])
def test_released_messages_come_next(make: Callable[..., CeleryTransport], client: Any, way: str, limit: int) -> None:
    """Released messages keep their order and precede those that were sent later, with any priority."""
    transport = make()
    for number, rank in enumerate([9, 3, 10, 1, 7, 5]):
        transport.send([message("t", "released", number, priority=rank)])
    subscription = transport.subscribe(["released"], lease=60)
    held: list[Any] = []
    while len(held) < limit:
        held += subscription.receive(limit=limit - len(held), wait=ALIVE)
    for number in range(6, 9):
        transport.send([message("t", "released", number, priority=1)])
    released = {"settled": held, "closed": [], "both": held[1:]}[way]
    assert all(subscription.settle([Settlement(one, Verdict.RETRY, counted=False) for one in released]))
    subscription.close()
    assert drained(transport, "released", 9) == list(range(9))


def test_reads_keep_the_order_of_dead_letters(make: Callable[..., CeleryTransport], client: Any) -> None:
    """Reading dead letters leaves them in their order, with any priority."""
    transport = make()
    for number, rank in enumerate([9, 1, 5, 10]):
        transport.send([message("t", "looked.dead", number, priority=rank)])
    for _ in range(2):
        assert len(transport.dead.find(queue="looked")) == 4
    assert client.llen("looked.dead") == 4
    assert drained(transport, "looked.dead", 4) == list(range(4))
