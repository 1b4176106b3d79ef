"""The Celery transport behind what the shared tests need of it: over RabbitMQ, Redis, or kombu's broker in the process.

What goes behind its back here is plain kombu, which knows nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import kombu
from harness import Harness, issued

from transports.celery import CeleryTransport
from transports.celery.subscription import CelerySubscription
from unstract_core import TaskPayload
from unstract_core.payload import DEFAULT_PRIORITY

CLASSIC = {
    "order across queues": "a broker orders each queue by itself, and sends from all of them at once",
    "crashes are counted": "only a quorum queue counts the deliveries that nobody acknowledged",
}
"""What no flag of Capabilities names, and a broker lacks."""

QUORUM = {"order across queues": CLASSIC["order across queues"]}

_KNOWN = {"task_name", "args", "kwargs", "queue", "fairness", "reply_key", "task_id", "on_success", "on_error"}


class Watched(CeleryTransport):
    """Remembers its subscriptions, so that their connections can be cut."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.subscriptions: list[CelerySubscription] = []

    def subscribe(self, *args: Any, **options: Any) -> CelerySubscription:
        self.subscriptions.append(super().subscribe(*args, **options))
        return self.subscriptions[-1]


@contextlib.contextmanager
def celery_harness(url: str, *, lacks: Mapping[str, str] = CLASSIC, moment: float, **options: Any) -> Iterator[Harness]:
    """Yield the harness of a broker, whose queues are deleted when no transport is open any more."""
    opened: list[CeleryTransport] = []
    with contextlib.closing(_Behind(url, **options)) as behind:

        @contextlib.contextmanager
        def make() -> Iterator[Watched]:
            transport = Watched(url, **options)
            opened.append(transport)
            try:
                yield transport
            finally:
                transport.close()
                opened.remove(transport)
                if not opened:
                    behind.delete_queues()

        yield Harness(
            "celery",
            make,
            behind.inject,
            cut,
            forget,
            left=behind.left,
            normal=with_id,
            moment=moment,
            lacks=lacks,
            names=keeps_the_name,
        )


def with_id(payload: TaskPayload, queue: str, id: str) -> TaskPayload:
    """Return the normal form of Celery's wire: every task has an id, a fresh UUID where it was sent without one.

    It is the reply key where there is one. The queue is the one that it came from: the message does not name it.
    """
    if payload.task_id is None:
        assert id == payload.reply_key or uuid.UUID(id).version == 4
    return attrs.evolve(payload, queue=queue, task_id=payload.task_id or id)


def keeps_the_name(queue: str) -> bool:
    """RabbitMQ drops line breaks and takes 255 bytes, of which five are for the queue of the dead letters."""
    return not set("\0\r\n") & set(queue) and len(queue.encode()) <= 250


def cut(transport: Watched, queue: str) -> None:
    """Cut the connection of everyone who may hold a message of the queue: that is what ends a claim on AMQP."""
    for subscription in transport.subscriptions:
        live = subscription._link._live
        if queue in subscription._queues and live is not None and live[0].amqp:
            live[0].connection.connection.sock.shutdown(socket.SHUT_RDWR)


def forget(transport: CeleryTransport, key: str) -> None:
    with transport._inbox._changed:
        transport._inbox._awaited[key].until = 0.0


class _Behind:
    """A connection of the tests' own, opened when it is first needed."""

    def __init__(self, url: str, **options: Any) -> None:
        self._queues = CeleryTransport(url, **options)._settings
        self._connection = kombu.Connection(url, transport_options={"confirm_publish": True})
        self._deleted = len(issued)

    def inject(self, transport: CeleryTransport, queue: str, text: str) -> None:
        """Publish the wire's JSON as Celery would say it; what is no object is the whole body."""
        wire = json.loads(text)
        headers: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        body = wire
        if isinstance(wire, dict):
            headers, properties, body = _as_celery_says_it(wire)
        if properties.get("correlation_id"):
            transport._inbox.expect([properties["correlation_id"]])
            properties["reply_to"] = transport._inbox.address
        if self._queues.keeps_priorities(queue):
            properties["priority"] = DEFAULT_PRIORITY
        producer = kombu.Producer(self._connection.default_channel, serializer="json")
        producer.publish(
            body, exchange="", routing_key=queue, headers=headers, declare=[self._queues.queue(queue)], **properties
        )

    def left(self, transport: object, queue: str) -> tuple[int, int]:
        """Return how many messages wait in the queue; of what consumers hold a broker tells nothing."""
        channel = self._connection.channel()
        try:
            return int(channel.queue_declare(queue, passive=True).message_count), 0
        except self._connection.channel_errors:  # there is no such queue
            return 0, 0
        finally:
            channel.close()

    def delete_queues(self) -> None:
        """Delete every queue whose name was given out since this was last called, with its exchange and letters."""
        names, self._deleted = issued[self._deleted :], len(issued)
        channel = self._connection.channel()
        for name in [one + suffix for one in names for suffix in ("", ".dead")]:
            with contextlib.suppress(KeyError):  # kombu's own brokers know no queue that was never declared
                channel.queue_delete(name)
                channel.exchange_delete(name)
        channel.close()

    def close(self) -> None:
        self._connection.release()


def _as_celery_says_it(wire: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    headers = {name: value for name, value in wire.items() if name not in _KNOWN}
    headers |= {"lang": "py", "id": wire.get("task_id") or wire.get("reply_key") or str(uuid.uuid4())}
    if "task_name" in wire:
        headers["task"] = wire["task_name"]
    if wire.get("fairness") is not None:
        headers["x-fairness-key"] = wire["fairness"]
    embed = {
        name: [_signature(wire[ours])] if wire.get(ours) else None
        for name, ours in (("callbacks", "on_success"), ("errbacks", "on_error"))
    }
    properties = {"correlation_id": wire["reply_key"]} if "reply_key" in wire else {}
    return headers, properties, [wire.get("args", []), wire.get("kwargs", {}), {**embed, "chain": None, "chord": None}]


def _signature(continuation: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": continuation["task_name"],
        "args": [],
        "kwargs": continuation["kwargs"],
        "options": {"queue": continuation["queue"]},
        "subtask_type": None,
        "immutable": False,
    }
