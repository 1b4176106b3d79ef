"""A send is confirmed in time or raises, and the error says whether the message was sent."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest
from brokers import PrivateBroker
from celery_wire.support import ALIVE, AT_ONCE, Pipe
from consumers import running
from proxy import Proxy
from queues import queue_name

from contract_tests.kit import timed, wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport
from transports.celery.encode import task_message
from unstract_core import (
    Consumer,
    Dispatcher,
    TransportNotReady,
    TransportUnavailable,
)

pytestmark = pytest.mark.usefixtures("tidy")

Make: TypeAlias = Callable[..., CeleryTransport]

SLACK = 8.0
"""Seconds that may be lost on a busy machine."""
FULL = {"x-max-length": 0, "x-overflow": "reject-publish"}
"""The arguments of a queue that takes nothing."""


def used(make: Make, **options: Any) -> CeleryTransport:
    """Return a transport that has an open connection to publish on."""
    transport = make(**options)
    with transport._publishers.broker("test"):
        return transport


@contextlib.contextmanager
def frozen(broker: PrivateBroker) -> Iterator[None]:
    broker.freeze()
    try:
        yield
    finally:
        broker.thaw()


# Queues that are not there, or not as they should be.


def test_an_unroutable_message_is_not_ready(make_celery: Make, pipe: Pipe) -> None:
    """TransportNotReady names the message and the queue, and a send works when the queue exists."""
    transport, queue = make_celery(declare=False), queue_name()
    with timed() as elapsed, pytest.raises(TransportNotReady, match=f"message an-id to queue '{queue}'"):
        transport.send([message("t", queue, task_id="an-id")])
    assert elapsed() < AT_ONCE
    pipe.declare(queue)
    assert pipe.left(queue) == []
    transport.send([message("t", queue, task_id="an-id")])
    assert pipe.one(queue).headers["id"] == "an-id"


def test_a_deleted_queue_costs_one_message(transport: CeleryTransport, pipe: Pipe) -> None:
    """After a deleted queue one message is refused, and later ones arrive."""
    queue = queue_name()
    transport.send([message("t", queue)])
    pipe.delete(queue)
    with pytest.raises(TransportNotReady, match=f"message an-id to queue '{queue}'"):
        transport.send([message("t", queue, task_id="an-id")])
    transport.send([message("t", queue, "later")])
    assert pipe.one(queue).args == ["later"]
    assert pipe.left(queue) == []


INEQUIVALENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "classic": ({}, {"x-queue-type": "quorum"}, "x-queue-type is none there, and 'quorum' was asked for"),
    "quorum": ({"x-queue-type": "quorum"}, {}, "x-queue-type is 'quorum' there, and none was asked for"),
    "ranked": ({"x-max-priority": 10}, {}, "x-max-priority is '10' there, and none was asked for"),
    "unranked": ({}, {"x-max-priority": 10}, "x-max-priority is none there, and '10' was asked for"),
}


@pytest.mark.parametrize("theirs", INEQUIVALENT)
def test_a_queue_with_other_arguments_is_explained(make_celery: Make, pipe: Pipe, theirs: str) -> None:
    """Sending and subscribing raise TransportNotReady with the argument and both values, and other queues work."""
    there, asked, text = INEQUIVALENT[theirs]
    queue, other = pipe.declare(queue_name(), **there), pipe.declare(queue_name())
    transport = make_celery(queue_arguments={**asked, other: {}})
    for _ in range(2):
        with pytest.raises(TransportNotReady, match=text):
            transport.send([message("t", queue)])
    with pytest.raises(TransportNotReady, match=text):
        transport.subscribe([other, queue], lease=5)
    transport.send([message("t", other, "fine")])
    assert pipe.one(other).args == ["fine"]
    assert pipe.left(queue) == []


# Refusals of the broker.


def test_a_refused_message_was_not_sent(make_celery: Make, pipe: Pipe) -> None:
    """The error of a full queue names the message and the queue, and its fate is known."""
    queue = pipe.declare(queue_name(), **FULL)
    transport = make_celery(queue_arguments={queue: FULL})
    for _ in range(2):
        with pytest.raises(TransportUnavailable, match=f"an-id to queue '{queue}' was refused by the broker") as caught:
            transport.send([message("t", queue, task_id="an-id")])
        assert not caught.value.fate_unknown
    transport.send([message("t", pipe.declare(queue_name()))])


@pytest.mark.parametrize("refused", ["full", "absent"])
def test_a_partly_refused_batch_counts_sent_messages(make_celery: Make, pipe: Pipe, refused: str) -> None:
    """The error has the number of sent messages, and its fate is unknown, because a second send would double them."""
    good, bad = pipe.declare(queue_name()), queue_name()
    if refused == "full":
        pipe.declare(bad, **FULL)
    transport = make_celery(declare=False)
    with pytest.raises(TransportUnavailable, match=f"'{bad}'.*2 of the 3 messages were sent") as caught:
        transport.send([message("t", good, 1), message("t", bad, 2), message("t", good, 3)])
    assert caught.value.fate_unknown
    assert [message.args for message in pipe.take(good, 2)] == [[1], [3]]


def test_a_partly_refused_batch_reports_doubt(through: Make, between: Proxy, pipe: Pipe, queue: str) -> None:
    """A batch with refused messages and one lost confirm raises an error with an unknown fate."""
    transport = used(through, declare=False)
    between.lose_the_answer_to(b"in-doubt")
    with pytest.raises(TransportUnavailable, match="in-doubt to queue") as caught:
        transport.send([message("t", queue_name())] * 500 + [message("t", queue, task_id="in-doubt")])
    assert caught.value.fate_unknown
    assert pipe.one(queue).headers["id"] == "in-doubt"


def test_messages_of_one_task_id_are_independent(make_celery: Make, pipe: Pipe) -> None:
    """A missing queue for one of two messages with the same id does not affect the other."""
    good, absent = pipe.declare(queue_name()), queue_name()
    transport = make_celery(declare=False)
    with pytest.raises(TransportUnavailable, match="1 of the 2 messages were sent") as caught:
        transport.send([message("t", good, task_id="same"), message("t", absent, task_id="same")])
    assert caught.value.fate_unknown
    assert pipe.one(good).headers["id"] == "same"


def test_an_undeclarable_queue_stops_the_batch(make_celery: Make, pipe: Pipe) -> None:
    """If one queue cannot be declared no message of the batch is sent, and the fate is known."""
    good, other = pipe.declare(queue_name()), pipe.declare(queue_name(), **{"x-max-priority": 3})
    transport = make_celery()
    with pytest.raises(TransportNotReady, match=f"'{other}'"):
        transport.send([message("t", good), message("t", other), message("t", good)])
    transport.send([message("t", good, "later")])
    assert pipe.one(good).args == ["later"]
    assert pipe.left(good) == []


# Brokers that do not answer.


def test_a_frozen_broker_times_out(make_celery: Make, private: PrivateBroker) -> None:
    """A send raises TransportUnavailable within confirm_timeout, and the transport works again after the freeze."""
    transport, queue = used(make_celery, url=private.url, confirm_timeout=3), queue_name()
    transport.send([message("t", queue)])
    with frozen(private), timed() as elapsed:
        with pytest.raises(TransportUnavailable, match="unknown") as caught:
            transport.send([message("t", queue)])
        assert elapsed() < 3 + SLACK
    assert caught.value.fate_unknown
    transport.send([message("t", queue)])


def test_a_failure_stops_the_rest_of_a_batch(make_celery: Make, private: PrivateBroker) -> None:
    """The fate of the part that failed is unknown, and the fate of the later parts is known."""
    transport, queue = used(make_celery, url=private.url, confirm_timeout=3), queue_name()
    transport.send([message("t", queue)])
    batch = [task_message(message("t", queue)) for _ in range(1200)]
    with frozen(private), transport._publishers.broker("test") as broker:
        outcomes = broker.publish("test", batch)
    unknown = [isinstance(one, TransportUnavailable) and one.fate_unknown for one in outcomes]
    assert unknown == [True] * 500 + [False] * 700
    assert all(isinstance(one, TransportUnavailable) for one in outcomes)


def test_callers_of_one_connection_wait_bounded_time(make_celery: Make, private: PrivateBroker) -> None:
    """With a pool of one each caller waits no longer than for one confirm and one connect."""
    transport = used(make_celery, url=private.url, confirm_timeout=1.5, connect_timeout=1.5, pool_size=1)
    queue = queue_name()
    transport.send([message("t", queue)])

    def send(_: int) -> float:
        with timed() as elapsed, pytest.raises(TransportUnavailable):
            transport.send([message("t", queue)])
        return elapsed()

    with frozen(private), ThreadPoolExecutor(24) as pool:
        assert max(pool.map(send, range(24))) < 3.0 + SLACK
    transport.send([message("t", queue)])


def test_closing_with_a_frozen_broker_is_quick(make_celery: Make, private: PrivateBroker) -> None:
    """`close` waits a moment for the broker, and not for the whole confirm timeout."""
    transport = used(make_celery, url=private.url)
    subscription = transport.subscribe([queue_name()], lease=5)
    with frozen(private), timed() as elapsed:
        subscription.close()
        transport.close()
        assert elapsed() < 2.0 + SLACK


USES: dict[str, Callable[[CeleryTransport], object]] = {
    "send": lambda transport: transport.send([message("t", "q")]),
    "send for a reply": lambda transport: transport.send([message("t", "q", reply_key="k")]),
    "subscribe": lambda transport: transport.subscribe(["q"], lease=5),
}


@pytest.fixture
def dumb() -> Iterator[str]:
    """The URL of a server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"amqp://guest:guest@127.0.0.1:{listener.getsockname()[1]}//"


