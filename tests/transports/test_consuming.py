"""The consumer's table (design section 6), run over the transport: what a task does, and what its sender sees."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import attrs
import pytest
from harness import Harness, message, then, timed
from servers import wait_until

from unstract_core import (
    ConfigurationError,
    Consumer,
    Dispatcher,
    FairnessKey,
    NotSupported,
    Reply,
    ReplyTimeout,
    RetryLater,
    TaskFailed,
    Tasks,
)

tasks = Tasks()


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text for you")


class Leave(BaseException):
    pass


class HostileResult:
    def __repr__(self) -> str:
        raise SystemExit("no repr for you")


@tasks.register("behave")
def behave(how: str, *rest: Any) -> Any:
    """Do what the message says."""
    match how:
        case "return":
            return rest[0] if rest else None
        case "raise":
            raise ValueError("the real reason")
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "leave":
            raise Leave("for good")
        case "hostile error":
            raise HostileError
        case "hostile result":
            return {"kept": 1, "bad": HostileResult()}
        case "generator":
            return (n for n in range(3))
        case "three that do not fit":
            return {"ratio": float("nan"), "pages": ["fits", "secret\0"], "scan": b"secret", "total": 7}
        case "huge":
            return {"success": True, "data": "x" * 80_000_000}
        case "later":
            raise RetryLater(delay=0.01)
    raise AssertionError(how)


@attrs.define
class World:
    """A transport with a consumer's queues, and what the callbacks were given."""

    harness: Harness
    transport: Any
    queue: str
    callbacks: str
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=list)

    def consume(self, **options: Any) -> Consumer:
        registry = dict(tasks)
        for name in ("ok", "err"):
            registry[name] = lambda *args, name=name, **kwargs: self.seen.append((name, args, kwargs))
        options = {"backoff": 0.01, "max_attempts": 3, **options}
        consumer = Consumer(self.transport, registry, [self.queue, self.callbacks], **options)
        consumer.drain(timeout=20)
        return consumer

    def send(self, *args: Any, **options: Any) -> None:
        self.transport.send([message(options.pop("task", "behave"), self.queue, *args, **options)])

    def callbacks_to(self, **kwargs: Any) -> dict[str, Any]:
        return {"on_success": then("ok", self.callbacks, **kwargs), "on_error": then("err", self.callbacks, **kwargs)}

    def dead(self) -> list[str]:
        return [letter.reason for letter in self.transport.dead.find(queue=self.queue)]

    def empty(self) -> bool:
        return self.left(0, self.queue, self.callbacks)

    def left(self, count: int, *queues: str) -> bool:
        return self.harness.has_left(self.transport, count, *(queues or [self.queue]))

    def answer(self, key: str) -> Reply:
        """Return the reply under a key that a message carried."""
        found = self.harness.answered(self.transport, key)
        assert found is not None
        return found

    def status_is(self, task_id: str, status: str, *, result: Any = None, error: str = "") -> bool:
        """Whether a dispatch has this status, "..." for more in its error; or that it cannot be known is said."""
        if not self.transport.capabilities.status:
            with pytest.raises(NotSupported):
                self.transport.reply(task_id)
            return True
        found = self.transport.reply(task_id)
        same = found.error == error or (error.endswith("...") and found.error.startswith(error[:-3]))
        return bool((found.status, found.result) == (status, result) and same)


@pytest.fixture
def world(harness: Harness) -> Iterator[World]:
    with harness.transport() as transport:
        yield World(harness, transport, harness.queue(), harness.queue())


FAILURES = {
    "raise": "ValueError: the real reason",
    "exit": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt",
    "leave": "Leave: for good",
    "hostile error": "HostileError: <its message cannot be printed>",
}


