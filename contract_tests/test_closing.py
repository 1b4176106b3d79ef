"""close(): waiting and later calls raise TransportClosed, and closing twice is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.kit import LONG, SOON, Kit
from contract_tests.messages import make_settlement, message
from contract_tests.requires import requires, skip_not_claimed
from contract_tests.time_limits import start, together
from unstract_core import Consumer, Dispatcher, TransportClosed, Verdict

USES: dict[str, Callable[[CheckedTransport, str], object]] = {
    "send": lambda transport, name: transport.send([message("t", name)]),
    "subscribe": lambda transport, name: transport.subscribe([name], lease=1),
    "dispatch": lambda transport, name: Dispatcher(transport).send("t", queue=name),
}
"""Calls that every transport offers."""

MORE_USES: dict[str, tuple[str, Callable[[CheckedTransport, str], object]]] = {
    "reply": ("replies", lambda transport, name: transport.reply(name)),
    "waiting reply": ("replies", lambda transport, name: transport.reply(name, timeout=1)),
    "call": ("replies", lambda transport, name: Dispatcher(transport).call("t", queue=name, timeout=1)),
    "queues": ("inspection", lambda transport, name: transport.queues()),
    "waiting tasks": ("inspection", lambda transport, name: transport.waiting_tasks(name)),
    "find dead letters": ("dead_letters", lambda transport, name: transport.dead.find()),
    "get dead letters": ("dead_letters", lambda transport, name: transport.dead.get(["1"])),
    "replay": ("dead_letters", lambda transport, name: transport.dead.replay(["1"])),
    "purge": ("dead_letters", lambda transport, name: transport.dead.purge()),
}
"""Calls that need a capability."""


def ended_by_closing(transport: CheckedTransport, waiting: Callable[[], object]) -> float:
    """Close the transport while another thread waits in `waiting`; return the seconds until that raised."""

    def wait() -> float:
        with pytest.raises(TransportClosed):
            waiting()
        return time.monotonic()

    ended = start(wait)
    time.sleep(0.3)
    closed = time.monotonic()
    transport.close()
    return ended(20) - closed


@pytest.mark.parametrize("used", [True, False], ids=["used before", "never used"])
def test_closing_twice_is_allowed(kit: Kit, used: bool) -> None:
    """`close` may be called again, also from several threads at once."""
    with kit.open() as transport:
        if used:
            queue = kit.queue()
            transport.send([message("t", queue)])
            kit.remaining(transport, queue, count=1)
        together(*[transport.close] * 4)
        transport.close()


@pytest.mark.parametrize("use", [*USES, *MORE_USES])
@pytest.mark.parametrize("used", [True, False], ids=["used before", "never used"])
def test_a_closed_transport_raises_transport_closed(kit: Kit, use: str, used: bool) -> None:
    """After close(), every call raises TransportClosed."""
    if use in MORE_USES and not getattr(kit.capabilities, MORE_USES[use][0]):
        skip_not_claimed(MORE_USES[use][0])
    call = USES[use] if use in USES else MORE_USES[use][1]
    with kit.open() as transport:
        if used:
            queue = kit.queue()
            transport.send([message("t", queue)])
            kit.remaining(transport, queue, count=1)
        transport.close()
        with pytest.raises(TransportClosed):
            call(transport, kit.queue())


def test_a_closed_subscription_raises_transport_closed(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """After its close(), a subscription raises TransportClosed; its transport still works."""
    subscription = transport.subscribe([queue], lease=60)
    subscription.close()
    subscription.close()
    with pytest.raises(TransportClosed):
        subscription.receive(limit=1, wait=0)
    transport.send([message("t", queue)])
    assert len(kit.remaining(transport, queue, count=1)) == 1


def test_a_closed_subscription_settles_nothing(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """After its close(), `settle` and `renew` raise TransportClosed, and the message is delivered to others."""
    transport.send([message("t", queue)])
    subscription = transport.subscribe([queue], lease=60)
    held = kit.take_one(subscription)
    subscription.close()
    with pytest.raises(TransportClosed):
        subscription.settle([make_settlement(held, Verdict.ACK)])
    with pytest.raises(TransportClosed):
        subscription.renew([held])
    assert len(kit.remaining(transport, queue, count=1)) == 1


def test_closing_a_transport_closes_its_subscriptions(kit: Kit) -> None:
    """After the transport's close(), `receive`, `renew` and `settle` raise TransportClosed; `wake` does not."""
    with kit.open() as transport:
        queue = kit.queue()
        transport.send([message("t", queue)])
        subscription = transport.subscribe([queue], lease=60)
        held = kit.take_one(subscription)
        transport.close()
        calls: list[Callable[[], Any]] = [
            lambda: subscription.receive(limit=1, wait=0),
            lambda: subscription.renew([held]),
            lambda: subscription.settle([make_settlement(held, Verdict.ACK)]),
        ]
        for call in calls:
            with pytest.raises(TransportClosed):
                call()
        subscription.wake()
        subscription.close()


@requires("replies")
def test_a_waiting_reply_ends_with_transport_closed(kit: Kit) -> None:
    """If the transport is closed, a blocked `reply` raises TransportClosed at once, not at its timeout."""
    with kit.open() as transport:
        kit.ask(transport, key := kit.queue())
        assert ended_by_closing(transport, lambda: transport.reply(key, timeout=LONG)) < SOON


def test_a_waiting_receive_ends_with_transport_closed(kit: Kit) -> None:
    """If the transport is closed, a blocked `receive` raises TransportClosed at once."""
    with kit.open() as transport:
        queue = kit.queue()
        subscription = transport.subscribe([queue], lease=60)
        assert ended_by_closing(transport, lambda: subscription.receive(limit=1, wait=LONG)) < SOON
        subscription.close()


def test_a_running_consumer_ends_with_transport_closed(kit: Kit) -> None:
    """If the transport is closed, `Consumer.run` raises TransportClosed instead of waiting for a recovery."""
    with kit.open() as transport:
        consumer = Consumer(transport, {"t": print}, [kit.queue()])
        assert ended_by_closing(transport, consumer.run) < 15
