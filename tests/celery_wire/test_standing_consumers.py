"""A busy subscription stays a consumer of its queues, and blocks no message."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from celery_wire.support import ALIVE, Pipe
from consumers import running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport, delayed_messages
from unstract_core import Consumer, Delivery, Settlement, Verdict

pytestmark = pytest.mark.usefixtures("tidy")

Make: TypeAlias = Callable[..., CeleryTransport]

QUORUM = {"x-queue-type": "quorum"}
SHORT = {"x-expires": 700}
KINDS = pytest.mark.parametrize("kind", [{}, QUORUM], ids=["classic", "quorum"])


class Gate:
    """A task that returns at once, except for the arguments given to the constructor, for which it waits."""

    def __init__(self, *waiting: Any) -> None:
        self.ran: list[Any] = []
        self.go = threading.Event()
        self._waiting = waiting

    def __call__(self, value: Any) -> None:
        self.ran.append(value)
        if value in self._waiting:
            assert self.go.wait(ALIVE)

    def wait_for(self, *values: Any) -> None:
        wait_until(lambda: set(values) <= set(self.ran), timeout=ALIVE, what=f"{values} to be run")


@pytest.mark.parametrize(
    ("arguments", "prefetch"),
    [(SHORT, None), (SHORT, 1), ({**SHORT, **QUORUM}, None), (None, None)],
    ids=["classic", "classic-one", "quorum", "auto-delete"],
)
def test_an_expiring_queue_outlives_a_long_task(
    make_celery: Make, pipe: Pipe, arguments: dict[str, Any] | None, prefetch: int | None
) -> None:
    """Neither of two queues with `x-expires` is deleted while the only thread is busy, and every message runs."""
    names, task = [queue_name(), queue_name()], Gate("long")
    if arguments is None:
        for name in names:
            pipe._channel.queue_declare(name, durable=True, auto_delete=True)
    transport = make_celery(queue_arguments=arguments or {}, declare=arguments is not None)
    with running(Consumer(transport, {"t": task}, names, prefetch=prefetch)):
        transport.send([message("t", names[0], n) for n in range(100)] + [message("t", names[0], "long")])
        transport.send([message("t", names[n % 2], n) for n in range(100, 120)])
        task.wait_for("long")
        time.sleep(2 * SHORT["x-expires"] / 1000)
        assert all(pipe.consumers(name) for name in names)
        task.go.set()
        task.wait_for(*range(120))
    assert len(task.ran) == 121


@KINDS
def test_a_busy_single_active_consumer_stays_active(make_celery: Make, pipe: Pipe, kind: dict[str, Any]) -> None:
    """The other worker of such a queue gets nothing before the first one leaves, with known and unknown arguments."""
    arguments = {"x-single-active-consumer": True, **kind}
    queue, first, second = pipe.declare(queue_name(), **arguments), Gate("long"), Gate()
    known, unknown = make_celery(queue_arguments=arguments), make_celery(declare=False)
    for transport in (known, unknown):
        first.ran.clear()
        first.go.clear()
        transport.send([message("t", queue, n) for n in range(30)] + [message("t", queue, "long")])
        transport.send([message("t", queue, n) for n in range(30, 40)])
        with running(Consumer(transport, {"t": first}, [queue])):
            first.wait_for(0)
            with running(Consumer(transport, {"t": second}, [queue])):
                first.wait_for("long")
                time.sleep(0.5)
                assert second.ran == []
                first.go.set()
                first.wait_for(*range(40))
        assert second.ran == []
        assert first.ran == [*range(30), "long", *range(30, 40)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_delays_block_no_single_active_consumer(make_celery: Make, pipe: Pipe, known: bool) -> None:
    """The delayed messages that are due last are sent again, so that others can be received."""
    arguments = {"x-single-active-consumer": True}
    queue, task = pipe.declare(queue_name(), **arguments), Gate()
    transport = make_celery(queue_arguments=arguments if known else {}, declare=known)
    transport.send([message("t", queue, f"later-{n}", delay=3600) for n in range(3)] + [message("t", queue, "now")])
    with running(Consumer(transport, {"t": task}, [queue])):
        task.wait_for("now")
    assert (task.ran, pipe.count(queue)) == (["now"], 3)


@KINDS
def test_messages_behind_a_long_task_move_on(make_celery: Make, pipe: Pipe, kind: dict[str, Any]) -> None:
    """Messages behind a long task go to an idle worker, which was there before or comes later."""
    names, busy, idle = [pipe.declare(queue_name(), **kind) for _ in range(3)], Gate("long"), Gate()
    transport = make_celery(queue_arguments=kind)
    transport.send([message("t", names[0], n) for n in range(50)])
    with running(Consumer(transport, {"t": busy}, names)):
        busy.wait_for(*range(50))
        transport.send([message("t", names[0], "long")])
        busy.wait_for("long")
        transport.send([message("t", names[n % 3], n) for n in range(100, 130)])
        time.sleep(0.3)
        with running(Consumer(transport, {"t": idle}, names)):
            idle.wait_for(*range(100, 130))
            transport.send([message("t", names[n % 3], n) for n in range(130, 160)])
            idle.wait_for(*range(130, 160))
        busy.go.set()
    assert sorted(idle.ran) == list(range(100, 160))


@KINDS
def test_a_subscription_without_demand_stays_a_consumer(make_celery: Make, pipe: Pipe, kind: dict[str, Any]) -> None:
    """With limit=0 messages go to another consumer, and arrive as soon as the limit is higher."""
    arguments = {**SHORT, **kind}
    queue, transport = queue_name(), make_celery(queue_arguments=arguments)
    with (
        contextlib.closing(transport.subscribe([queue], lease=60)) as idle,
        contextlib.closing(transport.subscribe([queue], lease=60)) as other,
    ):
        assert list(idle.receive(limit=0, wait=2 * SHORT["x-expires"] / 1000)) == []
        assert pipe.consumers(queue) == 1
        transport.send([message("t", queue, n) for n in range(5)])
        numbers: list[Any] = []
        deadline = time.monotonic() + ALIVE
        while len(numbers) < 5 and time.monotonic() < deadline:
            assert list(idle.receive(limit=0, wait=0.05)) == []
            taken = other.receive(limit=2, wait=0.05)
            other.settle([Settlement(one, Verdict.ACK) for one in taken])
            numbers += [delivery.payload.args[0] for delivery in taken if delivery.payload is not None]
        assert sorted(numbers) == list(range(5))
        other.close()
        transport.send([message("t", queue, "mine")])
        assert [delivery.payload.args for delivery in idle.receive(limit=1, wait=ALIVE) if delivery.payload] == [
            ["mine"]
        ]


STEPS = st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(0, 7), st.booleans()), min_size=3, max_size=12)


@pytest.mark.parametrize("kind", [{}, QUORUM], ids=["classic", "quorum"])
@given(steps=STEPS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_demand_receives_each_message_once(
    make_celery: Make, pipe: Pipe, kind: dict[str, Any], steps: list[tuple[int, int, bool]]
) -> None:
    """Two subscriptions with any demands in any order receive each message exactly once."""
    names = [pipe.declare(queue_name(), **kind) for _ in range(2)]
    transport = make_celery(queue_arguments=kind)
    transport.send([message("t", names[n % 2], n) for n in range(40)])
    both = [transport.subscribe(names, lease=60) for _ in range(2)]
    numbers: list[Any] = []

    def receive(number: int, limit: int, pause: bool) -> None:
        taken = both[number].receive(limit=limit, wait=0.06 if pause else 0)
        assert len(taken) <= limit
        numbers.extend(delivery.payload.args[0] for delivery in taken if delivery.payload is not None)
        assert all(both[number].settle([Settlement(one, Verdict.ACK) for one in taken]))

    for step in steps:
        receive(*step)
    deadline = time.monotonic() + ALIVE
    while len(numbers) < 40 and time.monotonic() < deadline:
        receive(0, 9, True)
        receive(1, 0, False)
    for one in both:
        one.close()
    assert sorted(numbers) == list(range(40))
    assert [pipe.count(name) for name in names] == [0, 0]


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_delayed_messages_open_few_consumers(make_celery: Make, pipe: Pipe, mixed: bool) -> None:
    """Many delayed messages of a quorum queue open few consumers, also if every second message is due."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport, task = make_celery(queue_arguments=QUORUM), Gate()
    for number in range(150):
        later = message("t", queue, "later", delay=3600)
        transport.send([later, message("t", queue, number)] if mixed or number == 149 else [later])
    with running(Consumer(transport, {"t": task}, [queue])):
        task.wait_for(149)
        wait_until(lambda: pipe.consumers(queue) <= 40, timeout=ALIVE, what="those without messages to be gone")
    wait_until(lambda: pipe.count(queue) == 150, timeout=ALIVE, what="each to be there once")