@pytest.mark.parametrize("use", USES)
def test_a_silent_server_times_out_at_connect(make_celery: Make, dumb: str, use: str) -> None:
    """A server that never answers raises TransportUnavailable within connect_timeout, and nothing was done."""
    transport = make_celery(dumb, connect_timeout=0.5)
    with timed() as elapsed, pytest.raises(TransportUnavailable, match="did not answer in time") as caught:
        USES[use](transport)
    assert elapsed() < AT_ONCE
    assert not caught.value.fate_unknown


@pytest.mark.parametrize("use", USES)
def test_a_refused_connection_raises_at_once(make_celery: Make, pauses: list[float], use: str) -> None:
    """TransportUnavailable is raised without a wait, and nothing was done."""
    transport = make_celery("amqp://guest:guest@127.0.0.1:1//")
    with timed() as elapsed, pytest.raises(TransportUnavailable, match="nothing was done") as caught:
        USES[use](transport)
    assert elapsed() < AT_ONCE
    assert not pauses
    assert not caught.value.fate_unknown


def test_one_of_several_urls_is_enough(make_celery: Make, pauses: list[float], rabbitmq_url: str, pipe: Pipe) -> None:
    """Each of several URLs is tried once, without a pause, until one answers."""
    queue = pipe.declare(queue_name())
    transport = make_celery(f"amqp://guest:guest@127.0.0.1:1//;amqp://127.0.0.1:2//;{rabbitmq_url}")
    with timed() as elapsed:
        transport.send([message("t", queue, "here")])
    assert elapsed() < AT_ONCE
    assert not pauses
    assert pipe.one(queue).args == ["here"]


