"""A sound transport that behaves like one over a message broker, based on the memory transport.

Messages arrive a moment after `send`. A claim ends with the connection of its holder, without fencing. A reply reaches
only the transport that sent its message. Several transports share one broker, and connections can be cut.
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
"""Seconds until a sent message arrives."""


class ConnectionStore(BareStore):
    """The shared store of the broker, with a closed state for each transport."""

    def __init__(self, broker: Store) -> None:
        vars(self).update(vars(broker))


class BrokerSubscription(BareSubscription):
    """Keeps its claims until its connection ends."""

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
        """Make all claimed messages ready, because the connection has ended."""
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
        self._store = ConnectionStore(broker)
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
                raise NotSupported("only the transport that sent the message gets its reply")
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
        """End every claim in the queue, as if the connections of the holders were cut."""
        with transport._store.using():
            for row in transport._store.rows.values():
                if row.queue == queue and row.state == "claimed":
                    row.due = 0.0
            transport._store.changed.notify_all()

    def stored(self, transport: Any, queue: str) -> Any:
        """Return None: a broker's messages cannot be read without claiming them."""
        return None

    def sever(self, transport: Any) -> bool:
        transport.cut = True
        for one in transport.opened:
            one.cut = True
            one.give_back()
        return True


def broker() -> BrokerlikeHarness:
    return BrokerlikeHarness("brokerlike")
