"""Processes that share one file: killed, started together, and forked."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unstract_core import Consumer, Delivery, Message, Settlement, TaskPayload, Verdict, current_delivery

from wire_sqlite import SqliteTransport

Open = Callable[..., SqliteTransport]
WORKER = Path(__file__).with_name("worker.py")


def message(*args: int) -> Message:
    return Message(TaskPayload(task_name="t", args=list(args), queue="q"), "q")


@contextlib.contextmanager
def worker(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A running worker process, which is killed at the end."""
    command = [sys.executable, str(WORKER), what, f"sqlite:///{path}", "q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def test_message_of_a_killed_worker_is_redelivered(open_transport: Open, path: Path) -> None:
    """The message of a worker that dies during its task runs again after its lease."""
    transport = open_transport()
    attempts = []

    def task() -> None:
        delivery = current_delivery()
        attempts.append(delivery.attempt if delivery else None)

    transport.send([message()])
    with worker("hang", path) as process:
        assert [state.in_flight for state in transport.queues(["q"])] == [1]
        process.kill()
    started = time.monotonic()
    while not attempts and time.monotonic() < started + 10:
        Consumer(transport, {"t": task}, ["q"]).drain(timeout=10)
        time.sleep(0.05)
    assert attempts == [2]
    assert [(state.ready, state.in_flight) for state in transport.queues(["q"])] == [(0, 0)]


def test_killed_workers_lose_and_double_no_follow_up(open_transport: Open, path: Path) -> None:
    """An acknowledgement and its follow-up are one commit."""
    transport, number = open_transport(), 400
    transport.send([message(n) for n in range(number)])
    for enough in range(20, 140, 20):
        with worker("follow", path) as process:
            while transport.queues(["q-after"])[0].ready < enough:
                time.sleep(random.uniform(0.0005, 0.005))
            process.kill()
    assert transport.queues(["q"])[0].ready > 0
    with worker("follow", path) as process:
        assert process.wait(60) == 0
    subscription = transport.subscribe(["q-after"], lease=60)
    after = subscription.receive(limit=2 * number, wait=0)
    assert sorted(one.payload.args for one in after if one.payload) == [[n] for n in range(number)]


def test_concurrent_creation_of_one_file_succeeds(open_transport: Open) -> None:
    """Of several processes that create the same file, each succeeds."""
    together = threading.Barrier(12)

    def send() -> str:
        together.wait()
        return open_transport(timeout=60).send([message()])[0]

    with ThreadPoolExecutor(12) as threads:
        sent = [threads.submit(send) for _ in range(12)]
        assert len({one.result() for one in sent}) == 12


def test_forked_child_uses_its_own_connections(open_transport: Open) -> None:
    """A fork while other threads send loses no message of the parent or the child."""
    transport, children, stop = open_transport(), 10, threading.Event()
    sent: list[str] = []

    def keep_sending() -> None:
        while not stop.is_set():
            sent.extend(transport.send([message()]))

    with ThreadPoolExecutor(2) as threads:
        sending = [threads.submit(keep_sending) for _ in range(2)]
        try:
            ended = [os.waitpid(forked_sender(transport.send), 0)[1] for _ in range(children)]
        finally:
            stop.set()
        for one in sending:
            one.result()
    assert ended == [0] * children
    assert transport.queues(["q"])[0].ready == len(sent) + children


def forked_sender(send: object) -> int:
    """Fork; the child sends one message, and exits with 1 if it failed."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        with contextlib.suppress(BaseException):
            assert callable(send)
            send([message()])
            code = 0
        os._exit(code)
    return child


def test_stored_messages_survive_a_restart(open_transport: Open) -> None:
    """A new transport finds the messages, those in flight, their attempts, and the dead letters."""
    transport = open_transport()
    transport.send([message(n) for n in range(3)])
    subscription = transport.subscribe(["q"], lease=0.2)
    buried, held = subscription.receive(limit=2, wait=0)
    subscription.settle([Settlement(buried, Verdict.BURY, reason="r", result=[1])])
    transport.close()
    transport = open_transport()
    assert [(letter.reason, letter.result, letter.attempts) for letter in transport.dead.find()] == [("r", [1], 1)]
    subscription = transport.subscribe(["q"], lease=60)
    found: list[Delivery] = []
    while len(found) < 2:  # messages in flight may be ready again
        found += subscription.receive(limit=5, wait=30)
    assert sorted((one.attempt, one.id == held.id) for one in found) == [(1, False), (2, True)]
