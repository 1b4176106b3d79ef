"""Wake-ups: debounced notifications arrive at once, and polling delivers everything without them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, application, in_background, named, on_one_server, transport_on
from psycopg import sql
from queues import bury

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from transports.postgres.notifier import Channels
from unstract_core import Consumer, Delivery, Dispatcher, RetryLater, Settlement, Subscription, Verdict

Make = Callable[..., PostgresTransport]


class Timer:
    """When each task ran; `wait` for the next one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._ran = threading.Semaphore(0)

    def __call__(self, *args: object) -> str:
        self.times.append(time.monotonic())
        self._ran.release()
        return "ran"

    def wait(self, timeout: float = 30.0) -> float:
        assert self._ran.acquire(timeout=timeout), f"no task ran within {timeout} s"
        return self.times[-1]


def settle_down() -> None:
    """Give a consumer that has just started or settled time to reach its wait."""
    time.sleep(0.1)


def test_dispatch_reaches_idle_worker_at_once(make_postgres: Make, queue: str) -> None:
    """With polling too slow to deliver, each of several dispatches runs at once."""
    producer, transport, timer = make_postgres(), make_postgres(poll_interval=LONG_POLL), Timer()
    with running(Consumer(transport, {"t": timer}, [queue])):
        delays = []
        for _ in range(5):
            settle_down()
            sent = time.monotonic()
            producer.send([message("t", queue)])
            delays.append(timer.wait() - sent)
    assert max(delays) < AT_ONCE


def test_bulk_dispatch_wakes_each_queues_worker(make_postgres: Make, queue: str) -> None:
    """One send for several queues notifies a worker of each."""
    producer, transport = make_postgres(), make_postgres(poll_interval=LONG_POLL)
    timers, names = [Timer(), Timer()], [queue, queue + "-2"]
    consumers = [Consumer(transport, {"t": timer}, [name]) for timer, name in zip(timers, names, strict=True)]
    with running(*consumers):
        settle_down()
        sent = time.monotonic()
        producer.send([message("t", name) for name in names])
        assert max(timer.wait() for timer in timers) - sent < AT_ONCE


def test_follow_up_reaches_idle_worker_at_once(make_postgres: Make, queue: str) -> None:
    """The callback runs at once after its task, in another worker that only listens."""
    producer, executor, callback = (make_postgres(poll_interval=LONG_POLL) for _ in range(3))
    task, done = Timer(), Timer()
    with (
        running(Consumer(executor, {"t": task}, [queue])),
        running(Consumer(callback, {"done": done}, [queue + "-cb"])),
    ):
        settle_down()
        sent = time.monotonic()
        producer.send([message("t", queue, on_success=then("done", queue + "-cb"))])
        assert done.wait() - sent < AT_ONCE


def test_immediate_retry_reaches_idle_worker_at_once(make_postgres: Make, queue: str) -> None:
    """A message that is made ready again notifies workers as a new one does."""
    transport = make_postgres(poll_interval=LONG_POLL)
    transport.send([message("t", queue)])
    giver, taker = transport.subscribe([queue], lease=60), transport.subscribe([queue], lease=60)
    (delivery,) = giver.receive(limit=1, wait=0)
    came: list[float] = []

    def take() -> None:
        assert [delivery.attempt for delivery in taker.receive(limit=1, wait=10)] == [2]
        came.append(time.monotonic())

    with in_background(take):
        settle_down()
        given = time.monotonic()
        assert giver.settle([Settlement(delivery, Verdict.RETRY)]) == [True]
    assert came[0] - given < AT_ONCE
    giver.close()
    taker.close()


def test_retry_without_delay_runs_at_once(make_postgres: Make, queue: str) -> None:
    """RetryLater(delay=0) costs no poll interval."""
    transport, timer = make_postgres(poll_interval=LONG_POLL), Timer()

    def task() -> None:
        timer()
        if len(timer.times) == 1:
            raise RetryLater(delay=0)

    with running(Consumer(transport, {"t": task}, [queue])):
        transport.send([message("t", queue)])
        timer.wait()
        timer.wait()
    assert timer.times[1] - timer.times[0] < AT_ONCE


@on_one_server
def test_delayed_retry_runs_on_time(make_postgres: Make, queue: str) -> None:
    """An idle worker knows when its next delayed message is due, and does not wait for a poll."""
    transport, timer = make_postgres(poll_interval=LONG_POLL), Timer()

    def task() -> None:
        timer()
        if len(timer.times) == 1:
            raise RetryLater(delay=0.5)

    with running(Consumer(transport, {"t": task}, [queue])):
        transport.send([message("t", queue)])
        timer.wait()
        timer.wait()
    assert 0.5 <= timer.times[1] - timer.times[0] < 0.5 + AT_ONCE


