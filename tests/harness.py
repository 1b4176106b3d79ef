"""What a shared test needs of a transport beyond the protocol: hooks that go behind its back."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from pg_tables import Tables
from servers import wait_until

from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core import (
    ContinuationSpec,
    Delivery,
    Dispatcher,
    Message,
    Reply,
    Settlement,
    Subscription,
    TaskPayload,
    Transport,
    Verdict,
)
from unstract_core.domain import JSONValue

UNNAMED = {"order across queues", "crashes are counted"}
"""The promises that no flag of Capabilities names, though not every transport can make them."""


@attrs.frozen
class Harness:
    """A transport for a whole session; each test uses queues of its own, from `queue()`.

    `inject(transport, queue, text)` stores JSON text as a message without asking our writer. `expire(transport,
    queue)` ends every lease and delay of a queue; without leases, whatever else a claim ends with. `forget(transport,
    key)` ends a reply's time to live. `left(transport, queue)` counts what waits in a queue, and what is held, as far
    as that can be seen from outside.

    `normal(payload, queue, id)` is what a payload sent under that id arrives as. A store shows at once what was done
    to it (`moment` is 0); what a broker sends arrives a moment later, and silence for `moment` seconds is taken for
    nothing. `lacks` says, with the reason, which promises that no capability names are not kept; `names(queue)` whether
    a queue can have that name.
    """

    name: str
    transport: Callable[[], contextlib.AbstractContextManager[Any]]
    inject: Callable[[Any, str, str], None]
    expire: Callable[[Any, str], None]
    forget: Callable[[Any, str], None]
    left: Callable[[Any, str], tuple[int, int]]
    normal: Callable[[TaskPayload, str, str], TaskPayload] = lambda payload, queue, id: payload
    moment: float = 0.0
    lacks: Mapping[str, str] = attrs.field(factory=dict)
    names: Callable[[str], bool] = lambda queue: "\0" not in queue

    def queue(self, suffix: str = "") -> str:
        return queue_name(suffix)

    @property
    def patience(self) -> float:
        """Seconds to wait for what must come."""
        return 20.0 if self.moment else 0.0

    def missing(self, promise: str) -> str | None:
        """Say which promise is not made: a capability that is not claimed, or what `lacks` names. None if it is."""
        if promise in UNNAMED:
            return f"{promise} ({self.lacks[promise]})" if promise in self.lacks else None
        with self.transport() as transport:
            return None if getattr(transport.capabilities, promise) else f"the capability {promise!r}"

    def take(self, subscription: Subscription, count: int, *, limit: int = 0) -> list[Delivery]:
        """Receive the `count` messages that must come, and up to `limit` if there are more; from a store in one go."""
        limit = limit or count
        found: list[Delivery] = []
        while len(found) < limit:
            wait = self.patience if len(found) < count else self.moment
            more = subscription.receive(limit=limit - len(found), wait=wait)
            found += more
            if not more or not self.moment:
                break
        return found

    def has_nothing(self, subscription: Subscription) -> bool:
        """Whether nothing is to be had."""
        return not subscription.receive(limit=10, wait=self.moment)

    def has_left(self, transport: Any, count: int, *queues: str) -> bool:
        """Whether `count` messages wait in the queues together, or will in a moment, and nobody holds any."""

        def left() -> bool:
            waiting, held = zip(*(self.left(transport, queue) for queue in queues), strict=True)
            return (sum(waiting), sum(held)) == (count, 0)

        with contextlib.suppress(AssertionError):
            wait_until(left, timeout=self.patience)
        return left()

    def answered(self, transport: Any, key: str) -> Reply | None:
        """Return the reply that must be there."""
        reply: Reply | None = transport.reply(key, timeout=self.patience)
        return reply


def inspected(transport: Any, queue: str) -> tuple[int, int]:
    """Return what a transport that claims `inspection` counts in a queue: how many wait, and how many are held."""
    (state,) = transport.queues([queue])
    return state.ready + state.delayed, state.in_flight


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

    return Harness("memory", make, inject, expire, forget, inspected)


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

    return Harness("postgres", make, inject, expire, forget, inspected)


issued: list[str] = []
"""Every name that `queue_name` has given out, for whoever has to delete what was made under them."""


def queue_name(suffix: str = "", *, lasting: bool = False) -> str:
    """Return the name of a queue that nobody else uses; one that outlasts its module is deleted by whoever made it."""
    name = f"q-{uuid.uuid4().hex[:12]}{suffix}"
    if not lasting:
        issued.append(name)
    return name


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


def ask(transport: Transport, *keys: str) -> None:
    """Send a message for each key that asks for an answer under it, to a queue that nobody works on."""
    queue = queue_name()
    transport.send([message("t", queue, reply_key=key) for key in keys])


def answer(transport: Transport, *replies: Reply) -> None:
    """Settle a message that asks for it with each reply, one after the other, as workers would."""
    queue = queue_name()
    subscription = transport.subscribe([queue], lease=60.0)
    for reply in replies:
        transport.send([message("t", queue, reply_key=reply.key)])
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
