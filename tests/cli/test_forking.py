"""Tasks that fork: their child processes are no workers, and signals end them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from forking import POOLS, outcome, tasks
from supervised import noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import Consumer
from unstract_core.forking import end_child, handling
from unstract_core.observability.observer import Observer, Turn

ALONE, SUPERVISED = ("--concurrency", "3"), ("--processes", "1")
PLAIN = f"{signal.Handlers.SIG_DFL!r} {signal.default_int_handler!r}\n"
VALUES = {
    "executor": PLAIN,
    "forkserver": PLAIN,
    "preexec": PLAIN,
    "fork.handlers": PLAIN,
    "process.terminated": "-15",
    "fork.returns": "0",
    "fork.raises": "1",
    "fork.exits": "3",
    "fork.leaves": "4",
    "fork.killed": "-15",
    "fork.twice": "5",
    "forkpty": "0",
    "thread": "0",
}


@pytest.mark.parametrize("options", [("--concurrency", "4"), SUPERVISED], ids=" ".join)
def test_tasks_can_terminate_a_process_pool(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Children of a pool end at SIGTERM, so `Pool.terminate` returns and each of twelve tasks ends."""
    with worker(*options, url="forking:pools", app="forking:tasks", directory=tmp_path) as command:
        wait_until(lambda: len(noted(tmp_path, "pool")) == POOLS, timeout=60, what="every pool to end")
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


@pytest.mark.parametrize("options", [ALONE, SUPERVISED], ids=" ".join)
def test_a_forked_child_never_runs_its_parents_tasks(tmp_path: Path, options: tuple[str, ...]) -> None:
    """However a child is forked and exits, it has default signal handlers, and each task runs once, in the worker."""
    names = set(tasks) - {"pool", "mark"}
    with worker(*options, url="forking:queued", app="forking:tasks", directory=tmp_path) as command:
        pid = int(command.event("worker_started")["pid"])
        wait_until(lambda: all(noted(tmp_path, f"after-{name}") for name in names), timeout=120, what="every task")
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        (stopped,) = command.events("worker_stopped")
        assert (stopped["ran"], stopped["settled"]) == (str(2 * len(names)), str(2 * len(names)))
        ended = command.events("forked_child_ended")
        assert sorted((event["task"], event["exit"]) for event in ended if event["task"] == "fork.raises") == [
            ("fork.raises", "1")
        ]
        assert "in the child" not in "\n".join(command.log)
    assert {name: (tmp_path / f"{name}.value").read_text() for name in VALUES} == VALUES
    for name in names - {"fork.handlers", "preexec"}:
        assert noted(tmp_path, name) == [pid], name
    for name in names:
        assert noted(tmp_path, f"after-{name}") == [pid], name
    assert pid in noted(tmp_path, "at-exit") or options == ALONE
    assert set(noted(tmp_path, "at-exit")) <= {pid}


def in_child(function: object) -> int:
    """Call a function in a forked child; return the child's exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            assert callable(function)
            end_child(function())
        finally:
            os._exit(99)
    return outcome(pid)


def test_a_forked_child_keeps_handlers_of_the_application() -> None:
    """A forked child undoes the handlers of the worker only, not those that the application has set."""

    def ours(number: int, frame: object) -> None: ...
    def of_app(number: int, frame: object) -> None: ...

    with handling([signal.SIGUSR1, signal.SIGUSR2], ours), handling([signal.SIGUSR1], ours):
        signal.signal(signal.SIGUSR2, of_app)
        assert in_child(lambda: int(signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL)) == 0
        assert in_child(lambda: int(signal.getsignal(signal.SIGUSR2) is not of_app)) == 0
    assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_a_consumer_runs_again_in_a_forked_process() -> None:
    """A process that is forked beside a running consumer may run that consumer itself."""
    transport = MemoryTransport()
    consumer = Consumer(transport, {"t": print}, ["q"])
    thread = threading.Thread(target=consumer.run)
    thread.start()
    try:
        wait_until(lambda: consumer._running is not None, what="it to run")
        assert in_child(lambda: consumer.drain(timeout=0) + int(consumer.stopping)) == 0
    finally:
        consumer.stop()
        thread.join()


def test_a_child_forked_by_an_observer_settles_nothing() -> None:
    """A child that returns from an observer's hook exits before the next transport call."""
    forked: list[int] = []

    class Forking(Observer):
        def turned(self, turn: Turn) -> None:
            if not forked:
                forked.append(os.fork())

    transport = MemoryTransport()
    transport.send([message("t", "q")])
    assert Consumer(transport, {"t": lambda: None}, ["q"], observers=[Forking()]).drain(timeout=10) == 1
    assert outcome(forked[0]) == 0
