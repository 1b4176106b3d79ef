"""A sound transport without capabilities: the memory transport, which refuses everything optional."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

import attrs
from kit.planting import Composed, ComposedHarness

from transports.memory.store import Row, Store
from transports.memory.subscription import MemorySubscription
from unstract_core.errors import NotSupported
from unstract_core.payload import DEFAULT_PRIORITY
from unstract_core.transport import (
    Capabilities,
    Delivery,
    Message,
    QueueState,
    Reply,
    Settlement,
    check_delay,
    write_message,
)


class BareStore(Store):
    """Counts no attempt for a message that its holder never settled, and has no fencing."""

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        row = super().take(queues, holder, lease)
        if row is not None and row.attempt - 1 in row.holders:
            row.holders = {row.attempt - 1: holder}
            row.attempt -= 1
        return row

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        row = self.rows.get(int(delivery.id))
        return row if row is not None and row.state == "claimed" and delivery.attempt in row.holders else None


class BareSubscription(MemorySubscription):
    """Sends a follow-up first, and then acknowledges its message. A crash in between may double it."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        for one in settlements:
            check(one.follow_up)
            check_delay(one.delay)
            if one.delay:
                raise NotSupported("no delays")
        return [self.settle_one(one) for one in settlements]

    def settle_one(self, one: Settlement) -> bool:
        with self._store.using():
            if self._store.claimed(one.delivery, self) is None:
                return False
        if one.follow_up is not None:
            put(self._store, self.kept_of(one.follow_up))
        (answer,) = super().settle([attrs.evolve(one, follow_up=None, reply=self.answer_of(one))])
        return answer

    def kept_of(self, message: Message) -> Message:
        return attrs.evolve(message, priority=DEFAULT_PRIORITY)

    def answer_of(self, settlement: Settlement) -> Reply | None:
        """Return None: this transport keeps no status."""
        return None


class Bare(Composed):
    """A transport that claims nothing."""

    capabilities = Capabilities()
    store_type = BareStore
    subscription_type = BareSubscription

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        if within is not None:
            raise NotSupported("no transactions")
        for one in messages:
            check(one)
        with self._store.using():
            pass
        return [put(self._store, attrs.evolve(one, priority=DEFAULT_PRIORITY)) for one in messages]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        raise NotSupported("no replies")

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        raise NotSupported("no inspection")

    @property
    def dead(self) -> NoReturn:
        raise NotSupported("no dead letters")

    @dead.setter
    def dead(self, letters: object) -> None:
        return


def check(message: Message | None) -> None:
    """Refuse an invalid message, and then one that needs an unclaimed capability."""
    if message is not None:
        write_message(message)
        if message.delay or message.payload.reply_key is not None:
            raise NotSupported("no delays, and no replies")


def put(store: Store, message: Message) -> str:
    text = json.dumps(write_message(message))
    with store.using():
        id = store.add(message, text)
        store.changed.notify_all()
    return id


class BareHarness(ComposedHarness):
    transport_type = Bare


def bare() -> BareHarness:
    return BareHarness("bare")
