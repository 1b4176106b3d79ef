"""Observers: their calls, and that their errors change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from core.signatures import as_object, fields_of
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from unstract_core import (
    ConfigurationError,
    Consumer,
    Delivery,
    Dispatcher,
    Message,
    Observer,
    RetryLater,
    Settlement,
    Verdict,
)
from unstract_core.errors import DeadlineExceeded
from unstract_core.observability.observer import End, LeaseLostEvent, Observers, TaskFinished, Turn, WorkerHeartbeat

QUEUE = "q"
EARLIER = ("ran", "lost", "turned")
HOOKS = (
    *("sending", "running", "task_failed", "rejected", "settled", "dead_lettered"),
    *("on_task_finished", "on_lease_lost", "on_heartbeat", *EARLIER),
)


@attrs.define(eq=False)
class Diary(Observer):
    """Records every call."""

    notes: list[tuple[Any, ...]] = attrs.field(factory=list)
    heartbeats: list[WorkerHeartbeat] = attrs.field(factory=list)

    @contextlib.contextmanager
    def sending(self, message: Message) -> Iterator[Message]:
        self.notes.append(("sending", message.payload.task_name))
        yield message
        self.notes.append(("sent", message.payload.task_name))

    @contextlib.contextmanager
    def running(self, delivery: Delivery) -> Iterator[None]:
        self.notes.append(("running", name(delivery)))
        yield None
        self.notes.append(("run", name(delivery)))

    def on_task_finished(self, event: TaskFinished) -> None:
        assert event.seconds >= 0
        self.notes.append(("finished", name(event.delivery), event.end, event.error_type, event.replaced))

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self.notes.append(("rejected", name(delivery), error_type))

    def settled(self, settlement: Settlement, seconds: float) -> None:
        assert 0 <= seconds < 60
        self.notes.append(("settled", name(settlement.delivery), settlement.verdict))

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        self.heartbeats.append(event)


class Harmful(Observer):
    """Raises in the given hooks."""

    def __init__(self, hooks: set[str]) -> None:
        self._hooks = hooks

    def __getattribute__(self, hook: str) -> Any:
        if hook not in HOOKS or hook not in object.__getattribute__(self, "_hooks"):
            return object.__getattribute__(self, hook)
        raise RuntimeError("payload secret")


@contextlib.contextmanager
def leaving_badly(given: Any) -> Iterator[Any]:
    yield given
    raise RuntimeError("payload secret")


def name(delivery: Delivery) -> str | None:
    return delivery.payload.task_name if delivery.payload is not None else None


def later(_: Any = None) -> None:
    raise RetryLater(delay=0)


def fail() -> None:
    raise ValueError("no")


TASKS: dict[str, Callable[..., Any]] = {
    "return": lambda *_: float("nan"),
    "fail": fail,
    "later": later,
    "ok": lambda *_: None,
    "err": lambda *_: None,
}


def test_hooks_are_called_in_order() -> None:
    """An observer is called around a send, around a run with its end inside, and after the settlement."""
    diary = Diary()
    transport = MemoryTransport()
    Dispatcher(transport, observers=[diary]).send("return", queue=QUEUE)
    Consumer(transport, TASKS, [QUEUE], observers=[diary]).drain()
    assert diary.notes == [
        ("sending", "return"),
        ("sent", "return"),
        ("running", "return"),
        ("finished", "return", "returned", None, 1),
        ("run", "return"),
        ("settled", "return", Verdict.ACK),
    ]
    assert diary.heartbeats[-1] == WorkerHeartbeat(in_flight=0, running=0, unavailable=False)


def test_every_end_of_a_message_is_reported() -> None:
    """Failed, retried and rejected messages are reported with their error type; settlements with their verdict."""
    diary = Diary()
    transport = MemoryTransport()
    transport.send([message("fail", QUEUE, on_error=then("err", QUEUE)), message("later", QUEUE)])
    transport.send([message("nobody", QUEUE)])
    Consumer(transport, TASKS, [QUEUE], observers=[diary], max_attempts=2).drain()
    told = [note for note in diary.notes if note[0] in ("finished", "rejected", "settled")]
    assert sorted(told, key=str) == sorted(
        [
            ("finished", "fail", "raised", "ValueError", 0),
            ("settled", "fail", Verdict.ACK),
            ("finished", "err", "returned", None, 0),
            ("settled", "err", Verdict.ACK),
            ("finished", "later", "retry_asked", "RetryLater", 0),
            ("finished", "later", "raised", "RetryLater", 0),
            ("settled", "later", Verdict.RETRY),
            ("settled", "later", Verdict.BURY),
            ("rejected", "nobody", "UnknownTask"),
            ("settled", "nobody", Verdict.BURY),
        ],
        key=str,
    )


@given(st.sets(st.sampled_from(HOOKS)))
def test_observer_that_raises_changes_nothing(hooks: set[str]) -> None:
    """Sends, runs, settlements and the calls of other observers are the same as without the error."""
    diary = Diary()
    transport = MemoryTransport()
    both = [Harmful(hooks), diary]
    Dispatcher(transport, observers=both).send("return", queue=QUEUE)
    consumer = Consumer(transport, TASKS, [QUEUE], observers=both)
    assert consumer.drain() == 1
    assert consumer.counters["settled"] == 1
    assert [note[0] for note in diary.notes] == ["sending", "sent", "running", "finished", "run", "settled"]


@pytest.mark.parametrize("hook", ["sending", "running"])
def test_observer_that_raises_on_exit_changes_nothing(hook: str) -> None:
    """The message is sent, and the task has run."""
    one = Observer()
    setattr(one, hook, leaving_badly)
    transport = MemoryTransport()
    Dispatcher(transport, observers=[one]).send("ok", queue=QUEUE)
    consumer = Consumer(transport, TASKS, [QUEUE], observers=[one])
    consumer.drain()
    assert (consumer.counters["settled"], consumer.counters["buried"]) == (1, 0)


def test_observer_failure_is_logged_once_without_text(caplog: pytest.LogCaptureFixture) -> None:
    """Each type of error is logged once, without its text, which may quote a payload."""
    dispatcher = Dispatcher(MemoryTransport(), observers=[Harmful({"sending"})])
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            dispatcher.send("ok", queue=QUEUE)
    assert [vars(record)["wire.event"] for record in caplog.records] == ["observer_failed"]
    assert "secret" not in caplog.text


def test_headers_of_an_observer_are_sent(caplog: pytest.LogCaptureFixture) -> None:
    """`sending` sets the headers of a message, and `running` those of its continuation; invalid ones are omitted."""
    seen: list[tuple[str | None, dict[str, str] | None]] = []

    class Tracer(Observer):
        def __init__(self, headers: Any) -> None:
            self.headers = headers

        @contextlib.contextmanager
        def sending(self, message: Message) -> Iterator[Message]:
            yield attrs.evolve(message, payload=attrs.evolve(message.payload, headers=self.headers))

        @contextlib.contextmanager
        def running(self, delivery: Delivery) -> Iterator[Any]:
            assert delivery.payload is not None
            seen.append((name(delivery), delivery.payload.headers))
            yield {"run": "é"} if self.headers == {"sent": "x"} else self.headers

    signature = {"task": "ok", "args": (), "kwargs": {}, "options": {"queue": QUEUE}}
    for headers in ({"sent": "x"}, {"sent": 7}, {"": "x"}, {"x": "\0"}, {"x": "x" * 9000}, 7):
        transport = MemoryTransport()
        tracer = Tracer(headers)
        Dispatcher(transport, observers=[tracer]).send_with_callback(
            "return", queue=QUEUE, on_success=type("Signature", (), signature)()
        )
        Consumer(transport, TASKS, [QUEUE], observers=[tracer]).drain()
    assert seen[:2] == [("return", {"sent": "x"}), ("ok", {"run": "é"})]
    assert seen[2:] == [("return", None), ("ok", None)] * 5


def test_unusual_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log of a replaced value has its path without keys that may be content, such as an address."""
    transport = MemoryTransport()
    transport.send([message("t", QUEUE)])
    odd = {"alice@example.com": float("nan"), 'say "secret"': [float("nan")], "ratio": float("nan")}
    Consumer(transport, {"t": lambda: odd}, [QUEUE]).drain()
    (record,) = [one for one in caplog.records if vars(one)["wire.event"] == "result_made_to_fit"]
    assert vars(record)["wire.paths"] == '$["*"], $["*"][0], $.ratio'
    assert "alice" not in caplog.text
    assert "secret" not in caplog.text