def test_reply_reaches_its_caller_at_once(make_postgres: Make, queue: str) -> None:
    """A blocking call returns at once, without polling."""
    caller, transport = make_postgres(poll_interval=LONG_POLL), make_postgres(poll_interval=LONG_POLL)
    with running(Consumer(transport, {"t": lambda: "answer"}, [queue])):
        settle_down()
        for _ in range(3):
            sent = time.monotonic()
            assert Dispatcher(caller).call("t", queue=queue, timeout=10) == "answer"
            assert time.monotonic() - sent < AT_ONCE
            settle_down()


def test_replay_reaches_idle_worker_at_once(make_postgres: Make, queue: str) -> None:
    """A replay notifies workers as a dispatch does."""
    transport, timer = make_postgres(poll_interval=LONG_POLL), Timer()
    transport.send([message("t", queue)])
    bury(transport, queue)
    with running(Consumer(transport, {"t": timer}, [queue])):
        settle_down()
        (letter,) = transport.dead.find(queue=queue)
        replayed = time.monotonic()
        transport.dead.replay([letter.id])
        assert timer.wait() - replayed < AT_ONCE


@on_one_server
@pytest.mark.parametrize("listen", [True, False])
def test_polling_delivers_within_its_interval(make_postgres: Make, tables: Tables, queue: str, listen: bool) -> None:
    """Messages without a notification are found by polling, at the configured interval."""
    transport, timer, delays = make_postgres(listen=listen, poll_interval=0.4), Timer(), []
    with running(Consumer(transport, {"t": timer}, [queue])):
        for _ in range(5):
            settle_down()
            stored = time.monotonic()
            tables.inject(queue, '{"task_name": "t", "queue": "q"}')
            delays.append(timer.wait() - stored)
    assert min(delays) < 0.4 + 0.3
    assert max(delays) < 0.4 + AT_ONCE


def test_everything_works_by_polling(make_postgres: Make, queue: str) -> None:
    """With `listen=False`, polling finds the dispatch, its follow-up and the reply."""
    transport = make_postgres(listen=False, poll_interval=0.3)
    with running(Consumer(transport, {"t": lambda: "answer"}, [queue])):
        sent = time.monotonic()
        assert Dispatcher(transport).call("t", queue=queue, timeout=10) == "answer"
        assert time.monotonic() - sent < 2 * 0.3 + AT_ONCE


@pytest.fixture(scope="module")
def statements() -> dict[bool, list[str]]:
    """The server's log of a subscription and a waiting caller, with `listen` True and False."""
    logged: dict[bool, list[str]] = {}
    with servers.private_server(options="-c log_statement=all -c log_line_prefix='%a '") as server:
        for listen in (True, False):
            name = application()
            with transport_on(named(server.url, name), "unstract", listen=listen, poll_interval=0.1) as transport:
                transport.migrate()
                subscription = transport.subscribe(["q"], lease=60)
                for _ in range(8):
                    subscription.receive(limit=1, wait=0)
                subscription.receive(limit=1, wait=0.2)
                transport.reply("nobody", timeout=0.2)
                subscription.close()
            logged[listen] = [line for line in server.log().splitlines() if line.startswith(name)]
    return logged


def test_no_connection_listens_with_listen_false(statements: dict[bool, list[str]]) -> None:
    """`listen=False` runs no LISTEN for a subscription or a waiting caller; otherwise each runs one."""
    assert [sum("LISTEN " in line for line in statements[listen]) for listen in (True, False)] == [2, 0]


def test_no_statement_is_prepared_with_listen_false(statements: dict[bool, list[str]]) -> None:
    """`listen=False` runs every statement unnamed, as PgBouncer in transaction mode needs it."""
    prepared = {
        listen: {match[1] for line in statements[listen] if (match := re.search(r"execute (\S+): ", line))}
        for listen in (True, False)
    }
    assert prepared[False] == {"<unnamed>"}
    assert prepared[True] > {"<unnamed>"}


@on_one_server
def test_default_poll_interval_is_one_second(make_postgres: Make, queue: str) -> None:
    """Without listening, a message is found by the default poll interval."""
    transport = make_postgres(listen=False)
    subscription = transport.subscribe([queue], lease=60)
    came: list[float] = []

    def take() -> None:
        assert len(subscription.receive(limit=1, wait=LONG_POLL)) == 1
        came.append(time.monotonic())

    with in_background(take):
        settle_down()
        sent = time.monotonic()
        transport.send([message("t", queue)])
    assert came[0] - sent < 1.0 + AT_ONCE
    subscription.close()