def test_a_return_is_continued_with_its_result(world: World) -> None:
    """on_success gets the result as its first argument beside its kwargs; the status is completed, with the result."""
    world.send("return", {"n": 1}, task_id="id-1" + world.queue, **world.callbacks_to(x=2))
    world.consume()
    assert world.seen == [("ok", ({"n": 1},), {"x": 2})]
    assert world.status_is("id-1" + world.queue, "completed", result={"n": 1})
    assert world.empty()
    assert not world.dead()


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_is_continued_with_the_id_and_the_real_error(world: World, how: str) -> None:
    """on_error gets the dispatch id first; the error text is the status, and in callback_kwargs; nothing is re-run."""
    world.send(how, task_id="id-2" + world.queue, **world.callbacks_to(callback_kwargs={"run": 1}))
    consumer = world.consume()
    assert world.seen == [("err", ("id-2" + world.queue,), {"callback_kwargs": {"run": 1, "error": FAILURES[how]}})]
    assert world.status_is("id-2" + world.queue, "failed", error=FAILURES[how])
    assert consumer.counters["ran"] == 2
    assert world.empty()
    assert not world.dead()


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_that_nobody_waits_for_is_retried_then_buried(world: World, how: str) -> None:
    """Without reply and continuations: run again with backoff, buried after max_attempts, status failed."""
    world.send(how, task_id="id-3" + world.queue)
    consumer = world.consume(max_attempts=3)
    assert consumer.counters["ran"] == 3
    assert world.dead() == [FAILURES[how]]
    assert world.status_is("id-3" + world.queue, "failed", error=FAILURES[how])


def test_a_task_asked_for_later_runs_again_and_ends_as_raised(world: World) -> None:
    """RetryLater is honoured up to max_attempts, then it is a failure like any other."""
    world.send("later", task_id="id-4" + world.queue, **world.callbacks_to())
    consumer = world.consume(max_attempts=3)
    assert consumer.counters["ran"] == 4
    assert [name for name, _, _ in world.seen] == ["err"]
    assert world.status_is("id-4" + world.queue, "failed", error="RetryLater...")


@pytest.mark.parametrize("how", ["hostile result", "generator", "huge"])
def test_a_result_that_does_not_fit_is_made_to_fit(world: World, how: str) -> None:
    """The money is spent, so the callback arrives: with the result as lenient normalisation leaves it."""
    world.send(how, **world.callbacks_to())
    consumer = world.consume()
    ((name, (result,), _),) = world.seen
    assert name == "ok"
    match how:
        case "hostile result":
            assert result == {"kept": 1, "bad": "<unprintable HostileResult>"}
        case "generator":
            assert re.fullmatch(r"<generator object behave\.<locals>\.<genexpr> at 0x[0-9a-f]+>", result)
        case "huge":
            assert result["success"] is True
            assert "beyond" in result["data"]
    assert consumer.counters["replaced"] == 1