class Failures(Observer):
    """Records failures and dead letters."""

    def __init__(self) -> None:
        self.failed: list[tuple[Delivery, str, BaseException, str]] = []
        self.dead: list[Settlement] = []

    def task_failed(self, delivery: Delivery, end: str, exception: BaseException) -> None:
        assert sys.exc_info()[1] is exception or isinstance(exception, DeadlineExceeded)
        self.failed.append((delivery, end, exception, threading.current_thread().name))

    def dead_lettered(self, settlement: Settlement) -> None:
        self.dead.append(settlement)


def test_task_failed_gets_the_handled_exception() -> None:
    """The hook gets the exception with its traceback, the end of the task, and the delivery with its payload."""
    failures, transport = Failures(), MemoryTransport()
    raised: list[ValueError] = []

    def fail_at(place: str) -> None:
        raised.append(ValueError(place))
        raise raised[-1]

    transport.send([message("fail_at", QUEUE, "here"), message("later", QUEUE), message("ok", QUEUE)])
    tasks = {**TASKS, "fail_at": fail_at}
    Consumer(transport, tasks, [QUEUE], observers=[failures], max_attempts=2, backoff=0).drain()
    ends = [(name(delivery), end) for delivery, end, _, _ in failures.failed]
    assert ends.count(("fail_at", "raised")) == 2
    assert (ends.count(("later", "retry_asked")), ends.count(("later", "raised"))) == (1, 1)
    assert len(ends) == 4
    seen = [exception for delivery, _, exception, _ in failures.failed if name(delivery) == "fail_at"]
    assert seen == raised
    assert all(traceback.extract_tb(exception.__traceback__)[-1].name == "fail_at" for exception in seen)
    assert all(thread.startswith("unstract-wire-task") for _, _, _, thread in failures.failed)


