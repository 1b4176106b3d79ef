"""Fixtures of the tests of Celery's wire, on the machine's own RabbitMQ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from celery import Celery
from celery_wire.support import Bench, Pipe, celery_app, consuming, real_worker
from harness import queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, Tasks


@pytest.fixture(scope="session")
def pipe(rabbitmq_url: str) -> Iterator[Pipe]:
    """The tests' own way to the broker."""
    pipe = Pipe(rabbitmq_url)
    yield pipe
    pipe.close()


@pytest.fixture
def queue(pipe: Pipe) -> str:
    """A queue of the test's own, which is there."""
    return pipe.declare(queue_name())


@pytest.fixture
def make_queue(pipe: Pipe) -> Callable[[], str]:
    """A factory of queues that are there."""
    return lambda: pipe.declare(queue_name())


@pytest.fixture
def make_celery(rabbitmq_url: str) -> Iterator[Callable[..., CeleryTransport]]:
    """A factory of transports on the machine's RabbitMQ; closes what it made."""
    made: list[CeleryTransport] = []

    def make(**options: Any) -> CeleryTransport:
        transport = CeleryTransport(rabbitmq_url, **options)
        made.append(transport)
        return transport

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def transport(make_celery: Callable[..., CeleryTransport]) -> CeleryTransport:
    """A transport as it is without options."""
    return make_celery()


@pytest.fixture(scope="module")
def at_work(rabbitmq_url: str, pipe: Pipe) -> Iterator[Bench]:
    """A consumer of ours, for the tests of one module."""
    found = Bench(pipe, pipe.declare(queue_name()), "", [])
    tasks = Tasks()

    @tasks.register("note")
    def note(*args: Any, **kwargs: Any) -> str:
        found.ran.extend(args)
        return "noted"

    transport = CeleryTransport(rabbitmq_url)
    with contextlib.closing(transport), consuming(Consumer(transport, tasks, [found.queue])):
        yield found


@pytest.fixture
def bench(at_work: Bench, pipe: Pipe, queue: str) -> Bench:
    """That consumer, with a queue of the test's own for what it tells, and no dead letters of a test before."""
    pipe.left(f"{at_work.queue}.dead")
    return attrs.evolve(at_work, told=queue)


@pytest.fixture(scope="session")
def product(rabbitmq_url: str, pipe: Pipe) -> Iterator[Celery]:
    """A real Celery app that sends, with the result backend rpc://."""
    app = celery_app(rabbitmq_url)
    yield app
    pipe.delete(app.thread_oid)  # where its answers came to
    app.close()


@pytest.fixture(scope="session")
def worker_queue(rabbitmq_url: str) -> Iterator[str]:
    """The queue of a real Celery prefork worker with the result backend rpc://."""
    queue = queue_name()
    with real_worker(rabbitmq_url, [queue]):
        yield queue


@pytest.fixture(scope="session")
def mute_queue(rabbitmq_url: str) -> Iterator[str]:
    """The queue of a real Celery prefork worker without a result backend."""
    queue = queue_name()
    with real_worker(rabbitmq_url, [queue], backend=None):
        yield queue
