"""The memory transport with faults that a test switches on and off, for the tests of the consumer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from transports.memory import MemoryTransport
from unstract_core import Capabilities, Delivery, Settlement, Subscription, TransportUnavailable

Fault = Callable[[Sequence[Settlement]], object]


def nothing(_: Sequence[Settlement]) -> None:
    """No fault."""


@attrs.define
class Faulty:
    """A memory transport whose settlements may raise, in `before` and `after`; while `away`, every operation fails."""

    transport: MemoryTransport = attrs.field(factory=MemoryTransport)
    before: Fault = nothing
    after: Fault = nothing
    away: bool = False
    tries: int = 0
    capabilities: Capabilities = MemoryTransport.capabilities
    subscriptions: list[FaultySubscription] = attrs.field(factory=list)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> FaultySubscription:
        self.subscriptions.append(FaultySubscription(self, self.transport.subscribe(queues, lease=lease)))
        return self.subscriptions[-1]

    def check(self) -> None:
        self.tries += 1
        if self.away:
            raise TransportUnavailable("away")

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        self.away = True
        try:
            yield
        finally:
            self.away = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@attrs.define
class FaultySubscription:
    """Counts in `held` the messages that are received and not settled."""

    faults: Faulty
    subscription: Subscription
    held: int = 0

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        if limit:  # with 0 the call only waits
            self.faults.check()
        deliveries = self.subscription.receive(limit=limit, wait=wait)
        self.held += len(deliveries)
        return deliveries

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        self.faults.check()
        return self.subscription.renew(deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self.faults.check()
        self.faults.before(settlements)
        took_effect = self.subscription.settle(settlements)
        self.held -= sum(took_effect)
        self.faults.after(settlements)
        return took_effect

    def wake(self) -> None:
        self.subscription.wake()

    def close(self) -> None:
        self.subscription.close()
