"""A supervised worker with one task at a time runs it on its main thread, and calls the transport on another one."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from supervised import DIRECTORY, note, noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.memory import MemoryTransport
from transports.memory.subscription import MemorySubscription
from unstract_core import ConfigurationError, Consumer, Tasks

tasks = Tasks()
APP = "cli.test_main_thread:tasks"
URL = "cli.test_main_thread:queued"


class Threads(MemoryTransport):
    """A transport that notes the threads on which its subscriptions are used."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        threads = self.threads

        class Noting(MemorySubscription):
            def __getattribute__(self, name: str) -> Any:
                if name in ("receive", "renew", "settle", "close"):
                    threads.add(threading.current_thread().name)
                return super().__getattribute__(name)

        threads.add(threading.current_thread().name)
        return Noting(self._store, queues, lease)


def queued() -> MemoryTransport:
    transport = MemoryTransport()
    directory = os.environ[DIRECTORY]
    names = os.environ.get("MAIN_THREAD_TASKS", "loop handler alone mark").split()
    transport.send([message(name, "q", directory, name) for name in names])
    return transport


@tasks.register("loop")
def loop(directory: str, name: str) -> None:
    """Use an event loop, as libraries do that need the main thread."""
    assert threading.current_thread() is threading.main_thread()
    assert asyncio.run(asyncio.sleep(0, 1)) == 1
    asyncio.set_event_loop(asyncio.new_event_loop())
    asyncio.get_event_loop().close()
    note(directory, name)


@tasks.register("handler")
def handler(directory: str, name: str) -> None:
    """Set signal handlers, and do not restore them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(directory, name)


@tasks.register("alone")
def alone(directory: str, name: str) -> None:
    """Check that a task without child processes has none to wait for."""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    note(directory, name)


@tasks.register("pipe_closed")
def pipe_closed(directory: str, name: str) -> None:
    """Ignore SIGTERM while the task runs."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(directory, name)
    wait_until(Path(directory, "go").exists, timeout=60, what="to be let go")


@tasks.register("mark")
def mark(directory: str, name: str) -> None:
    note(directory, name)


@tasks.register("hang")
def hang(directory: str, name: str) -> None:
    note(directory, name)
    time.sleep(600)


def test_a_single_threaded_child_uses_its_main_thread(tmp_path: Path) -> None:
    """Event loops and signal handlers work in tasks, and a handler that a task sets is removed after it."""
    with worker("--processes", "1", url=URL, app=APP, directory=tmp_path) as command:
        wait_until(lambda: noted(tmp_path, "mark"), what="the tasks")
        pids = command.children()
        assert [noted(tmp_path, name) for name in ("loop", "handler", "alone", "mark")] == [pids] * 4
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("worker_stopped")[0]["settled"] == "4"
        assert command.events("child_killed") == []


def test_a_task_hanging_on_the_main_thread_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline ends the child although its main thread never returns, and another child takes its place."""
    monkeypatch.setenv("MAIN_THREAD_TASKS", "hang")
    with worker("--task-deadline", "0.5", url=URL, app=APP, directory=tmp_path) as command:
        command.event("task_overdue")
        assert command.event("child_recycled")["reason"] == "overdue"
        assert command.events("worker_stopped")[0]["overdue"] == "1"


def test_all_subscription_calls_are_on_one_thread() -> None:
    """Tasks run on the calling thread, subscriptions are used on one other thread, and its errors reach the caller."""
    transport, ran = Threads(), []
    transport.send([message("t", "q") for _ in range(20)])

    def task() -> None:
        ran.append(threading.current_thread())
        if len(ran) == 20:
            consumer.stop()

    consumer = Consumer(transport, {"t": task}, ["q"])
    consumer.run_tasks_here(ended=lambda: None)
    assert set(ran) == {threading.current_thread()}
    assert transport.threads == {"unstract-wire-io"}
    transport.close()
    with pytest.raises(Exception, match="closed"):
        consumer.run_tasks_here(ended=lambda: None)
    with pytest.raises(ConfigurationError, match="must be 1, not 2"):
        Consumer(transport, {"t": task}, ["q"], concurrency=2).run_tasks_here(ended=lambda: None)


def test_a_worker_stops_although_a_task_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a task that has replaced the handler of SIGTERM, the worker stops and starts no other task."""
    monkeypatch.setenv("MAIN_THREAD_TASKS", "pipe_closed mark")
    with worker("--processes", "1", url=URL, app=APP, directory=tmp_path) as command:
        wait_until(lambda: noted(tmp_path, "pipe_closed"), what="the task")
        command.signal(signal.SIGTERM)
        command.event("supervisor_stopping")
        time.sleep(0.5)  # in which the child stops
        (tmp_path / "go").touch()
        assert command.ends() == 0
        assert noted(tmp_path, "mark") == []
        assert command.events("worker_stopped")[0]["ran"] == "1"
