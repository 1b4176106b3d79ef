"""What a shared test needs of a transport beyond the protocol: hooks that go behind its back."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import attrs
from pg_tables import Tables

from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core import (
    ContinuationSpec,
    Delivery,
    Dispatcher,
    Message,
    Reply,
    Settlement,
    TaskPayload,
    Transport,
    Verdict,
)
from unstract_core.domain import JSONValue


@attrs.frozen
class Harness:
    """A transport for a whole session; each test uses queues of its own, from `queue()`.

    `inject(transport, queue, text)` stores JSON text as a message without asking our writer. `expire(transport,
    queue)` ends every lease and delay of a queue. `forget(transport, key)` ends a reply's time to live.
    """

    name: str
    transport: Callable[[], contextlib.AbstractContextManager[Any]]
    inject: Callable[[Any, str, str], None]
    expire: Callable[[Any, str], None]
    forget: Callable[[Any, str], None]

    def queue(self) -> str:
        return queue_name()


def memory_harness() -> Harness:
    @contextlib.contextmanager
    def make() -> Iterator[MemoryTransport]:
        transport = MemoryTransport()
        try:
            yield transport
        finally:
            transport.close()

    def inject(transport: MemoryTransport, queue: str, text: str) -> None:
        transport._store.add(message("x", queue), text)

    def expire(transport: MemoryTransport, queue: str) -> None:
        for row in transport._store.rows.values():
            if row.queue == queue and row.state != "ready":
                row.due = 0.0

    def forget(transport: MemoryTransport, key: str) -> None:
        reply, result, _ = transport._store._replies[key]
        transport._store._replies[key] = (reply, result, 0.0)

    return Harness("memory", make, inject, expire, forget)


def postgres_harness(url: str, schema: str, *, listen: bool) -> Harness:
    tables = Tables(url, schema)
    shared: list[PostgresTransport] = []

    @contextlib.contextmanager
    def make() -> Iterator[PostgresTransport]:
        transport = PostgresTransport(url, schema, listen, poll_interval=0.2)
        if not shared:
            transport.migrate()
            shared.append(transport)
        try:
            yield transport
        finally:
            transport.close()

    def inject(transport: object, queue: str, text: str) -> None:
        tables.inject(queue, text)

    def expire(transport: object, queue: str) -> None:
        tables.execute(
            "UPDATE {messages} SET vt = now() - interval '1 second' WHERE queue_name = %s AND state = 'claimed'", queue
        )

    def forget(transport: object, key: str) -> None:
        tables.execute("UPDATE {results} SET expires_at = now() WHERE task_id = %s", key)

    return Harness("postgres", make, inject, expire, forget)


def queue_name() -> str:
    """Return the name of a queue that nobody else uses."""
    return f"q-{uuid.uuid4().hex[:12]}"


def message(task_name: str, queue: str, *args: Any, **options: Any) -> Message:
    """Return a message whose payload has these args; what is not a Message's own goes into the payload."""
    own = {name: options.pop(name) for name in ("org_id", "priority", "delay") if name in options}
    return Message(TaskPayload(task_name=task_name, args=list(args), queue=queue, **options), queue, **own)


def then(task_name: str, queue: str, **kwargs: Any) -> ContinuationSpec:
    return ContinuationSpec(task_name=task_name, kwargs=kwargs, queue=queue)


def receive_all(transport: Transport, queue: str, *, lease: float = 60.0) -> list[Delivery]:
    """Take everything that is ready in a queue, as a worker that never comes back."""
    subscription = transport.subscribe([queue], lease=lease)
    try:
        return list(subscription.receive(limit=10_000, wait=0))
    finally:
        subscription.close()


def answer(transport: Transport, *replies: Reply) -> None:
    """Settle a message with each reply, one after the other, as workers would."""
    queue = queue_name()
    subscription = transport.subscribe([queue], lease=60.0)
    for reply in replies:
        transport.send([message("t", queue)])
        (delivery,) = subscription.receive(limit=1, wait=5)
        assert list(subscription.settle([Settlement(delivery, Verdict.ACK, reply=reply)])) == [True]
    subscription.close()


def bury(transport: Transport, queue: str, reason: str = "because", *, result: JSONValue = None) -> None:
    """Bury everything that is ready in a queue, one after the other in the order in which it is received."""
    subscription = transport.subscribe([queue], lease=60.0)
    for delivery in subscription.receive(limit=10_000, wait=0):
        assert subscription.settle([Settlement(delivery, Verdict.BURY, reason=reason, result=result)]) == [True]
    subscription.close()


def stored(delivery: Delivery) -> Any:
    """Return what the transport stored, parsed."""
    return json.loads(delivery.raw) if isinstance(delivery.raw, str | bytes) else delivery.raw


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a clock that tells the seconds since here."""
    started = time.monotonic()
    yield lambda: time.monotonic() - started


USES: dict[str, Callable[[Any], Any]] = {
    "send": lambda transport: transport.send([message("t", "q")]),
    "reply": lambda transport: transport.reply("key"),
    "waiting reply": lambda transport: transport.reply("key", timeout=1),
    "call": lambda transport: Dispatcher(transport).call("t", queue="q", timeout=1),
    "subscribe": lambda transport: transport.subscribe(["q"], lease=1),
    "queues": lambda transport: transport.queues(),
    "find dead letters": lambda transport: transport.dead.find(),
    "get dead letters": lambda transport: transport.dead.get(["1"]),
    "replay": lambda transport: transport.dead.replay(["1"]),
    "purge": lambda transport: transport.dead.purge(),
}
"""Every call that a transport offers, by name."""
