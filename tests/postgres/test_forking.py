"""Forked processes: a transport that was used before the fork works in the child and goes on in the parent."""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from consumers import running
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, in_background, on_one_server

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Dispatcher, Settlement, Verdict

pytestmark = on_one_server

Make = Callable[..., PostgresTransport]


def in_child(function: Callable[[], Any], *, timeout: float = 60.0) -> Any:
    """Run a function in a forked child and return its result; raise AssertionError with what it raised."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def main() -> None:
        try:
            theirs.send((True, function()))
        except BaseException:
            theirs.send((False, traceback.format_exc()))

    child = context.Process(target=main)
    child.start()
    try:
        assert mine.poll(timeout), "the child did not answer"
        fine, answer = mine.recv()
        assert fine, answer
    finally:
        child.join(30)
        if child.is_alive():
            child.kill()
            child.join()
    assert child.exitcode == 0
    return answer


def test_used_transport_works_after_a_fork(make_postgres: Make, tables: Tables, queue: str) -> None:
    """The child and then the parent send, call and subscribe with one transport."""
    transport, other = make_postgres(), make_postgres()
    with running(Consumer(other, {"echo": lambda value: value}, [queue])):

        def use(who: str) -> str:
            dispatcher = Dispatcher(transport)
            for n in range(3):
                assert dispatcher.call("echo", args=[[who, n]], queue=queue, timeout=5) == [who, n]
            transport.send([message("t", queue + who, n) for n in range(3)])
            subscription = transport.subscribe([queue + who], lease=5)
            deliveries = subscription.receive(limit=5, wait=1)
            assert all(subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in deliveries]))
            subscription.close()
            return f"{who} {len(deliveries)}"

        assert use("before") == "before 3"
        assert in_child(lambda: use("child")) == "child 3"
        assert use("after") == "after 3"
        assert in_child(lambda: use("second child")) == "second child 3"


def test_fork_during_traffic_harms_neither_process(make_postgres: Make, tables: Tables, queue: str) -> None:
    """Children forked in the middle of the parent's traffic send all their messages, and so does the parent."""
    transport = make_postgres()
    over = threading.Event()
    sent: list[str] = []

    def send_on() -> None:
        while not over.is_set():
            sent.extend(transport.send([message("t", queue)]))

    def wait_on() -> None:
        while not over.is_set():
            transport.reply("nobody", timeout=0.05)

    with in_background(send_on, wait_on):
        try:
            for _ in range(8):
                assert len(in_child(lambda: transport.send([message("t", queue + "-child")]))) == 1
        finally:
            over.set()
    assert tables.count(queue + "-child") == 8
    assert tables.count(queue) == len(sent) > 0


def test_forked_child_sends_late_notifications(make_postgres: Make, queue: str) -> None:
    """The notification thread of a child is its own: listeners get the last message of a burst at once."""
    transport, listening = make_postgres(), make_postgres(poll_interval=LONG_POLL)
    for n in range(5):
        transport.send([message("t", queue + "-parent", n)])
    received: list[Any] = []
    subscription = listening.subscribe([queue], lease=60)

    def burst() -> float:
        for n in range(50):
            transport.send([message("t", queue, n)])
        sent = time.monotonic()
        time.sleep(0.3)
        return sent

    def receive() -> None:
        while len(received) < 50:
            received.extend(subscription.receive(limit=5, wait=5))

    with in_background(receive):
        sent = in_child(burst)
    assert time.monotonic() - sent < 0.3 + AT_ONCE
    assert len(received) == 50
    subscription.close()


def test_closing_child_keeps_parent_connections(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """After a child has closed or ended, the parent's connections have the same backends."""
    transport = make_named()
    transport.send([message("t", queue)])
    subscription = transport.subscribe([queue], lease=60)
    before = sorted(pid for pid, _, _ in tables.backends(name))

    def use_and_close() -> None:
        transport.send([message("t", queue)])
        transport.close()

    in_child(use_and_close)
    in_child(transport.close)
    in_child(lambda: None)
    wait_until(lambda: len(tables.backends(name)) == len(before), what="the child's connections to be gone")
    assert len(subscription.receive(limit=5, wait=0)) == 2
    transport.send([message("t", queue)])
    assert sorted(pid for pid, _, _ in tables.backends(name)) == before
    subscription.close()


def test_consumer_runs_in_a_forked_child(make_postgres: Make, tables: Tables, queue: str) -> None:
    """The parent makes and uses the transport, and the forked child consumes."""
    transport = make_postgres()
    transport.send([message("t", queue, n) for n in range(20)])
    assert in_child(lambda: Consumer(transport, {"t": lambda n: None}, [queue]).drain(timeout=10)) == 20
    assert tables.count(queue) == 0