def test_delivery_continues_after_killed_listener(
    make_named: Make, make_postgres: Make, tables: Tables, name: str, queue: str
) -> None:
    """The next message comes at once, over another connection, and so does the one after that."""
    producer, transport, timer = make_postgres(), make_named(poll_interval=LONG_POLL), Timer()
    with running(Consumer(transport, {"t": timer}, [queue])):
        settle_down()
        assert tables.terminate(name) >= 1
        sent = time.monotonic()
        producer.send([message("t", queue)])
        assert timer.wait() - sent < AT_ONCE
        settle_down()
        sent = time.monotonic()
        producer.send([message("t", queue)])
        assert timer.wait() - sent < AT_ONCE


class Listener:
    """Counts the notifications on the channel of a schema's queues."""

    def __init__(self, tables: Tables) -> None:
        self.heard: list[tuple[float, str]] = []
        self._connection = tables.connect()
        channel = Channels.of(tables.schema).queues
        self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            for notification in self._connection.notifies(timeout=0.05):
                self.heard.append((time.monotonic(), notification.payload))

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._connection.close()


@pytest.fixture
def listener(postgres: PostgresTransport, tables: Tables) -> Any:
    listener = Listener(tables)
    yield listener
    listener.close()


def test_notifications_are_debounced(postgres: PostgresTransport, listener: Listener, queue: str) -> None:
    """2,000 messages sent one by one cause as many notifications as there are windows: about 200 per second."""
    started = time.monotonic()
    for n in range(2000):
        postgres.send([message("t", queue, n)])
    seconds = time.monotonic() - started
    time.sleep(0.2)
    assert 2 <= len(listener.heard) <= 250 * seconds + 20


def test_last_message_of_a_burst_is_notified(postgres: PostgresTransport, listener: Listener, queue: str) -> None:
    """Every burst ends with a notification after its last commit, so no worker misses a message."""

    last = 0.0

    def announced() -> bool:
        return any(when > last for when, _ in listener.heard)

    for size in (2, 3, 10, 50):
        for n in range(size):
            last = time.monotonic()
            postgres.send([message("t", queue, n)])
        wait_until(announced, timeout=AT_ONCE, what="the last to be announced")
        assert {payload for _, payload in listener.heard} == {queue}
        time.sleep(0.05)


def test_listening_worker_gets_the_whole_burst(make_postgres: Make, queue: str) -> None:
    """With polling too slow to help, a burst is received to its end."""
    producer, transport = make_postgres(), make_postgres(poll_interval=LONG_POLL)
    subscription: Subscription = transport.subscribe([queue], lease=60)
    received: list[Delivery] = []

    def receive() -> None:
        while len(received) < 500:
            batch = subscription.receive(limit=3, wait=5)
            assert batch, f"nothing more came after {len(received)}"
            received.extend(batch)

    with in_background(receive):
        for n in range(500):
            producer.send([message("t", queue, n)])
        sent = time.monotonic()
    assert time.monotonic() - sent < AT_ONCE
    assert [delivery.payload.args[0] for delivery in received if delivery.payload] == list(range(500))
    subscription.close()


def test_debouncing_delays_no_other_queue(make_postgres: Make, queue: str) -> None:
    """While one queue is flooded, a message to an idle one reaches its worker at once."""
    producer, transport, timer = make_postgres(), make_postgres(poll_interval=LONG_POLL), Timer()
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            producer.send([message("t", queue + "-busy")])

    with in_background(flood), running(Consumer(transport, {"t": timer}, [queue])):
        try:
            settle_down()
            sent = time.monotonic()
            producer.send([message("t", queue)])
            assert timer.wait() - sent < AT_ONCE
        finally:
            over.set()


def test_failed_send_suppresses_no_notification(make_postgres: Make, tables: Tables, queue: str) -> None:
    """The message after a refused one, in the same window, is notified."""
    producer, transport, timer = make_postgres(), make_postgres(poll_interval=LONG_POLL), Timer()
    tables.execute("ALTER TABLE {messages} ADD CHECK (org_id <> 'blocked')")
    with running(Consumer(transport, {"t": timer}, [queue])):
        settle_down()
        for _ in range(3):
            with pytest.raises(Exception, match="check constraint"):
                producer.send([message("t", queue, org_id="blocked")])
            sent = time.monotonic()
            producer.send([message("t", queue)])
            assert timer.wait() - sent < AT_ONCE


@on_one_server
def test_idle_worker_queries_once_per_poll_interval(
    postgres: PostgresTransport, make_postgres: Make, queue: str, asked: list[str]
) -> None:
    """A wait costs two or three statements per interval and none in between, also beside delayed messages.

    The third is a claim over the whole index, where a slow machine made one over a part of it first.
    """
    transport = make_postgres(poll_interval=0.2)
    subscription = transport.subscribe([queue], lease=60)
    postgres.send([message("t", queue, delay=3600)])
    asked.clear()
    assert subscription.receive(limit=1, wait=1.0) == ()
    assert 2 <= len(asked) <= 3 * 6
    subscription.close()
