"""close(): whoever waits is told at once, whoever comes later as well, and a second time does no harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import USES, Harness, ask, message

from unstract_core import Consumer, Settlement, TransportClosed, Verdict


def ended_by_closing(transport: Any, waiting: Callable[[], object]) -> float:
    """Close the transport while another thread waits in `waiting`; return the seconds until that raised."""
    begun = threading.Event()

    def wait() -> float:
        begun.set()
        with pytest.raises(TransportClosed):
            waiting()
        return time.monotonic()

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(wait)
        begun.wait(5)
        time.sleep(0.1)
        closed = time.monotonic()
        transport.close()
        return ended.result(10) - closed


@pytest.mark.needs("replies")
def test_closing_twice_is_allowed(harness: Harness) -> None:
    """Used or not, one after the other or at once."""
    for used in (False, True):
        with harness.transport() as transport, ThreadPoolExecutor(4) as threads:
            if used:
                ask(transport, key := harness.queue())
                transport.reply(key, timeout=0.05)
            for closing in [threads.submit(transport.close) for _ in range(4)]:
                closing.result()
            transport.close()


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("used", [True, False], ids=["used before", "never used"])
def test_a_closed_transport_says_so(harness: Harness, use: Callable[[Any], Any], used: bool) -> None:
    """After close() every call raises TransportClosed."""
    with harness.transport() as transport:
        if used:
            transport.send([message("t", harness.queue())])
        transport.close()
        with pytest.raises(TransportClosed):
            use(transport)


def test_a_closed_subscription_says_so(harness: Harness, transport: Any) -> None:
    """After its close(), which may be called twice, a subscription raises TransportClosed; its transport works on."""
    queue = harness.queue()
    subscription = transport.subscribe([queue], lease=60)
    subscription.close()
    subscription.close()
    with pytest.raises(TransportClosed):
        subscription.receive(limit=1, wait=0)
    transport.send([message("t", queue)])


def test_a_subscription_of_a_closed_transport_says_so(harness: Harness) -> None:
    """Receive, renew and settle raise TransportClosed; wake and close do no harm."""
    with harness.transport() as transport:
        queue = harness.queue()
        transport.send([message("t", queue)])
        subscription = transport.subscribe([queue], lease=60)
        (held,) = harness.take(subscription, 1)
        transport.close()
        with pytest.raises(TransportClosed):
            subscription.receive(limit=1, wait=0)
        with pytest.raises(TransportClosed):
            subscription.renew([held])
        with pytest.raises(TransportClosed):
            subscription.settle([Settlement(held, Verdict.ACK)])
        subscription.wake()
        subscription.close()


@pytest.mark.needs("replies")
def test_a_waiting_reply_ends_with_transport_closed(harness: Harness) -> None:
    """A blocked caller is told at once, not at its timeout."""
    with harness.transport() as transport:
        ask(transport, key := harness.queue())
        assert ended_by_closing(transport, lambda: transport.reply(key, timeout=20)) < 2


def test_a_waiting_receive_ends_with_transport_closed(harness: Harness) -> None:
    """A subscription that waits when its transport is closed is told at once."""
    with harness.transport() as transport:
        subscription = transport.subscribe([harness.queue()], lease=60)
        assert ended_by_closing(transport, lambda: subscription.receive(limit=1, wait=20)) < 2
        subscription.close()


def test_a_running_consumer_ends_with_transport_closed(harness: Harness) -> None:
    """A closed transport is no outage to be waited out: `run` raises."""
    with harness.transport() as transport:
        consumer = Consumer(transport, {"t": print}, [harness.queue()])
        assert ended_by_closing(transport, consumer.run) < 7
