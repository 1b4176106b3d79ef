"""A consumer outlives brokers that stop, die and freeze, broken connections, and deleted queues."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest
from brokers import LONGEST_HELD, PrivateBroker
from celery_wire.support import ALIVE, AT_ONCE, Pipe, callbacks
from consumers import running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy import Proxy
from queues import queue_name

from contract_tests.kit import timed, wait_until
from contract_tests.messages import message, then
from transports.celery import CeleryTransport
from transports.celery.subscription import CelerySubscription
from unstract_core import (
    Consumer,
    Delivery,
    Dispatcher,
    Settlement,
    TransportUnavailable,
    Verdict,
)

pytestmark = pytest.mark.usefixtures("tidy")

Make: TypeAlias = Callable[..., CeleryTransport]

ACK = b"\x00\x3c\x00\x50"
"""The method basic.ack in AMQP's frames."""
ONE = {"x-max-length": 1, "x-overflow": "reject-publish"}
"""The arguments of a queue that takes one message and refuses the next."""
QUORUM = {"x-queue-type": "quorum"}


class Held:
    """A task that ends when `go` is set. `ran` has the arguments of its runs."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.go = threading.Event()

    def __call__(self, value: Any = None) -> Any:
        self.ran.append(value)
        assert self.go.wait(ALIVE)
        return value

    def wait_for(self, runs: int) -> None:
        wait_until(lambda: len(self.ran) >= runs, timeout=ALIVE, what=f"{runs} runs")


def sent(transport: CeleryTransport, queue: str, *ids: str) -> None:
    """Send a task under each id, with a callback in the queue of its own."""
    transport.send([message("t", queue, id, task_id=id, on_success=then("done", callbacks(queue))) for id in ids])


def arrived(pipe: Pipe, queue: str, number: int, meanwhile: Callable[[], None] = lambda: None) -> Counter[str]:
    """Wait until the callbacks of that many tasks are there; returns how many each task has, by its id."""
    ids_by_task: dict[str, set[str]] = {}
    count: Counter[str] = Counter()
    deadline = time.monotonic() + ALIVE
    while len(count) < number:
        assert time.monotonic() < deadline, f"only {sorted(count)} were called back"
        meanwhile()
        for one in pipe.left(callbacks(queue)):
            count[one.args[0]] += 1
            ids_by_task.setdefault(one.args[0], set()).add(one.headers["id"])
        time.sleep(0.02)
    assert all(len(ids) == 1 for ids in ids_by_task.values()), "the callbacks of one task have different ids"
    return count


@contextlib.contextmanager
def pipe_to(url: str) -> Iterator[Pipe]:
    pipe = Pipe(url)
    try:
        yield pipe
    finally:
        with contextlib.suppress(OSError):
            pipe._connection.release()


# Connections.


def test_busy_connections_outlive_their_heartbeats(through: Make, between: Proxy, queue: str) -> None:
    """Connections of busy and idle consumers and of a blocked caller live on, and the task runs once."""
    heartbeat, other, ran = 2.0, queue_name(), []

    def task(seconds: float) -> str:
        ran.append(seconds)
        time.sleep(seconds)
        return "paid"

    busy, idle, caller = (through(heartbeat=heartbeat) for _ in range(3))
    call = Dispatcher(caller).call
    with running(Consumer(busy, {"t": task}, [queue])), running(Consumer(idle, {"t": task}, [other])):
        assert call("t", args=[3 * heartbeat + 0.5], queue=queue, timeout=ALIVE) == "paid"
        assert call("t", args=[0], queue=other, timeout=ALIVE) == "paid"
        assert between.connections == 4  # the caller has one to send on and one to listen on
    assert ran == [3 * heartbeat + 0.5, 0]


@pytest.mark.parametrize("while_", ["idle", "settling"])
def test_a_silent_connection_is_replaced(
    through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str, while_: str
) -> None:
    """Missing heartbeats end a silent connection, also during a wait for a confirm."""

    def task(value: str) -> str:
        if while_ == "settling" and value == "second" and not silenced:
            silenced.append(value)
            between.fall_silent()
        return value

    silenced: list[str] = []
    consumer, sender = Consumer(through(heartbeat=1), {"t": task}, [queue]), make_celery()
    with running(consumer):
        sent(sender, queue, "first")
        wait_until(lambda: consumer.counters["settled"] == 1, timeout=ALIVE, what="the first to be settled")
        if while_ == "idle":
            between.fall_silent()
        with timed() as elapsed:
            sent(sender, queue, "second")
            assert set(arrived(pipe, queue, 2)) == {"first", "second"}
            assert elapsed() < 20  # and a confirm would be waited for for 30 seconds


def test_a_missing_confirm_times_out_despite_heartbeats(
    through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A settlement that a live broker does not confirm is made over another connection."""

    def task(value: str) -> str:
        if not ran:
            between.swallow(ACK)  # which is what a confirm is, the other way round
        ran.append(value)
        return value

    ran: list[str] = []
    with running(Consumer(through(heartbeat=2, confirm_timeout=1.5), {"t": task}, [queue])):
        sent(make_celery(), queue, "id")
        wait_until(lambda: between.connections == 2, timeout=20, what="another connection")
        sent(make_celery(), queue, "next")
        assert set(arrived(pipe, queue, 2)) == {"id", "next"}
    assert ran == ["id", "next"]
    assert "the broker did not answer in time" in caplog.text


