"""A consumer whose tasks, log handlers or settings fail."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from consumers import running
from virtual_clock import VirtualClock

from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from transports.memory.harness import MemoryHarness
from unstract_core import (
    ConfigurationError,
    Consumer,
    Dispatcher,
    Reply,
    RetryLater,
    Settlement,
)

QUEUE = "q"


def concerned(settlements: Sequence[Settlement], task_name: str) -> bool:
    return any(one.delivery.payload is not None and one.delivery.payload.task_name == task_name for one in settlements)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and the name of each logged event."""
    return [(record.levelname, vars(record)["wire.event"]) for record in caplog.records]


# Tasks and log handlers that fail.


def test_a_users_retry_exception_costs_no_thread() -> None:
    """A subclass of RetryLater that does not call its parent asks for a retry, and the thread lives on."""

    class NotYet(RetryLater):
        def __init__(self, document: str) -> None:
            self.document = document

    ran: list[int] = []

    def task(number: int) -> int:
        ran.append(number)
        if ran.count(number) == 1:
            raise NotYet("d")
        return number

    transport = MemoryTransport()
    transport.send([message("t", QUEUE, number) for number in range(3)])
    assert Consumer(transport, {"t": task}, [QUEUE], backoff=0).drain(timeout=30) == 6


def test_the_last_retry_request_is_logged_as_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A granted request for a retry is an INFO; a request after the last attempt is a `task_raised`."""

    def task() -> None:
        raise RetryLater(0)

    caplog.set_level(logging.INFO)
    transport = MemoryTransport()
    transport.send([message("t", QUEUE)])
    Consumer(transport, {"t": task}, [QUEUE], max_attempts=3).drain(timeout=30)
    granted = ("INFO", "task_retry_asked")
    assert events(caplog) == [granted, granted, ("WARNING", "task_raised")]


def test_a_raising_log_handler_costs_no_thread() -> None:
    """A log filter that raises keeps no message from its settlement."""

    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("broken")

    broken = Broken()
    runner = logging.getLogger("unstract_wire.worker")
    runner.addFilter(broken)
    try:
        transport = MemoryTransport()
        transport.send([message("t", QUEUE, reply_key=str(number)) for number in range(3)])
        consumer = Consumer(transport, {"t": lambda: 1 / 0}, [QUEUE])
        assert consumer.drain(timeout=30) == 3
        assert [transport.reply(str(number)) is not None for number in range(3)] == [True] * 3
    finally:
        runner.removeFilter(broken)


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("no name")


class NamelessError(Exception, metaclass=Nameless):
    """Its type cannot be named."""


def test_a_nameless_exception_keeps_its_text() -> None:
    """The sender gets the real error text, and the run is counted."""

    def task() -> None:
        raise NamelessError("the real reason")

    transport = MemoryTransport()
    transport.send([message("t", QUEUE, reply_key="k")])
    assert Consumer(transport, {"t": task}, [QUEUE]).drain(timeout=30) == 1
    assert (transport.reply("k") or Reply("", "failed")).error == "Exception: the real reason"


CALLBACK = {"task_name": "callback", "queue": "callbacks"}
INVALID_ID_ROWS: dict[str, dict[str, Any]] = {
    "returns": {"task_name": "t", "on_success": CALLBACK},
    "raises": {"task_name": "bad", "on_error": CALLBACK},
    "malformed": {"task_name": "t", "kwargs": 5, "on_error": CALLBACK},
}


@pytest.mark.parametrize("row", INVALID_ID_ROWS)
def test_an_invalid_foreign_id_costs_no_thread(row: str) -> None:
    """With a lone surrogate in the task_id, the callback is sent and other messages run."""
    transport = MemoryTransport()
    transport._store.add(message("t", QUEUE), json.dumps({**INVALID_ID_ROWS[row], "queue": QUEUE, "task_id": "\ud800"}))
    transport.send([message("t", QUEUE)] * 3)
    consumer = Consumer(transport, {"t": lambda: 1, "bad": lambda: 1 / 0}, [QUEUE], concurrency=2)
    assert consumer.drain(timeout=30) >= 3
    assert [state.ready for state in transport.queues(["callbacks"])] == [1]


# Settings.

INVALID: dict[str, dict[str, Any]] = {
    "concurrency a float": {"concurrency": 1.5},
    "concurrency a str": {"concurrency": "2"},
    "concurrency 0": {"concurrency": 0},
    "max_attempts 0": {"max_attempts": 0},
    "lease 0": {"lease": 0},
    "lease inf": {"lease": float("inf")},
    "lease nan": {"lease": float("nan")},
    "lease a str": {"lease": "60"},
    "backoff inf": {"backoff": float("inf")},
    "backoff negative": {"backoff": -1},
    "backoff_max inf": {"backoff_max": float("inf")},
    "prefetch 0": {"prefetch": 0},
    "prefetch below the concurrency": {"prefetch": 1, "concurrency": 2},
    "tasks empty": {"tasks": {}},
    "status_payload unknown": {"status_payload": "all"},
    "status_payload empty": {"status_payload": ""},
    "returned_failure unknown": {"returned_failure": "none"},
    "returned_failure None": {"returned_failure": None},
    "allow_continuations a str": {"allow_continuations": "callbacks"},
    "allow_continuations a number": {"allow_continuations": 7},
    "allow_continuations without a queue": {"allow_continuations": [":task"]},
    "allow_continuations without a task": {"allow_continuations": ["queue:"]},
    "allow_continuations of an empty tuple": {"allow_continuations": [()]},
    "allow_continuations of numbers": {"allow_continuations": [("q", 7)]},
    "tasks None": {"tasks": None},
    "tasks a list": {"tasks": ["t"]},
    "task of no callable": {"tasks": {"t": 7}},
    "queues empty": {"queues": []},
    "queues a str": {"queues": "q"},
}


@pytest.mark.parametrize("name", INVALID)
def test_a_consumer_refuses_settings_that_cannot_work(name: str) -> None:
    """Misconfiguration fails at the start with the name of the setting, not at the first message."""
    settings: dict[str, Any] = {"tasks": {"t": print}, "queues": [QUEUE], **INVALID[name]}
    with pytest.raises(ConfigurationError, match=name.split()[0]):
        Consumer(MemoryTransport(), settings.pop("tasks"), settings.pop("queues"), **settings)


def test_a_call_without_limit_is_answered() -> None:
    """`call(timeout=inf)` waits until the answer comes."""
    transport = MemoryTransport()
    with running(Consumer(transport, {"t": lambda: 7}, [QUEUE])):
        assert Dispatcher(transport).call("t", queue=QUEUE, timeout=float("inf")) == 7


def test_deliveries_of_a_repeated_id_stay_apart() -> None:
    """After a restore a consumer may have two deliveries of the same id and attempt: each is renewed and settled."""
    clock = VirtualClock()
    transport, go, started = MemoryTransport(clock=clock), threading.Event(), list[str]()

    def work(which: str) -> None:
        started.append(which)
        clock.wait_until(go.is_set)

    (old_id,) = transport.send([message("t", QUEUE, "old", on_success=then("done", "cb"))])
    consumer = clock.consumer(transport, {"t": work}, [QUEUE], concurrency=2, lease=60)
    with clock.running(consumer):
        clock.wait_until(lambda: started == ["old"])
        (new_id,) = transport.send([message("t", "elsewhere", "new", on_success=then("done", "cb"))])
        MemoryHarness().reissue(transport, new_id, old_id)
        with transport._store.using():
            row = transport._store.rows[int(old_id)]
            row.queue = QUEUE
            transport._store.postpone(row, 0)
            transport._store.changed.notify_all()
        clock.wait_until(lambda: started == ["old", "new"] and consumer.counters["lost"] == 1)
        clock.sleep(120)
        go.set()
        clock.wait_until(lambda: consumer.counters["settled"] == 1)
    assert started == ["old", "new"]
    (follow_up,) = transport.subscribe(["cb"], lease=60).receive(limit=5, wait=0)
    assert follow_up.id == "3"
    assert consumer.counters["ran"] == 2


@pytest.mark.parametrize(
    "allowed", [["cb:done"], ["cb"], [("cb", "done")], [("cb", None)], ["other", "cb:done"], {"cb": None}]
)
def test_an_allowed_continuation_is_sent(allowed: Any) -> None:
    """A callback is sent if the list has its queue, or its queue and task."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE, on_success=then("done", "cb"))])
    Consumer(transport, {"t": lambda: 1}, [QUEUE], allow_continuations=allowed).drain(timeout=10)
    assert transport.queues(["cb"])[0].ready == 1


@pytest.mark.parametrize("allowed", [[], ["cb:another"], ["another"], [("done", "cb")]])
def test_a_task_with_a_forbidden_callback_never_runs(allowed: Any) -> None:
    """Its status is failed, its dead letter has the reason, and no callback is sent."""
    transport, ran = MemoryTransport(), []
    transport.send([message("t", QUEUE, task_id="i", on_success=then("done", "cb"), on_error=then("failed", "cb"))])
    Consumer(transport, {"t": lambda: ran.append(1)}, [QUEUE], allow_continuations=allowed).drain(timeout=10)
    assert ran == []
    assert transport.queues(["cb"])[0].ready == 0
    (letter,) = transport.dead.find()
    assert letter.reason.startswith("ContinuationNotAllowed: on_success names task 'done' on queue 'cb'")
    status = transport.reply("i")
    assert status is not None
    assert (status.status, status.error) == ("failed", letter.reason)
