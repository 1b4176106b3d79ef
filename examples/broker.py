"""A message broker for the demo: RabbitMQ if one answers, else kombu's own broker inside this process.

A run uses its own queues, and deletes them with their dead letters; other queues are never touched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import attrs
import kombu
from amqp.exceptions import AMQPError, ChannelError, NotFound

from examples.place import Place
from examples.processes import WorkerProcesses
from examples.product import Queues
from examples.threads import WorkerThreads
from examples.workers import Workers
from unstract_core import ConfigurationError, TransportUnavailable, load_transport
from unstract_core.transport import QueueState

BROKER_VARIABLE = "UNSTRACT_WIRE_BROKER"
DEFAULT_BROKER = "amqp://guest:guest@127.0.0.1:5672//"

_PORTS = {"amqp": 5672, "pyamqp": 5672, "amqps": 5671}
_PATIENCE = 5.0
"""Seconds in which a broker has to answer."""


@attrs.frozen
class Broker:
    """A broker that was found.

    Attributes:
        url: The URL of the transport.
        description: A text for people, without a password.
        inside: Whether the broker is inside this process, where another process cannot reach it.
    """

    url: str = attrs.field(repr=False)
    description: str
    inside: bool


def broker_url() -> str:
    """Return the URL of RabbitMQ, whether it answers or not."""
    return os.environ.get(BROKER_VARIABLE) or DEFAULT_BROKER


def find_broker() -> Broker:
    """Return RabbitMQ, or kombu's own broker if no server listens.

    Raises:
        ConfigurationError: The URL is invalid.
        TransportUnavailable: The server is not a broker, or rejects the login.
    """
    url = broker_url()
    host, port, where = _address(url)
    if not _listens(host, port):
        description = f"no broker answers at {where}: kombu's own, inside this process, with the workers on threads"
        return Broker(f"celery+memory://demo-{uuid.uuid4().hex[:8]}", description, inside=True)
    with _connected(url, "connect to the broker") as connection:
        said = connection.connection.server_properties
    return Broker(url, f"{said.get('product', 'a broker')} {said.get('version', '')} at {where}", inside=False)


@contextlib.contextmanager
def on_broker(scratch: Path) -> Iterator[Place]:
    """Yield a place on the broker, and delete its queues afterwards; raises the errors of `find_broker`."""
    broker = find_broker()
    queues = Queues.of_run(uuid.uuid4().hex[:8])
    with contextlib.ExitStack() as cleanup:
        if not broker.inside:  # queues inside this process end with it
            cleanup.enter_context(own_queues(broker.url, queues.names))
        transport = cleanup.enter_context(contextlib.closing(load_transport(broker.url)))
        transport.subscribe(queues.names, lease=_PATIENCE).close()  # declares the queues
        yield Place(
            facts=[
                ("broker", broker.description),
                ("queues", "this run's own, counted by declaring them passively: a broker has no inspection"),
            ],
            queues=queues,
            transport=transport,
            workers=functools.partial(_workers, broker),
            left=lambda: states(broker.url, queues.names),
        )


def _workers(broker: Broker, directory: Path, environment: Mapping[str, str]) -> Workers:
    if broker.inside:
        return WorkerThreads(broker.url, environment)
    return WorkerProcesses(broker.url, directory, environment)


@contextlib.contextmanager
def own_queues(url: str, names: Sequence[str]) -> Iterator[None]:
    """Delete the queues with their dead letters and exchanges at the end; raises TransportUnavailable."""
    try:
        yield
    finally:
        with _connected(url, f"delete the queues {', '.join(names)}") as connection:
            for name in (*names, *map(_dead, names)):
                connection.default_channel.queue_delete(name)
                connection.default_channel.exchange_delete(name)


def waiting(url: str, queue: str) -> int:
    """Return the number of messages in a queue; 0 if there is no such queue."""
    with _connected(url, f"count queue {queue}") as connection:
        messages, _ = _counts(connection, queue) or (0, 0)
        return messages


def states(url: str, queues: Sequence[str]) -> list[QueueState]:
    """Count the messages and dead letters in queues without a consumer.

    A broker does not report messages in flight, but without a consumer there are none. A queue that has a consumer, or
    does not exist, is omitted.
    """
    found = []
    with _connected(url, "count the messages in the queues") as connection:
        deadline = time.monotonic() + _PATIENCE
        for queue in queues:
            while (counts := _counts(connection, queue)) is not None and counts[1] and time.monotonic() < deadline:
                time.sleep(0.05)
            if counts is not None and not counts[1]:
                dead, _ = _counts(connection, _dead(queue)) or (0, 0)
                found.append(QueueState(queue, ready=counts[0], in_flight=0, delayed=0, oldest=None, dead=dead))
    return found


def _counts(connection: Any, queue: str) -> tuple[int, int] | None:
    """Return the numbers of messages and of consumers of a queue; None if it does not exist."""
    channel = connection.channel()
    try:
        declared = channel.queue_declare(queue, passive=True)
    except ChannelError as exc:
        if int(exc.reply_code) != NotFound.code:
            raise
        return None
    finally:
        channel.close()
    return declared.message_count, declared.consumer_count


def _dead(queue: str) -> str:
    return f"{queue}.dead"


def _address(url: str) -> tuple[str, int, str]:
    """Return the host, the port, and the URL without its credentials.

    Raises:
        ConfigurationError: The URL is invalid; the text quotes no part of it, because any part may be a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError:
        raise ConfigurationError(
            f"{BROKER_VARIABLE} cannot be parsed; expected amqp://user:password@host:5672/vhost, "
            "with the / ? # @ of a password written as %2F %3F %23 %40"
        ) from None
    if ";" in url:
        raise ConfigurationError(f"{BROKER_VARIABLE} names several brokers, and the demo works on one")
    if parts.scheme not in _PORTS:
        raise ConfigurationError(
            f"{BROKER_VARIABLE} is not an amqp:// URL, and the demo works on RabbitMQ: change it, or unset it"
        )
    port = port or _PORTS[parts.scheme]
    return host, port, f"{parts.scheme}://{host}:{port}{parts.path}"


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _connected(url: str, doing: str) -> Iterator[Any]:
    """Connect to the broker of a transport's URL; raises TransportUnavailable with the broker's text."""
    address, _, query = url.removeprefix("celery+").partition("?")
    kombus = urlencode([(name, value) for name, value in parse_qsl(query) if name.startswith("ssl_")])
    limits = {"read_timeout": _PATIENCE, "write_timeout": _PATIENCE}
    try:
        with kombu.Connection(f"{address}?{kombus}", connect_timeout=_PATIENCE, transport_options=limits) as connection:
            connection.connect()
            yield connection
    except (AMQPError, OSError) as exc:
        said = getattr(exc, "reply_text", None) or exc
        raise TransportUnavailable(f"cannot {doing}: {said} ({BROKER_VARIABLE} names the broker)") from exc