def test_what_was_replaced_in_a_result_is_told_in_one_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING for the task lists the path of each replacement and no content; each is counted."""
    world.send("three that do not fit", task_id="w" + world.queue, **world.callbacks_to())
    world.send("return", {"fits": 1})
    with caplog.at_level(logging.INFO):
        consumer = world.consume()
    (record,) = [one for one in caplog.records if vars(one).get("wire.event") == "result_made_to_fit"]
    fields = vars(record)
    assert (record.levelno, record.name) == (logging.WARNING, "unstract_core.runner")
    assert (fields["wire.paths"], fields["wire.count"]) == ("$.ratio, $.pages[1], $.scan", 3)
    assert (fields["wire.queue"], fields["wire.task"], fields["wire.attempt"]) == (world.queue, "behave", 1)
    assert fields["wire.task_id"] == "w" + world.queue
    assert "secret" not in caplog.text
    assert consumer.counters["replaced"] == 3


def test_unknown_malformed_and_exhausted_messages_tell_their_sender_and_are_buried(
    harness: Harness, world: World
) -> None:
    """A failure before the task runs reaches on_error or the reply with its reason, and leaves a dead letter."""
    queue, callbacks = world.queue, world.callbacks
    world.send(task="nobody", task_id="u" + queue, **world.callbacks_to(callback_kwargs={}))
    harness.inject(
        world.transport,
        queue,
        f'{{"task_name": "behave", "args": 7, "kwargs": {{}}, "queue": "q", "fairness": null, "task_id": "m{queue}",'
        f' "on_error": {{"task_name": "err", "kwargs": {{}}, "queue": "{callbacks}"}}}}',
    )
    harness.inject(world.transport, queue, f'{{"task_name": "behave", "kwargs": null, "reply_key": "r{queue}"}}')
    harness.inject(world.transport, queue, "[1, 2]")
    world.send("return", 1, reply_key="fine" + queue)
    world.consume()
    assert {(name, args) for name, args, _ in world.seen} == {("err", ("u" + queue,)), ("err", ("m" + queue,))}
    assert world.status_is("u" + queue, "failed", error="UnknownTask...")
    assert world.status_is("m" + queue, "failed", error="MalformedPayload...")
    assert "$.kwargs" in world.answer("r" + queue).error
    assert world.answer("fine" + queue).result == 1
    assert len(world.dead()) == 4
    assert world.empty()


@pytest.mark.needs("crashes are counted")
def test_a_message_that_kills_its_workers_is_given_up(harness: Harness, world: World) -> None:
    """After max_attempts deliveries without a settlement the sender is told, and the message is buried unrun."""
    world.send("return", 1, task_id="k" + world.queue, **world.callbacks_to())
    for _ in range(3):
        subscription = world.transport.subscribe([world.queue], lease=60)
        assert len(subscription.receive(limit=1, wait=10)) == 1
        subscription.close()
        harness.expire(world.transport, world.queue)
    world.consume(max_attempts=3)
    assert [name for name, _, _ in world.seen] == ["err"]
    assert world.status_is("k" + world.queue, "failed", error="TooManyAttempts...")
    assert len(world.dead()) == 1


@pytest.mark.parametrize(("how", "given"), [("return", "on_error"), ("raise", "on_success")])
def test_the_other_outcome_of_a_single_callback_is_recorded_and_chains_nothing(
    world: World, how: str, given: str
) -> None:
    """With only one of on_success and on_error, the other outcome is acknowledged with its status, and not re-run."""
    world.send(how, task_id="s" + world.queue, **{given: then("ok", world.callbacks)})
    consumer = world.consume()
    assert world.seen == []
    assert consumer.counters["ran"] == 1
    if how == "return":
        assert world.status_is("s" + world.queue, "completed")
    else:
        assert world.status_is("s" + world.queue, "failed", error=FAILURES[how])
    assert world.empty()


def test_a_blocking_call_gets_the_result_the_error_or_a_timeout(world: World) -> None:
    """`call` returns the result, raises TaskFailed with the task's text, and ReplyTimeout when nobody works."""
    dispatcher = Dispatcher(world.transport)
    with pytest.raises(ReplyTimeout, match=world.queue):
        dispatcher.call("behave", args=["return", 1], queue=world.queue, timeout=0.1)
    consumer = Consumer(world.transport, tasks, [world.queue])
    worker = threading.Thread(target=consumer.run)
    worker.start()
    try:
        assert dispatcher.call("behave", args=["return", 5], queue=world.queue, timeout=20) == 5
        with pytest.raises(TaskFailed, match="ValueError: the real reason"):
            dispatcher.call("behave", args=["raise"], queue=world.queue, timeout=20)
    finally:
        consumer.stop()
        worker.join()


def test_the_callback_carries_the_parents_org_fairness_and_priority(harness: Harness, world: World) -> None:
    """A continuation is sent for the same owner, with the same urgency, under an id derived from the parent's."""
    fairness = FairnessKey("org-7", "api", 8)
    world.transport.send(
        [
            message(
                "behave",
                world.queue,
                "return",
                1,
                org_id="org-7",
                priority=8,
                fairness=fairness,
                task_id="p",
                **world.callbacks_to(),
            )
        ]
    )
    Consumer(world.transport, tasks, [world.queue]).drain(timeout=20)
    subscription = world.transport.subscribe([world.callbacks], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=5)
    subscription.close()
    assert (delivery.org_id, delivery.priority) == ("org-7", 8)
    assert delivery.payload.fairness == fairness
    assert delivery.payload.task_id not in (None, "p")


def test_a_long_task_keeps_its_message_and_a_stopping_worker_finishes_it(world: World) -> None:
    """While a task runs for more than two leases nobody else gets its message, nor those that wait behind it.

    stop() lets it finish, run once, and gives the rest back.
    """
    lease = 0.6
    started, finish, runs = threading.Event(), threading.Event(), []

    def slow(number: int) -> int:
        runs.append(number)
        started.set()
        finish.wait(20)
        return number

    world.transport.send([message("slow", world.queue, n, reply_key=f"{n}{world.queue}") for n in range(3)])
    consumer = Consumer(world.transport, {"slow": slow}, [world.queue], lease=lease, prefetch=3)
    worker = threading.Thread(target=consumer.run)
    worker.start()
    other = None
    try:
        assert started.wait(10)
        wait_until(lambda: world.harness.left(world.transport, world.queue)[0] == 0, what="nothing waits any more")
        other = world.transport.subscribe([world.queue], lease=60)
        assert not other.receive(limit=3, wait=2.5 * lease)
        consumer.stop()
        given_back = world.harness.take(other, 2, limit=3) if world.harness.moment else other.receive(limit=3, wait=5)
    finally:
        consumer.stop()
        finish.set()
        worker.join(20)
        if other is not None:
            other.close()
    assert sorted(str(one.payload.args[0]) for one in given_back if one.payload) == ["1", "2"]
    assert runs == [0]
    assert world.answer(f"0{world.queue}") == Reply(f"0{world.queue}", "completed", result=0)
    assert consumer.counters["settled"] == 1


