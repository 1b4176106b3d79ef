"""A transport as one over a message broker is, made of the memory transport: honest in what it does not claim.

What was sent arrives a moment later. A claim ends with the connection of its holder, and nothing fences it. An answer
reaches the transport that asked, and no other. Several transports share one broker; connections can be cut.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

from kit.honest import Bare, BareStore, BareSubscription
from kit.planting import ComposedHarness

from transports.memory.store import Store
from transports.memory.transport import MemoryTransport
from unstract_core.errors import NotSupported, TransportUnavailable
from unstract_core.transport import (
    Capabilities,
    Delivery,
    Message,
    Reply,
    Settlement,
    check_subscription,
    write_message,
)

ON_ITS_WAY = 0.005
"""Seconds that a message takes to whoever waits for it."""


class Connection(BareStore):
    """What is stored at the broker, as one transport sees it: the same for all, and closed for one."""

    def __init__(self, broker: Store) -> None:
        vars(self).update(vars(broker))


class BrokerSubscription(BareSubscription):
    """Holds what it received until its connection ends."""

    cut = False

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        with self._store.changed:
            self._check_open()
        if wait < ON_ITS_WAY:
            return []
        time.sleep(ON_ITS_WAY)
        return super().receive(limit=limit, wait=wait - ON_ITS_WAY)

    def kept_of(self, message: Message) -> Message:
        return message

    def answer_of(self, settlement: Settlement) -> Reply | None:
        return settlement.reply

    def close(self) -> None:
        self.give_back()
        super().close()

    def give_back(self) -> None:
        """Let everything come back that is held: its connection has ended."""
        with self._store.changed:
            for row in self._store.rows.values():
                if row.state == "claimed" and row.holders.get(row.attempt) is self:
                    row.due = 0.0
            self._store.changed.notify_all()

    def _check_open(self) -> None:
        super()._check_open()
        if self.cut:
            self.cut = False
            raise TransportUnavailable("the connection was cut")


class Brokerlike(Bare):
    """A transport to a broker."""

    capabilities = Capabilities(priority=True, replies=True)
    subscription_type: ClassVar[type[BrokerSubscription]] = BrokerSubscription

    def __init__(self, broker: Store) -> None:
        super().__init__()
        self._store = Connection(broker)
        self.cut = False
        self.asked: set[str] = set()
        self.opened: list[BrokerSubscription] = []

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        written = [(one, json.dumps(write_message(one))) for one in messages]
        if within is not None or any(one.delay for one in messages):
            raise NotSupported("no transactions, and no delays")
        with self._store.using():
            if self.cut:
                self.cut = False
                raise TransportUnavailable("the connection was cut")
            self.asked.update(one.payload.reply_key for one in messages if one.payload.reply_key is not None)
            ids = [self._store.add(one, text) for one, text in written]
            self._store.changed.notify_all()
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        with self._store.using():
            if key not in self.asked:
                raise NotSupported("an answer reaches whoever asked, and this transport did not")
        return MemoryTransport.reply(self, key, timeout=timeout, consume=consume)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> BrokerSubscription:
        names = check_subscription(queues, lease)
        with self._store.using():
            self.opened.append(self.subscription_type(self._store, names, 1e6))
        return self.opened[-1]

    def close(self) -> None:
        super().close()
        for one in self.opened:
            one.give_back()


class BrokerlikeHarness(ComposedHarness):
    transport_type: type[Any] = Brokerlike
    moment = 0.03
    shared = True

    def __enter__(self) -> Self:
        self.broker = BareStore(time.monotonic)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.broker.rows.clear()

    def transport(self) -> contextlib.closing[Any]:
        return contextlib.closing(self.transport_type(self.broker))

    def inject(self, transport: Any, queue: str, text: str) -> None:
        super().inject(transport, queue, text)
        wire = json.loads(text)
        if isinstance(wire, dict) and "reply_key" in wire:
            transport.asked.add(wire["reply_key"])

    def expire(self, transport: MemoryTransport, queue: str) -> None:
        """Cut whoever may hold a message of the queue, as their connections would be."""
        with transport._store.using():
            for row in transport._store.rows.values():
                if row.queue == queue and row.state == "claimed":
                    row.due = 0.0
            transport._store.changed.notify_all()

    def stored(self, transport: Any, queue: str) -> Any:
        """A broker's messages cannot be read without being taken."""
        return None

    def sever(self, transport: Any) -> bool:
        transport.cut = True
        for one in transport.opened:
            one.cut = True
            one.give_back()
        return True


def broker() -> BrokerlikeHarness:
    return BrokerlikeHarness("brokerlike")