def test_a_redelivered_running_task_runs_once(
    through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str
) -> None:
    """The outcome of a task whose connection broke is settled over the next connection, once."""
    task = Held()
    with running(Consumer(through(), {"t": task}, [queue], concurrency=2)):
        sent(make_celery(), queue, "first", "second")
        task.wait_for(2)
        between.cut()
        time.sleep(0.5)
        task.go.set()
        assert arrived(pipe, queue, 2) == {"first": 1, "second": 1}
    assert sorted(task.ran) == ["first", "second"]
    assert pipe.count(queue) == 0
    assert pipe.left(callbacks(queue)) == []


def test_a_late_redelivery_is_settled(through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A message whose settlement is in doubt and whose lease is lost is settled after its redelivery."""

    def task(value: str) -> str:
        if value == "id" and not ran:
            between.fall_silent()
        ran.append(value)
        return value

    ran: list[str] = []
    worker = through(heartbeat=1, confirm_timeout=1)
    consumer = Consumer(worker, {"t": task}, [queue], lease=0.6)
    with running(consumer):
        sent(make_celery(), queue, "id")
        wait_until(lambda: ran, timeout=ALIVE, what="the task to be run")
        assert set(arrived(pipe, queue, 1)) == {"id"}
        between.cut()  # only now does the broker see that the first connection is dead
        sent(make_celery(), queue, "next")
        assert "next" in arrived(pipe, queue, 1)
        inside: Any = consumer._running
        wait_until(lambda: not len(inside._in_flight), timeout=ALIVE, what="all to be settled")
        assert not inside._subscription._in_flight
    assert pipe.count(queue) == 0


def test_a_forgotten_delivery_gets_no_redelivery(
    through: Make, between: Proxy, transport: CeleryTransport, queue: str
) -> None:
    """The message of a delivery that was not renewed for a lease becomes a new delivery."""
    transport.send([message("t", queue, task_id="id")])
    with contextlib.closing(through(confirm_timeout=0.5).subscribe([queue], lease=0.2)) as subscription:
        (first,) = subscription.receive(limit=1, wait=ALIVE)
        time.sleep(1)
        between.cut()
        deadline, second = time.monotonic() + ALIVE, list[Delivery]()
        while not second and time.monotonic() < deadline:
            with contextlib.suppress(TransportUnavailable):
                second += subscription.receive(limit=1, wait=1)
        assert [delivery.payload for delivery in second] == [first.payload]
        assert second[0].id != first.id


@pytest.mark.parametrize("lost", ["callback", "confirm", "acknowledgement"])
def test_an_interrupted_settlement_loses_no_callback(
    through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str, lost: str
) -> None:
    """A cut before the send, the confirm or the acknowledgement may double a callback, always under one id."""

    def task(value: str) -> str:
        if value == "id" and not cut:
            cut.append(between.lose_the_answer_to if lost == "confirm" else between.lose)
            cut[0](ACK if lost == "acknowledgement" else b"done")
        return value

    cut: list[Callable[[bytes], None]] = []
    with running(Consumer(through(), {"t": task}, [queue])):
        sent(make_celery(), queue, "id")
        wait_until(lambda: cut and between.has_lost, timeout=ALIVE, what="the settlement to be cut short")
        sent(make_celery(), queue, "next")
        count = arrived(pipe, queue, 2)
    assert count["id"] in ((1,) if lost == "callback" else (1, 2))
    assert pipe.count(queue) == 0


WORKERS = st.sampled_from([0, 1])
ACTIONS = st.one_of(
    st.just(("send", 0)), st.just(("cut", 0)), st.tuples(st.sampled_from(["receive", "settle", "renew"]), WORKERS)
)


@given(actions=st.lists(ACTIONS, min_size=5, max_size=20))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cuts_lose_no_callback(
    through: Make, between: Proxy, transport: CeleryTransport, pipe: Pipe, actions: list[tuple[str, int]]
) -> None:
    """After sends, cuts and work of two workers in any order each message has its callback, under one id."""
    queue, ids = queue_name(), list[str]()
    workers = [Worker(through().subscribe([queue], lease=60), callbacks(queue)) for _ in range(2)]
    for action, worker in actions:
        match action:
            case "send":
                ids.append(f"id-{len(ids)}")
                sent(transport, queue, ids[-1])
            case "cut":
                between.cut()
            case _:
                getattr(workers[worker], action)()

    def work_on() -> None:
        for one in workers:
            one.receive()
            one.settle()

    assert set(arrived(pipe, queue, len(ids), work_on)) == set(ids)
    for one in workers:
        one.subscription.close()


class Worker:
    """A consumer by hand: what it holds, it tries to settle until that succeeds."""

    def __init__(self, subscription: CelerySubscription, queue: str) -> None:
        self.subscription = subscription
        self.held: list[Delivery] = []
        self._queue = queue

    def receive(self) -> None:
        with contextlib.suppress(TransportUnavailable):
            self.held += self.subscription.receive(limit=3, wait=0.05)

    def renew(self) -> None:
        self.subscription.renew(self.held)

    def settle(self) -> None:
        with contextlib.suppress(TransportUnavailable):
            self.subscription.settle([_followed_up(one, self._queue) for one in self.held])
            self.held.clear()


# The steps before the acknowledgement.


def test_a_callback_is_confirmed_before_the_acknowledgement(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A message whose callback is refused stays with its connection, and returns to its queue afterwards."""
    full = pipe.declare(callbacks(queue), **ONE)
    pipe.put(full, b"in the way")
    transport = make_celery(queue_arguments={full: ONE})
    sent(transport, queue, "id")
    subscription = transport.subscribe([queue], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=ALIVE)
    with pytest.raises(TransportUnavailable, match="was refused by the broker"):
        subscription.settle([_followed_up(delivery, full)])
    assert subscription.renew([delivery]) == [True]
    assert pipe.count(queue) == 0
    subscription.close()
    wait_until(lambda: pipe.count(queue) == 1, timeout=ALIVE, what="the message to be back")


def test_a_refused_callback_is_retried(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A refused callback is retried until there is room, without another run, while other messages run."""
    full = pipe.declare(callbacks(queue), **ONE)
    pipe.put(full, b"in the way")
    task = Held()
    task.go.set()
    transport = make_celery(queue_arguments={full: ONE})
    with running(Consumer(transport, {"t": task}, [queue])):
        sent(transport, queue, "id")
        task.wait_for(1)
        transport.send([message("t", queue, "other")])
        task.wait_for(2)
        assert pipe.one(full).body == b"in the way"
        assert arrived(pipe, queue, 1) == {"id": 1}
    assert task.ran == ["id", "other"]
    assert pipe.count(queue) == 0


@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
def test_settled_messages_survive_a_close(make_celery: Make, pipe: Pipe, arguments: dict[str, Any]) -> None:
    """Messages that were settled before a close are not redelivered."""
    queue, transport = pipe.declare(queue_name(), **arguments), make_celery(queue_arguments=arguments)
    transport.send([message("t", queue)] * 500)
    held: list[tuple[CelerySubscription, list[Delivery]]] = []
    for _ in range(10):
        held.append((transport.subscribe([queue], lease=60), []))
        subscription, deliveries = held[-1]
        while len(deliveries) < 50:
            deliveries += subscription.receive(limit=50 - len(deliveries), wait=ALIVE)

    def settle_and_close(subscription: CelerySubscription, deliveries: list[Delivery]) -> None:
        assert all(subscription.settle([Settlement(one, Verdict.ACK) for one in deliveries]))
        subscription.close()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(settle_and_close, *zip(*held, strict=True)))
    wait_until(lambda: not pipe.consumers(queue), timeout=ALIVE, what="the consumers to be gone")
    time.sleep(0.2)
    assert pipe.count(queue) == 0


# Queues that are deleted.


@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
def test_a_deleted_queue_is_declared_again(
    make_celery: Make, pipe: Pipe, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A WARNING is logged, running tasks are settled, and later messages are run."""
    queue, task = pipe.declare(queue_name(), **arguments), Held()
    transport = make_celery(queue_arguments={queue: arguments})
    with running(Consumer(transport, {"t": task}, [queue])):
        sent(transport, queue, "running")
        task.wait_for(1)
        pipe.delete(queue)
        logged = f"wire.queue_deleted queue={queue}"
        wait_until(lambda: logged in caplog.messages, timeout=ALIVE, what="the warning")
        task.go.set()
        assert arrived(pipe, queue, 1) == {"running": 1}
        wait_until(lambda: pipe.consumers(pipe.declare(queue, **arguments)), timeout=ALIVE, what="a consumer")
        sent(make_celery(queue_arguments={queue: arguments}), queue, "later")
        assert arrived(pipe, queue, 1) == {"later": 1}
    assert caplog.messages.count(logged) == 1


def test_a_deleted_undeclared_queue_is_found_again(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """With declare=False messages run when the queue exists again, and other queues go on meanwhile."""
    gone, task = pipe.declare(queue_name()), Held()
    task.go.set()
    transport = make_celery(declare=False)
    pipe.declare(callbacks(queue))
    pipe.declare(callbacks(gone))
    with running(Consumer(transport, {"t": task}, [queue, gone])):
        sent(transport, queue, "before")
        assert arrived(pipe, queue, 1) == {"before": 1}
        pipe.delete(gone)
        for n in range(3):
            sent(transport, queue, f"meanwhile-{n}")
            arrived(pipe, queue, 1)
            time.sleep(0.1)
        pipe.declare(gone)
        sent(transport, gone, "again")
        assert arrived(pipe, gone, 1) == {"again": 1}
    assert Counter(task.ran) == Counter(["before", "again", *(f"meanwhile-{n}" for n in range(3))])


# Brokers that go away.


def test_a_consumer_without_broker_does_not_start(make_celery: Make, pauses: list[float]) -> None:
    """A consumer raises TransportUnavailable at its start if the broker cannot be reached."""
    consumer = Consumer(make_celery("amqp://guest:guest@127.0.0.1:1//"), {"t": print}, ["q"])
    with timed() as elapsed, pytest.raises(TransportUnavailable, match="nothing was done"):
        consumer.run()
    assert elapsed() < AT_ONCE
    assert not pauses


def test_an_idle_consumer_stops_without_broker(through: Make, between: Proxy, pipe: Pipe, queue: str) -> None:
    """`run` returns if nothing is left to settle."""
    consumer = Consumer(through(), {"t": print}, [queue])
    with ThreadPoolExecutor() as pool:
        run = pool.submit(consumer.run)
        wait_until(lambda: pipe.consumers(queue), timeout=ALIVE, what="the consumer to be there")
        between.away = True
        between.cut()
        time.sleep(0.3)
        consumer.stop()
        run.result(timeout=ALIVE)


def test_a_stopped_consumer_settles_after_an_outage(
    through: Make, between: Proxy, make_celery: Make, pipe: Pipe, queue: str
) -> None:
    """`run` returns when the broker is back and the finished tasks are settled."""
    task = Held()
    consumer = Consumer(through(), {"t": task}, [queue])
    with ThreadPoolExecutor() as pool:
        run = pool.submit(consumer.run)
        sent(make_celery(), queue, "id")
        task.wait_for(1)
        between.away = True
        between.cut()
        consumer.stop()
        task.go.set()
        time.sleep(0.5)
        assert not run.done()
        between.away = False
        run.result(timeout=ALIVE)
    assert arrived(pipe, queue, 1) == {"id": 1}
    assert task.ran == ["id"]


def test_a_task_beyond_the_brokers_timeout_runs_once(make_celery: Make, private: PrivateBroker) -> None:
    """When RabbitMQ closes the channel of a long task, the task is not run twice, and later ones are run."""
    queue, task = queue_name(), Held()
    transport = make_celery(private.url)
    with running(Consumer(transport, {"t": task}, [queue], concurrency=2)), pipe_to(private.url) as pipe:
        sent(transport, queue, "long")
        task.wait_for(1)
        time.sleep(LONGEST_HELD + 1.5)
        sent(transport, queue, "later")
        task.wait_for(2)
        task.go.set()
        assert set(arrived(pipe, queue, 2)) == {"long", "later"}
    assert sorted(task.ran) == ["later", "long"]


def test_a_consumer_outlives_a_frozen_broker(make_celery: Make, private: PrivateBroker) -> None:
    """After a freeze longer than the heartbeats every running, waiting and finished task has its callback."""
    queue, task = queue_name(), Held()
    transport = make_celery(private.url, heartbeat=1.0, connect_timeout=1.0, confirm_timeout=1.0)
    sender = make_celery(private.url)
    with running(Consumer(transport, {"t": task}, [queue])), pipe_to(private.url) as pipe:
        sent(sender, queue, "running", "waiting")
        task.wait_for(1)
        private.freeze()
        time.sleep(0.5)
        task.go.set()
        time.sleep(2.5)
        private.thaw()
        sent(sender, queue, "later")
        assert set(arrived(pipe, queue, 3)) == {"running", "waiting", "later"}


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_all_connections_recover_after_a_restart(make_celery: Make, private: PrivateBroker, end: str) -> None:
    """After an orderly stop or a kill every callback arrives, and the caller gets its answer."""
    queue, answered = queue_name(), queue_name()
    transport, task = make_celery(private.url, connect_timeout=2.0), Held()
    consumer = Consumer(transport, {"t": task}, [queue, answered], concurrency=3)
    ids = [f"{queue}-{n}" for n in range(10)]
    with running(consumer), ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: Dispatcher(transport).call("t", args=["answer"], queue=answered, timeout=ALIVE))
        task.wait_for(1)
        sent(transport, queue, *ids)
        task.wait_for(3)
        getattr(private, end)()
        private.start()
        task.go.set()
        transport.send([message("t", queue, "later")])
        with pipe_to(private.url) as pipe:
            assert set(arrived(pipe, queue, 10)) == set(ids)
            assert answer.result(ALIVE) == "answer"
            wait_until(lambda: "later" in task.ran, timeout=ALIVE, what="what was sent afterwards")


def _followed_up(delivery: Delivery, queue: str) -> Settlement:
    """Return the settlement of a task that returned: its callback goes to a queue, with its id for the result."""
    follow_up = message("done", queue, delivery.id, task_id=f"{delivery.id}-cb")
    return Settlement(delivery, Verdict.ACK, follow_up=follow_up)
