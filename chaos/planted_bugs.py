"""Faults that are planted into a worker, so that the ledger can be seen to find them. Never used but by its tests."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from chaos.breakpoints import SETTLED, Halts
from chaos.messages import dispatch_of
from chaos.recording import Plant
from unstract_core import Delivery, Settlement, Subscription, Transport


class _Planted:
    def __init__(self, inner: Subscription, transport: Transport, halts: Halts) -> None:
        self._inner = inner
        self._transport = transport
        self._halts = halts

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return self._inner.receive(limit=limit, wait=wait)

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return self._inner.renew(deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return self._inner.settle(settlements)

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()

    def _send_what_follows(self, settlements: Sequence[Settlement]) -> None:
        messages = [one.follow_up for one in settlements if one.follow_up is not None]
        if messages:
            self._transport.send(messages)


class _TwoCommits(_Planted):
    """Acknowledges first, and sends the follow-ups in a second transaction."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = self._inner.settle([attrs.evolve(one, follow_up=None) for one in settlements])
        self._halts.at(SETTLED, [dispatch_of(one.delivery) for one in settlements if one.follow_up is not None])
        self._send_what_follows(settlements)
        return answers


class _TwoFollowUps(_Planted):
    """Sends the follow-ups once more when they are sent already."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = self._inner.settle(settlements)
        self._send_what_follows(settlements)
        return answers


PLANTS: dict[str | None, Plant] = {"two-commits": _TwoCommits, "two-follow-ups": _TwoFollowUps}
