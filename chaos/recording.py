"""A transport that records claims and settlements in the journal, and stops at breakpoints between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chaos.breakpoints import CLAIMED, FINISHED, SETTLED, SETTLING, Breakpoints
from chaos.journal import Journal
from chaos.messages import dispatch_of
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

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return self._inner.send(messages, within=within)

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        return self._inner.reply(key, timeout=timeout, consume=consume)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        inner = self._inner.subscribe(queues, lease=lease)
        if not self._inner.capabilities.atomic_settle:
            self._stop_before_the_acknowledgement(inner)
        if self._plant is not None:
            inner = self._plant(inner, self._inner, self._breakpoints)
        self._journal.write("ready")
        return RecordingSubscription(inner, self._journal, self._breakpoints)

    def close(self) -> None:
        self._inner.close()

    def _stop_before_the_acknowledgement(self, subscription: Subscription) -> None:
        """Add a breakpoint between the two steps of a broker's settlement: confirm and acknowledgement."""
        name = "_acknowledge"
        acknowledge = getattr(subscription, name)

        def stopping(plans: Sequence[object], errors: list[object]) -> None:
            ended = [getattr(plan, "settlement") for plan in plans]  # noqa: B009 - a private type of the transport
            self._breakpoints.reach(SETTLING, [dispatch_of(one.delivery) for one in ended if one.follow_up is not None])
            acknowledge(plans, errors)

        setattr(subscription, name, stopping)