def test_task_failed_is_called_for_a_deadline() -> None:
    """A task that exceeds its deadline is reported once with DeadlineExceeded at that moment."""
    failures, transport, ended = Failures(), MemoryTransport(), threading.Event()
    transport.send([message("hang", QUEUE)])
    consumer = Consumer(
        transport, {"hang": lambda: ended.wait(60)}, [QUEUE], observers=[failures], task_deadline=0.1, max_attempts=1
    )
    consumer.drain(timeout=30)
    ended.set()
    ((_, end, exception, _),) = failures.failed
    assert (end, type(exception)) == ("raised", DeadlineExceeded)


def test_dead_lettered_gets_payload_and_reason() -> None:
    """Each dead letter is reported once, after the commit, whether failed, unknown or unreadable."""
    failures, transport = Failures(), MemoryTransport()
    transport.send([message("fail", QUEUE, "its argument"), message("nobody", QUEUE), message("ok", QUEUE)])
    transport._store.add(message("unreadable", QUEUE), "{no json")
    Consumer(transport, TASKS, [QUEUE], observers=[failures], max_attempts=1).drain()
    dead = {name(one.delivery): one for one in failures.dead}
    assert len(failures.dead) == 3
    assert dead["fail"].delivery.payload is not None
    assert dead["fail"].delivery.payload.args == ["its argument"]
    assert dead["nobody"].reason.startswith("UnknownTask: ")
    assert dead[None].delivery.raw == "{no json"
    assert {one.reason for one in transport.dead.find()} == {one.reason for one in failures.dead}


@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit, GeneratorExit])
@given(st.sets(st.sampled_from(HOOKS)))
def test_any_exception_of_an_observer_changes_nothing(raised: type[BaseException], hooks: set[str]) -> None:
    """Even a BaseException of an observer is ignored: the result is settled, and the consumer continues."""

    class Ending(Harmful):
        def __getattribute__(self, hook: str) -> Any:
            if hook not in HOOKS or hook not in object.__getattribute__(self, "_hooks"):
                return object.__getattribute__(self, hook)

            def end(*_: Any) -> Any:
                raise raised

            return end

    transport = MemoryTransport()
    both = [Ending(hooks)]
    callback = as_object(fields_of(task="ok", kwargs={}, options={"queue": QUEUE}))
    Dispatcher(transport, observers=both).send_with_callback("ok", queue=QUEUE, on_success=callback)
    consumer = Consumer(transport, TASKS, [QUEUE], observers=both)
    assert consumer.drain() == 2
    assert (consumer.counters["settled"], transport.dead.find()) == (2, [])


def test_observer_failure_is_logged_with_its_frames(caplog: pytest.LogCaptureFixture) -> None:
    """Each hook and type of error is logged with its frames."""

    class Failing(Observer):
        def dead_lettered(self, settlement: Settlement) -> None:
            raise KeyError("payload secret")

        def task_failed(self, delivery: Delivery, end: str, exception: BaseException) -> None:
            raise KeyError("payload secret")

    transport = MemoryTransport()
    transport.send([message("fail", QUEUE)] * 2)
    Consumer(transport, TASKS, [QUEUE], observers=[Failing()], max_attempts=1).drain()
    reports = [vars(one) for one in caplog.records if vars(one)["wire.event"] == "observer_failed"]
    assert sorted(one["wire.hook"] for one in reports) == ["dead_lettered", "task_failed"]
    assert all(one["wire.traceback"].startswith(f"{__file__}:") for one in reports)
    assert "secret" not in str(reports)


