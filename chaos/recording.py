"""A transport that records claims and settlements in the journal, and stops at breakpoints between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chaos.breakpoints import CLAIMED, FINISHED, SETTLED, SETTLING, Breakpoints
from chaos.journal import Journal
from chaos.messages import dispatch_of
from transports.celery.broker import Broker
from transports.celery.settlement_plan import SettlementPlan
from unstract_core import Delivery, Message, Reply, Settlement, Subscription, Transport
from unstract_core.transport import Capabilities

PlantedBug = Callable[[Subscription, Transport, Breakpoints], Subscription]
"""Wraps a subscription with a planted bug, to test the ledger."""


class RecordingSubscription:
    """Records the claims and settlements of a subscription."""

    def __init__(self, inner: Subscription, journal: Journal, breakpoints: Breakpoints) -> None:
        self._inner = inner
        self._journal = journal
        self._breakpoints = breakpoints

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = self._inner.receive(limit=limit, wait=wait)
        dispatches = [dispatch_of(delivery) for delivery in deliveries]
        self._journal.write_all("claimed", dispatches)
        self._breakpoints.reach(CLAIMED, dispatches)
        return deliveries

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return self._inner.renew(deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        ended = [dispatch_of(one.delivery) for one in settlements if one.counted]
        self._breakpoints.reach(FINISHED, ended)
        answers = self._inner.settle(settlements)
        for one, answer in zip(settlements, answers, strict=True):
            event = "settled" if one.counted else "released"
            self._journal.write(event, dispatch_of(one.delivery), "yes" if answer else "no")
        self._breakpoints.reach(SETTLED, ended)
        return answers

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()


class RecordingTransport:
    """A transport with recording subscriptions."""

    def __init__(self, inner: Transport, journal: Journal, breakpoints: Breakpoints, plant: PlantedBug | None) -> None:
        self._inner = inner
        self._journal = journal
        self._breakpoints = breakpoints
        self._plant = plant
        if not inner.capabilities.atomic_settle:
            self._stop_before_the_acknowledgement()

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return self._inner.send(messages, within=within)

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        return self._inner.reply(key, timeout=timeout, consume=consume)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        inner = self._inner.subscribe(queues, lease=lease)
        if self._plant is not None:
            inner = self._plant(inner, self._inner, self._breakpoints)
        self._journal.write("ready")
        return RecordingSubscription(inner, self._journal, self._breakpoints)

    def close(self) -> None:
        self._inner.close()

    def _stop_before_the_acknowledgement(self) -> None:
        """Add a breakpoint between the two steps of a broker's settlement: confirm and acknowledgement."""
        in_requeue_order = Broker.in_requeue_order

        def stopping(broker: Broker, messages: Sequence[Any]) -> Sequence[Any]:
            settlements = [one.settlement for one in messages if isinstance(one, SettlementPlan)]
            followed = [dispatch_of(one.delivery) for one in settlements if one.follow_up is not None]
            self._breakpoints.reach(SETTLING, followed)
            return in_requeue_order(broker, messages)

        setattr(Broker, in_requeue_order.__name__, stopping)  # in this process only
