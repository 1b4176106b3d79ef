"""The Celery transport under the conformance kit: over RabbitMQ, Redis, or kombu's broker inside the process.

The harness injects messages and deletes queues through kombu, without the transport.
"""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import attrs
import kombu

from contract_tests.harness import Harness
from transports.celery.broker import Broker
from transports.celery.encode import DEAD_SUFFIX
from transports.celery.subscription import CelerySubscription
from transports.celery.transport import CeleryTransport, from_url
from unstract_core.payload import DEFAULT_PRIORITY, TaskPayload

_KNOWN = {field.name for field in attrs.fields(TaskPayload)}
_VARIANTS = {"x-queue-type=quorum": "-quorum", "x-max-priority": "-priority"}


class CeleryHarness(Harness):
    """The harness of one broker.

    Args:
        url: The URL, with queue arguments if needed: `?x-queue-type=quorum`, `?x-max-priority=10`.
    """

    moment = 0.1

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = url.partition("://")[0] + "".join(name for part, name in _VARIANTS.items() if part in url)
        with contextlib.closing(from_url(url)) as transport:
            self.capabilities = transport.capabilities
            self._settings = transport._settings
        self._connection: kombu.Connection | None = None
        self._subscriptions: dict[int, list[CelerySubscription]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.release()

    @contextlib.contextmanager
    def transport(self) -> Any:
        """Open a transport and record its subscriptions, so that their connections can be cut."""
        with contextlib.closing(from_url(self._url)) as transport:
            subscribe = transport.subscribe
            opened = self._subscriptions[id(transport)] = []

            def recording(queues: Sequence[str], *, lease: float) -> CelerySubscription:
                opened.append(subscribe(queues, lease=lease))
                return opened[-1]

            transport.subscribe = recording  # type: ignore[method-assign]  # of this instance only
            try:
                yield transport
            finally:
                del self._subscriptions[id(transport)]

    def inject(self, transport: CeleryTransport, queue: str, text: str) -> None:
        """Publish a JSON text of the wire in Celery's protocol; a text that is not an object is the whole body."""
        wire = json.loads(text)
        headers: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        body = wire
        if isinstance(wire, dict):
            headers, properties, body = _in_celerys_protocol(wire)
        if properties.get("correlation_id"):
            transport._reply_queue.expect([properties["correlation_id"]])
            properties["reply_to"] = transport._reply_queue.address
        if self._settings.keeps_priorities(queue):
            properties["priority"] = DEFAULT_PRIORITY
        producer = kombu.Producer(self._own_connection().default_channel, serializer="json")
        producer.publish(
            body, exchange="", routing_key=queue, headers=headers, declare=[self._settings.queue(queue)], **properties
        )

    def expire(self, transport: CeleryTransport, queue: str) -> None:
        """Cut every connection that may have a message of the queue: on AMQP that ends a claim."""
        _cut(
            _receiving(
                subscription for subscription in self._subscriptions[id(transport)] if queue in subscription._queues
            )
        )

    def sever(self, transport: CeleryTransport) -> bool:
        receiving = _receiving(self._subscriptions[id(transport)])
        answered = [transport._reply_queue._broker] if transport._reply_queue._broker is not None else []
        return _cut([*receiving, *answered, *transport._publishers._idle])

    def clean(self, queues: Sequence[str]) -> None:
        channel = self._own_connection().channel()
        for name in [queue + suffix for queue in queues for suffix in ("", DEAD_SUFFIX)]:
            with contextlib.suppress(KeyError):  # kombu's own brokers know no queue that was never declared
                channel.queue_delete(name)
                channel.exchange_delete(name)
        channel.close()

    def _own_connection(self) -> Any:
        """Return the connection of the harness, opened when it is needed, and again after the broker has ended it."""
        if self._connection is None or not self._connection.connected:
            self._connection = kombu.Connection(self._settings.url, transport_options={"confirm_publish": True})
        return self._connection


def _receiving(subscriptions: Iterable[CelerySubscription]) -> list[Broker]:
    return [
        subscription._connection._live[0]
        for subscription in subscriptions
        if subscription._connection._live is not None
    ]


def _cut(brokers: Iterable[Broker]) -> bool:
    """Shut down the sockets; return False if kombu emulates the broker, and there is no socket."""
    connected = [broker for broker in brokers if broker.amqp]
    for broker in connected:
        with contextlib.suppress(OSError, AttributeError):  # cut already
            broker.connection.connection.sock.shutdown(socket.SHUT_RDWR)
    return bool(connected)


def _in_celerys_protocol(wire: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    unknown = {
        f"x-{name}": value for name, value in wire.items() if name not in _KNOWN
    }  # with names that Celery does not have
    headers = {"lang": "py", "id": str(wire.get("task_id") or wire.get("reply_key") or uuid.uuid4())}
    if "task_name" in wire:
        headers["task"] = wire["task_name"]
    if wire.get("fairness") is not None:
        headers["x-fairness-key"] = wire["fairness"]
    if wire.get("headers") is not None:
        headers["x-wire-headers"] = wire["headers"]
    embed = {
        name: [_signature(wire[ours])] if wire.get(ours) else None
        for name, ours in (("callbacks", "on_success"), ("errbacks", "on_error"))
    }
    properties = {"correlation_id": str(wire["reply_key"])} if wire.get("reply_key") else {}
    return (
        headers,
        properties,
        [wire.get("args") or [], wire.get("kwargs") or {}, {**unknown, **embed, "chain": None, "chord": None}],
    )


def _signature(continuation: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": continuation["task_name"],
        "args": [],
        "kwargs": continuation.get("kwargs") or {},
        "options": {"queue": str(continuation["queue"])},
        "subtask_type": None,
        "immutable": False,
    }


def harness(url: str | None = None) -> CeleryHarness:
    """Return the harness of a broker's URL; without one, of kombu's broker inside the process."""
    return CeleryHarness("celery+memory://kit" if url is None else url)