@KINDS
def test_too_many_delayed_messages_block_no_other(
    make_celery: Make,
    pipe: Pipe,
    kind: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beyond the limit the messages that are due last are sent again, with one WARNING, and none is lost."""
    monkeypatch.setattr(delayed_messages, "_MAX_DELAYED", 30)
    monkeypatch.setattr(delayed_messages, "_RESEND_BATCH", 10)
    queue, task = pipe.declare(queue_name(), **kind), Gate()
    transport = make_celery(queue_arguments=kind)
    transport.send([message("t", queue, f"later-{n}", delay=3600 + n) for n in range(100)])
    transport.send([message("t", queue, "now")])
    consumer = Consumer(transport, {"t": task}, [queue])
    with running(consumer):
        task.wait_for("now")
        warnings = [record for record in caplog.records if vars(record).get("wire.event") == "too_many_delayed"]
        assert [record.levelname for record in warnings] == ["WARNING"]
    assert task.ran == ["now"]
    bodies = [message.args[0] for message in pipe.take(queue, 100)]
    assert sorted(bodies) == sorted(f"later-{n}" for n in range(100))


def test_acknowledged_messages_survive_a_close(make_celery: Make, pipe: Pipe) -> None:
    """A worker that stops waits until a quorum queue has processed all acknowledgements."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport = make_celery(queue_arguments=QUORUM)
    transport.send([message("t", queue, number) for number in range(400)])
    worker, taken = transport.subscribe([queue], lease=60), list[Delivery]()
    while len(taken) < 400:
        taken += worker.receive(limit=400 - len(taken), wait=10)
    assert all(worker.settle([Settlement(one, Verdict.ACK) for one in taken]))
    worker.close()
    time.sleep(0.5)
    assert pipe.count(queue) == 0