STRANGERS = {"wrong password": "amqp://guest:s3cret@{}//", "no such vhost": "amqp://guest:guest@{}/nowhere"}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_denied_access_raises_without_the_password(
    make_celery: Make,
    private: PrivateBroker,
    pauses: list[float],
    stranger: str,
    use: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TransportNotReady names the settings to check, and no error, cause or log record has the password."""
    caplog.set_level(logging.DEBUG)
    transport = make_celery(STRANGERS[stranger].format(f"127.0.0.1:{private.port}"))
    with timed() as elapsed, pytest.raises(TransportNotReady, match="user, password, virtual host") as caught:
        USES[use](transport)
    assert elapsed() < AT_ONCE
    assert not pauses
    assert "s3cret" not in "".join(traceback.format_exception_only(caught.value))
    link: BaseException | None = caught.value
    while link is not None:
        assert "s3cret" not in repr(link)
        link = link.__cause__
    assert "s3cret" not in caplog.text


# Connections that break.


@pytest.mark.parametrize("arrives", [True, False])
def test_a_lost_confirm_has_an_unknown_fate(
    through: Make, between: Proxy, pipe: Pipe, queue: str, arrives: bool
) -> None:
    """A send whose confirm is lost is not repeated, and the next one works over a new connection."""
    transport = used(through)
    transport.send([message("t", queue, "before")])
    (between.lose_the_answer_to if arrives else between.lose)(b"in-doubt")
    with pytest.raises(TransportUnavailable, match=r"in-doubt to queue.*unknown") as caught:
        transport.send([message("t", queue, task_id="in-doubt")])
    assert between.has_lost
    assert caught.value.fate_unknown
    transport.send([message("t", queue, "after")])
    arrived = [message.args for message in pipe.take(queue, 3 if arrives else 2)]
    assert arrived == [["before"], *([[]] if arrives else []), ["after"]]


def test_an_interrupted_batch_has_an_unknown_fate(through: Make, between: Proxy, pipe: Pipe, queue: str) -> None:
    """A batch that is cut off has an unknown fate, with any number of earlier confirms."""
    transport = through()
    transport.send([message("t", queue)])
    between.lose(b"in-doubt")
    with pytest.raises(TransportUnavailable, match="unknown") as caught:
        transport.send([message("t", queue, task_id=f"{n}" if n < 400 else "in-doubt") for n in range(500)])
    assert caught.value.fate_unknown
    assert len(pipe.left(queue)) <= 401


def test_ended_idle_connections_are_replaced(through: Make, between: Proxy, pipe: Pipe, queue: str) -> None:
    """An idle connection that the broker has ended is detected before its use, and every message arrives once."""
    transport = through()
    for n in range(4):
        transport.send([message("t", queue, n)])
        between.cut()
        time.sleep(0.05)
    assert [message.args for message in pipe.take(queue, 4)] == [[0], [1], [2], [3]]
    assert between.connections == 4
    assert pipe.left(queue) == []


# Many threads, and processes.


def test_messages_of_many_threads_arrive_once(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """With more threads than connections each message arrives exactly once."""
    transport = make_celery(pool_size=3)

    def send(thread: int) -> None:
        for n in range(20):
            transport.send([message("t", queue, thread, n)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))
    counts = Counter(tuple(message.args) for message in pipe.take(queue, 160))
    assert counts == Counter((thread, n) for thread in range(8) for n in range(20))
    assert pipe.left(queue) == []
    assert len(transport._publishers._idle) <= 3


def in_child(function: Callable[[], object]) -> None:
    """Run a function in a forked child; fails with what it raised."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def main() -> None:
        try:
            function()
        except BaseException:
            theirs.send(traceback.format_exc())
        else:
            theirs.send("")

    child = context.Process(target=main)
    child.start()
    try:
        assert mine.poll(ALIVE), "the child did not answer"
        assert mine.recv() == ""
    finally:
        child.kill()
        child.join()


def test_a_forked_child_keeps_the_parents_connections(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A transport works in a forked child, which may close it, and goes on in the parent."""
    transport = make_celery()
    answering = make_celery()
    with running(Consumer(answering, {"echo": lambda value: value}, [queue])):

        def use(who: str) -> None:
            assert Dispatcher(transport).call("echo", args=[who], queue=queue, timeout=ALIVE) == who

        use("before")
        (before,) = transport._publishers._idle
        listening = transport._reply_queue._broker

        def child() -> None:
            use("child")
            transport.close()

        in_child(child)
        in_child(transport.close)
        use("after")
    assert transport._publishers._idle == [before]
    assert transport._reply_queue._broker is listening


# Answers.


def test_an_answer_during_an_outage_is_found(through: Make, between: Proxy, make_celery: Make, queue: str) -> None:
    """A blocked caller gets an answer that arrived during an outage when the connection is back."""
    caller = through()
    caller.send([message("t", queue, reply_key="k")])
    between.away = True
    between.cut()
    assert Consumer(make_celery(), {"t": lambda: "paid"}, [queue]).drain(timeout=ALIVE) == 1
    assert caller.reply("k") is None
    between.away = False
    answer = caller.reply("k", timeout=ALIVE)
    assert answer is not None
    assert answer.result == "paid"


def test_a_call_works_right_after_an_outage(through: Make, between: Proxy, make_celery: Make, queue: str) -> None:
    """A call after an outage connects at once, and ignores the earlier error of the listener."""
    caller = through()
    call = Dispatcher(caller).call
    with running(Consumer(make_celery(), {"t": lambda: "paid"}, [queue])):
        assert call("t", queue=queue, timeout=ALIVE) == "paid"
        between.away = True
        between.cut()
        wait_until(lambda: caller._reply_queue._problem, timeout=ALIVE, what="the listener to find out")
        with pytest.raises(TransportUnavailable, match="nothing was done"):
            call("t", queue=queue, timeout=ALIVE)
        between.away = False
        assert call("t", queue=queue, timeout=ALIVE) == "paid"