def test_observer_class_is_rejected() -> None:
    """A class in place of an observer raises ConfigurationError with the remedy."""
    with pytest.raises(ConfigurationError, match="not the class Failures: call it"):
        Consumer(MemoryTransport(), TASKS, [QUEUE], observers=[Failures])  # type: ignore[list-item]


def test_failing_dead_lettered_hook_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The settlement remains, the other messages are settled, and one ERROR event names the observer."""
    transport = MemoryTransport()
    transport.send([message("fail", QUEUE)] * 3 + [message("ok", QUEUE)])
    consumer = Consumer(transport, TASKS, [QUEUE], observers=[Harmful({"dead_lettered"})], max_attempts=1)
    consumer.drain()
    assert (consumer.counters["buried"], consumer.counters["settled"]) == (3, 1)
    assert [vars(one)["wire.event"] for one in caplog.records].count("observer_failed") == 1


class Earlier(Observer):
    """Overrides the earlier names of the renamed hooks."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        self.calls.append(("ran", delivery, end, error_type, seconds, replaced))
        super().ran(delivery, end, error_type, seconds, replaced)

    def lost(self, delivery: Delivery) -> None:
        self.calls.append(("lost", delivery))
        super().lost(delivery)

    def turned(self, turn: Turn) -> None:
        self.calls.append(("turned", turn))
        super().turned(turn)


class Current(Observer):
    """Overrides the new names of the renamed hooks."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_task_finished(self, event: TaskFinished) -> None:
        self.calls.append(("on_task_finished", event))

    def on_lease_lost(self, event: LeaseLostEvent) -> None:
        self.calls.append(("on_lease_lost", event))

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        self.calls.append(("on_heartbeat", event))


class EarlierOverCurrent(Earlier, Current):
    """Overrides the earlier names in the more derived class, and calls the next class."""


class Both(Observer):
    """Overrides both names in one class, like an observer for two releases of this package."""

    calls: list[tuple[Any, ...]]
    __init__ = Earlier.__init__
    ran, lost, turned = Earlier.ran, Earlier.lost, Earlier.turned
    on_task_finished, on_lease_lost = Current.on_task_finished, Current.on_lease_lost
    on_heartbeat = Current.on_heartbeat


DELIVERY = Delivery("1", QUEUE, 1, None, "")
EARLIER_CALLS: list[tuple[Any, ...]] = [
    ("ran", DELIVERY, "raised", "ValueError", 0.5, 2),
    ("lost", DELIVERY),
    ("turned", Turn(3, 1, away=True)),
]
CURRENT_CALLS: list[tuple[Any, ...]] = [
    ("on_task_finished", TaskFinished(DELIVERY, "raised", "ValueError", 0.5, 2)),
    ("on_lease_lost", LeaseLostEvent(DELIVERY)),
    ("on_heartbeat", WorkerHeartbeat(in_flight=3, running=1, unavailable=True)),
]


def call_renamed_hooks(observer: Observer) -> None:
    observer.ran(DELIVERY, "raised", "ValueError", 0.5, 2)
    observer.lost(DELIVERY)
    observer.turned(Turn(3, 1, away=True))


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (Earlier, EARLIER_CALLS),
        (Current, CURRENT_CALLS),
        (Both, CURRENT_CALLS),
        (EarlierOverCurrent, [call for pair in zip(EARLIER_CALLS, CURRENT_CALLS, strict=True) for call in pair]),
    ],
)
def test_renamed_hook_is_called_under_either_name(kind: type[Any], calls: list[tuple[Any, ...]]) -> None:
    """An observer may override the earlier or the new name of a hook, and is called once for each event."""
    observer = kind()
    call_renamed_hooks(Observers([observer]))
    assert observer.calls == calls


def test_call_by_earlier_name_reaches_the_new_hook() -> None:
    """An observer that forwards calls by the earlier names keeps working."""
    observer = Current()
    call_renamed_hooks(observer)
    assert observer.calls == CURRENT_CALLS


def test_observer_without_new_hooks_is_called() -> None:
    """An object that has only the hooks of an earlier release, and another base class, is called."""

    calls: list[Delivery] = []

    class Alone:
        def lost(self, delivery: Delivery) -> None:
            calls.append(delivery)

    call_renamed_hooks(Observers([Alone()]))  # type: ignore[list-item]
    assert calls == [DELIVERY]
