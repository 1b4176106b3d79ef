"""Fixtures of the tests of Celery's wire, on the machine's own RabbitMQ."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import attrs
import brokers
import pytest
import servers
from brokers import PrivateBroker
from celery import Celery
from celery_wire.support import Bench, Pipe, callbacks, celery_app, delete_queues, real_worker
from consumers import running
from proxy import Proxy, proxy
from queues import issued, queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, Tasks

Make: TypeAlias = Callable[..., CeleryTransport]


@pytest.fixture(scope="module", autouse=True)
def no_queue_is_left() -> Iterator[None]:
    """Deletes every queue that a module's tests have named: RabbitMQ keeps a file handle for each, and has few."""
    before = len(issued)
    yield
    url = servers.machine_broker()
    if url is not None:
        delete_queues(url, issued[before:])


@pytest.fixture(scope="session")
def pipe(rabbitmq_url: str) -> Iterator[Pipe]:
    """A connection of the tests to the broker."""
    pipe = Pipe(rabbitmq_url)
    yield pipe
    pipe.close()


@pytest.fixture
def queue(pipe: Pipe) -> str:
    """An existing queue of the test."""
    return pipe.declare(queue_name())


@pytest.fixture
def make_queue(pipe: Pipe) -> Callable[[], str]:
    """A factory of existing queues."""
    return lambda: pipe.declare(queue_name())


@pytest.fixture
def make_celery(rabbitmq_url: str) -> Iterator[Callable[..., CeleryTransport]]:
    """A factory of transports, on the machine's RabbitMQ by default; closes them."""
    made: list[CeleryTransport] = []

    def make(url: str = rabbitmq_url, **options: Any) -> CeleryTransport:
        transport = CeleryTransport(url, **options)
        made.append(transport)
        return transport

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def tidy(pipe: Pipe) -> Iterator[None]:
    """Deletes every queue that a test has named, and those of its callbacks, when all else is closed."""
    before = len(issued)
    yield
    for name in issued[before:]:
        for queue in (name, callbacks(name)):
            pipe.delete(queue)


@pytest.fixture
def between(rabbitmq_url: str) -> Iterator[Proxy]:
    """A proxy before the machine's RabbitMQ; connections through it may be cut and silenced."""
    address = urlsplit(rabbitmq_url)
    with proxy(address.hostname or "127.0.0.1", address.port or 5672) as made:
        yield made


@pytest.fixture
def through(rabbitmq_url: str, between: Proxy, make_celery: Callable[..., CeleryTransport]) -> Make:
    """A factory of transports that reach the machine's RabbitMQ through the proxy."""
    return functools.partial(make_celery, brokers.behind(rabbitmq_url, between.port))


@pytest.fixture(scope="session")
def started_broker() -> Iterator[PrivateBroker]:
    """A RabbitMQ of the tests' own: a start takes seconds, so there is one for all."""
    if not brokers.installed():
        servers.miss("no rabbitmq-server is installed to start a private one from: apt-get install rabbitmq-server")
    with brokers.private_broker() as broker:
        yield broker


@pytest.fixture
def private(started_broker: PrivateBroker) -> Iterator[PrivateBroker]:
    """That RabbitMQ, which a test may stop, kill and freeze: it is up again for the next."""
    started_broker.start()
    yield started_broker
    started_broker.thaw()


@pytest.fixture
def transport(make_celery: Callable[..., CeleryTransport]) -> CeleryTransport:
    """A transport without options."""
    return make_celery()


@pytest.fixture(scope="module")
def at_work(rabbitmq_url: str, pipe: Pipe) -> Iterator[Bench]:
    """A consumer of ours, for the tests of one module."""
    bench = Bench(pipe, pipe.declare(queue_name()), "", [])
    tasks = Tasks()

    @tasks.register("note")
    def note(*args: Any, **kwargs: Any) -> str:
        bench.ran.extend(args)
        return "noted"

    transport = CeleryTransport(rabbitmq_url)
    with contextlib.closing(transport), running(Consumer(transport, tasks, [bench.queue])):
        yield bench


@pytest.fixture
def bench(at_work: Bench, pipe: Pipe, queue: str) -> Bench:
    """That consumer, with a queue of the test for its outcomes, and no dead letters of an earlier test."""
    pipe.left(f"{at_work.queue}.dead")
    return attrs.evolve(at_work, outcome_queue=queue)


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
    queue = queue_name(lasting=True)
    with real_worker(rabbitmq_url, [queue]):
        yield queue


@pytest.fixture(scope="session")
def mute_queue(rabbitmq_url: str) -> Iterator[str]:
    """The queue of a real Celery prefork worker without a result backend."""
    queue = queue_name(lasting=True)
    with real_worker(rabbitmq_url, [queue], backend=None):
        yield queue


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of kombu before another attempt, which are recorded and not made."""
    recorded: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", recorded.append)
    return recorded