def test_a_drain_ends_with_its_time_although_there_is_always_more(world: World) -> None:
    """drain(timeout=0.5) on a queue that keeps refilling returns about then, with the number of tasks run."""
    ran: list[int] = []

    def again(number: int) -> None:
        ran.append(number)
        world.transport.send([message("again", world.queue, number + 1)])

    world.transport.send([message("again", world.queue, 0)])
    with timed() as elapsed:
        assert Consumer(world.transport, {"again": again}, [world.queue]).drain(timeout=0.5) == len(ran)
        assert 0.5 <= elapsed() < 1.5
    assert ran == list(range(len(ran)))
    assert len(ran) > 1
    assert world.left(1)


def test_a_drain_ends_with_its_time_although_a_message_is_not_due_yet(world: World) -> None:
    """drain(timeout=0.5) does not wait for what is delayed for longer: it returns about then, with 0."""
    world.transport.send([message("behave", world.queue, "return", delay=60)])
    with timed() as elapsed:
        assert Consumer(world.transport, tasks, [world.queue]).drain(timeout=0.5) == 0
        assert (0.5 if world.transport.capabilities.inspection else 0.0) <= elapsed() < 1.5
    assert world.left(1)


def test_a_drain_whose_time_is_up_finishes_and_settles_what_runs(world: World) -> None:
    """A task that takes longer than drain(timeout=) is settled and counted before it returns; the next is not run."""
    ran: list[str] = []

    def slow() -> str:
        time.sleep(0.8)
        ran.append("slow")
        return "paid"

    world.transport.send([message("slow", world.queue, reply_key=world.queue), message("next", world.queue)])
    consumer = Consumer(world.transport, {"slow": slow, "next": lambda: ran.append("next")}, [world.queue])
    with timed() as elapsed:
        assert consumer.drain(timeout=0.3) == 1
        assert 0.8 <= elapsed() < 3
    assert ran == ["slow"]
    assert world.answer(world.queue) == Reply(world.queue, "completed", result="paid")
    assert consumer.counters["settled"] == 1
    assert world.left(1)


def test_a_wake_that_comes_too_late_does_not_end_a_drain(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was woken and came back empty-handed has not looked for long: what arrives a moment later is run."""
    subscribe = world.transport.subscribe

    def subscribe_and_wake(*args: Any, **options: Any) -> Any:
        subscription = subscribe(*args, **options)
        subscription.wake()
        return subscription

    monkeypatch.setattr(world.transport, "subscribe", subscribe_and_wake)
    world.transport.send([message("behave", world.queue, "return", delay=0.1)])
    assert Consumer(world.transport, tasks, [world.queue]).drain(timeout=20) == 1


def test_every_message_is_run_and_settled_once_by_many_workers(world: World) -> None:
    """Several consumers with several threads each drain one queue: every message once."""
    counted: list[int] = []
    world.transport.send([message("count", world.queue, n) for n in range(500)])
    consumers = [Consumer(world.transport, {"count": counted.append}, [world.queue], concurrency=3) for _ in range(3)]
    threads = [threading.Thread(target=consumer.drain, kwargs={"timeout": 30}) for consumer in consumers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == list(range(500))
    assert sum(consumer.counters["settled"] for consumer in consumers) == 500


MISUSES: dict[str, Callable[[Any], Any]] = {
    "no queue": lambda transport: Consumer(transport, tasks, []),
    "one string": lambda transport: Consumer(transport, tasks, "q"),
    "no tasks": lambda transport: Consumer(transport, {}, ["q"]),
    "no threads": lambda transport: Consumer(transport, tasks, ["q"], concurrency=0),
    "no lease": lambda transport: Consumer(transport, tasks, ["q"], lease=0),
    "small prefetch": lambda transport: Consumer(transport, tasks, ["q"], concurrency=4, prefetch=2),
    "no callable": lambda transport: Consumer(transport, cast(Any, {"t": 7}), ["q"]),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_consumer_that_cannot_work_is_refused_when_it_is_built(world: World, misuse: str) -> None:
    """Misconfiguration fails at start, not at the first message."""
    with pytest.raises(ConfigurationError):
        MISUSES[misuse](world.transport)
