"""examples/broker.py: it counts the messages in a broker's queues, and deletes the queues of a run."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import kombu
import pytest

from examples import broker
from examples.broker import own_queues, states, waiting


@pytest.fixture(params=["rabbitmq", "inside"])
def url(request: pytest.FixtureRequest) -> str:
    """Each kind of broker: a real one, and kombu's own in this process."""
    if request.param == "rabbitmq":
        real: str = request.getfixturevalue("rabbitmq_url")
        return real
    return "celery+memory://test-broker"


@pytest.fixture
def connection(url: str) -> Iterator[Any]:
    """A connection of kombu's."""
    with kombu.Connection(url.removeprefix("celery+")) as connection:
        yield connection


@pytest.fixture
def queue(url: str) -> Iterator[str]:
    """The name of a queue, which is deleted at the end."""
    name = f"q-{uuid.uuid4().hex[:12]}"
    with contextlib.nullcontext() if url.startswith("celery+") else own_queues(url, [name]):
        yield name


def put(connection: Any, queue: str, count: int) -> None:
    kombu.Queue(queue, kombu.Exchange(queue), queue)(connection.channel()).declare()
    with connection.channel() as channel:
        for _ in range(count):
            kombu.Producer(channel).publish({}, routing_key=queue)


def test_messages_and_dead_letters_are_counted(url: str, connection: Any, queue: str) -> None:
    """Messages and dead letters are counted, and stay in their queues."""
    put(connection, queue, 2)
    put(connection, f"{queue}.dead", 1)
    for _ in range(2):
        (state,) = states(url, [queue])
        assert (state.queue, state.ready, state.dead) == (queue, 2, 1)
        assert waiting(url, queue) == 2


def test_queue_without_dead_letters_has_zero(url: str, connection: Any, queue: str) -> None:
    """A queue without a dead-letter queue has zero dead letters, and counting creates no queue."""
    put(connection, queue, 0)
    (state,) = states(url, [queue])
    assert (state.ready, state.dead) == (0, 0)
    with pytest.raises(connection.channel_errors):
        connection.channel().queue_declare(f"{queue}.dead", passive=True)


def test_missing_queue_is_omitted(url: str, queue: str) -> None:
    """The state of a missing queue is unknown, which is not the same as empty."""
    assert states(url, [queue]) == []


@pytest.mark.parametrize("url", ["rabbitmq"], indirect=True)
def test_queues_of_a_run_are_deleted(url: str, connection: Any, queue: str) -> None:
    """The queues of a run are deleted with their messages and dead letters, and other queues stay."""
    own = f"q-{uuid.uuid4().hex[:12]}"
    put(connection, queue, 1)
    with own_queues(url, [own]):
        put(connection, own, 1)
        put(connection, f"{own}.dead", 1)
        (state,) = states(url, [own])
        assert (state.ready, state.dead) == (1, 1)
    assert states(url, [own]) == []
    assert waiting(url, f"{own}.dead") == 0
    assert waiting(url, queue) == 1


@pytest.mark.parametrize("url", ["rabbitmq"], indirect=True)
def test_queue_with_a_consumer_is_omitted(
    url: str, connection: Any, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue with a consumer is omitted, because the messages that the consumer has are not counted."""
    monkeypatch.setattr(broker, "_PATIENCE", 0.3)
    put(connection, queue, 1)
    with kombu.Connection(url) as other:
        held: list[Any] = []
        with other.Consumer([kombu.Queue(queue, no_declare=True)], on_message=held.append):
            other.drain_events(timeout=5)
            assert held
            assert states(url, [queue]) == []
    (state,) = states(url, [queue])
    assert state.ready == 1
