"""A message that was never started counts no attempt, after any number of deliveries."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from celery_wire.support import ALIVE, Pipe, received
from consumers import running
from proxy import Proxy
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport
from unstract_core import Consumer, Delivery, Settlement, TransportUnavailable, Verdict

pytestmark = pytest.mark.usefixtures("tidy")

Make: TypeAlias = Callable[..., CeleryTransport]

QUORUM = {"x-queue-type": "quorum"}


def waiting(inside: Any, number: int) -> bool:
    """Whether so many messages wait in a consumer for their time."""
    return len(inside._subscription._delayed) == number


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_delay_counts_no_attempt_at_a_stop(make_celery: Make, pipe: Pipe, known: bool) -> None:
    """A delayed message of a quorum queue is delivered as its first attempt after several orderly stops."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport = make_celery(queue_arguments=QUORUM if known else {}, declare=known)
    ends = time.monotonic() + 2
    transport.send([message("t", queue, "later", delay=3), message("t", queue, "later", delay=3)])
    stops = 0
    while stops < 6 and (stops < 1 or time.monotonic() < ends):
        consumer = Consumer(transport, {"t": print}, [queue], never_rerun=known)
        with running(consumer):
            inside: Any = consumer._running
            wait_until(functools.partial(waiting, inside, 2), timeout=ALIVE, what="both to wait there")
        assert (consumer.counters["ran"], consumer.counters["buried"]) == (0, 0)
        stops += 1
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        assert [delivery.attempt for delivery in received(subscription, 2)] == [1, 1]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_prefetched_messages_count_no_attempt(make_celery: Make, pipe: Pipe, known: bool) -> None:
    """A stop during a task counts no attempt for the prefetched messages of a quorum queue."""
    queue, started = pipe.declare(queue_name(), **QUORUM), list[Any]()
    transport = make_celery(queue_arguments=QUORUM if known else {}, declare=known)
    transport.send([message("t", queue, n) for n in range(20)])
    for expected in range(1, 4):
        running_now: list[Consumer] = []

        def begin(number: Any, running_now: list[Consumer] = running_now) -> None:
            started.append(number)
            running_now[0].stop()

        running_now.append(Consumer(transport, {"t": begin}, [queue], prefetch=5))
        running_now[0].run()
        assert len(started) == expected
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        assert {delivery.attempt for delivery in received(subscription, 17)} == {1}


def test_an_unknown_queue_type_counts_no_release(make_celery: Make, pipe: Pipe) -> None:
    """A message of an undeclared quorum queue stays at its first attempt after several releases."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport = make_celery(declare=False)
    transport.send([message("t", queue)])
    attempts = []
    for _ in range(4):
        with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
            (delivery,) = received(subscription)
            attempts.append(delivery.attempt)
            assert subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)]) == [True]
    assert attempts == [1, 1, 1, 1]


def test_a_released_bad_message_stays_bad(make_celery: Make, pipe: Pipe) -> None:
    """A message of a quorum queue with an unreadable eta is not run without it after a release."""
    queue = pipe.declare(queue_name(), **QUORUM)
    pipe.put(queue, "[[], {}, {}]", {"task": "t", "id": "bad", "eta": "soon"})
    transport, problems = make_celery(queue_arguments=QUORUM), list[str | None]()
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        for _ in range(2):
            (delivery,) = received(subscription)
            problems.append(delivery.problem)
            assert subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)]) == [True]
    assert problems == 2 * ["the header 'eta' is no ISO 8601 moment"]


def test_unstarted_messages_are_forgotten_in_order(
    make_celery: Make, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of unstarted messages keeps a limited number of them, for an hour."""
    monkeypatch.setattr("transports.celery.message_reader._MAX_UNSTARTED", 3)
    with contextlib.closing(make_celery().subscribe([queue], lease=60)) as opened:
        subscription: Any = opened
        for number in range(5):
            subscription._reader.note_unstarted((f"m{number}", 0))
        assert [key for key, _ in subscription._reader._unstarted] == ["m2", "m3", "m4"]
        monkeypatch.setattr("transports.celery.message_reader._UNSTARTED_TTL", 0.0)
        subscription._reader.note_unstarted(("m5", 0))
        assert [key for key, _ in subscription._reader._unstarted] == ["m5"]


def test_a_consumer_counts_only_waiting_messages(make_celery: Make, queue: str) -> None:
    """Delayed messages that are due do not raise the demand on the broker."""
    transport = make_celery()
    transport.send([message("t", queue, delay=0.5), message("t", queue, delay=0.5)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as opened:
        subscription: Any = opened
        deliveries: list[Delivery] = []
        most = 0
        while len(deliveries) < 2:
            deliveries += subscription.receive(limit=2, wait=0.1)
            consumers = subscription._connection.consumers
            counted = sum(consumer.waiting for consumer in (consumers._standing[queue], *consumers._extra[queue]))
            most = max(most, counted)
        assert most > 0
        assert counted == 0
        subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in deliveries])


def test_a_classic_queue_keeps_released_messages_first(make_celery: Make, pipe: Pipe) -> None:
    """A classic queue that is declared elsewhere delivers released messages first if its type is given."""
    queue = pipe.declare(queue_name())
    transport = make_celery(declare=False, queue_arguments={"x-queue-type": "classic"})
    transport.send([message("t", queue, n) for n in range(3)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        (first,) = received(subscription)
        assert subscription.settle([Settlement(first, Verdict.RETRY, counted=False)]) == [True]
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        deliveries = received(subscription, 3)
        assert [delivery.payload.args[0] for delivery in deliveries if delivery.payload] == [0, 1, 2]


def test_a_broken_connection_counts_no_delayed_attempt(through: Make, between: Proxy, pipe: Pipe) -> None:
    """A delayed message of a quorum queue is delivered as its first attempt after broken connections."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport = through(queue_arguments=QUORUM)
    ends, cuts = time.monotonic() + 1, 0
    transport.send([message("t", queue, delay=2) for _ in range(3)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        while cuts < 3 and (cuts < 1 or time.monotonic() < ends):
            while len(subscription._delayed) < 3:
                with contextlib.suppress(TransportUnavailable):
                    assert not subscription.receive(limit=3, wait=0.1)
            between.cut()
            cuts += 1
        assert [delivery.attempt for delivery in received(subscription, 3)] == [1, 1, 1]


def test_a_started_message_counts_its_attempts(through: Make, between: Proxy, pipe: Pipe) -> None:
    """A delivery of a quorum queue that was started and lost counts as an attempt."""
    queue = pipe.declare(queue_name(), **QUORUM)
    transport = through(queue_arguments=QUORUM)
    transport.send([message("t", queue)])
    for attempt in (1, 2, 3):
        with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
            (delivery,) = received(subscription)
            assert delivery.attempt == attempt
            between.cut()
