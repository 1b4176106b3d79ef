"""Bugs that are planted in a worker to test that the ledger finds them. Only the tests use them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from chaos.breakpoints import SETTLED, Breakpoints
from chaos.messages import dispatch_of
from chaos.recording import PlantedBug
from unstract_core import Delivery, Settlement, Subscription, Transport


class _Delegating:
    def __init__(self, inner: Subscription, transport: Transport, breakpoints: Breakpoints) -> None:
        self._inner = inner
        self._transport = transport
        self._breakpoints = breakpoints

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

    def _send_follow_ups(self, settlements: Sequence[Settlement]) -> None:
        messages = [one.follow_up for one in settlements if one.follow_up is not None]
        if messages:
            self._transport.send(messages)


class _TwoCommits(_Delegating):
    """Acknowledges first, and sends the follow-ups in a second transaction."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = self._inner.settle([attrs.evolve(one, follow_up=None) for one in settlements])
        self._breakpoints.reach(
            SETTLED, [dispatch_of(one.delivery) for one in settlements if one.follow_up is not None]
        )
        self._send_follow_ups(settlements)
        return answers


class _TwoFollowUps(_Delegating):
    """Sends the follow-ups twice."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = self._inner.settle(settlements)
        self._send_follow_ups(settlements)
        return answers


PLANTED_BUGS: dict[str | None, PlantedBug] = {"two-commits": _TwoCommits, "two-follow-ups": _TwoFollowUps}
