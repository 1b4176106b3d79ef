"""Outages: after a cut the transport reconnects by itself, and accepted messages are not lost."""

from __future__ import annotations

import time

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import RECOVERY, Kit, retry_outages, wait_until
from contract_tests.messages import first, message
from contract_tests.requires import requires
from contract_tests.time_limits import start
from unstract_core import TransportError


def test_send_reconnects_after_a_cut(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """After a cut, `send` works again without help; every message accepted before and after arrives."""
    accepted = list(transport.send([message("t", queue, 1)]))
    kit.sever(transport)
    accepted += retry_outages(lambda: transport.send([message("t", queue, 2)]))
    received = {one.id for one in kit.remaining(transport, queue, count=len(accepted))}
    assert received >= set(accepted)


def test_receive_reconnects_after_a_cut(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """After a cut, a subscription receives messages that were sent before and after."""
    subscription = subscribe(queue)
    assert kit.nothing(subscription)
    transport.send([message("t", queue, 1)])
    kit.sever(transport)
    retry_outages(lambda: transport.send([message("t", queue, 2)]))
    received: set[object] = set()
    until = time.monotonic() + RECOVERY
    while received != {1, 2} and time.monotonic() < until:
        received |= {first(one) for one in retry_outages(lambda: subscription.receive(limit=5, wait=0.5))}
    assert received == {1, 2}


def test_messages_in_flight_survive_a_cut(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A claimed message is not lost with the connection of its holder."""
    transport.send([message("t", queue, 1)])
    holder = subscribe(queue)
    kit.take_one(holder)
    kit.sever(transport)
    holder.close()
    kit.expire(transport, queue)
    successor = retry_outages(lambda: subscribe(queue))
    found: list[object] = []
    until = time.monotonic() + RECOVERY
    while not found and time.monotonic() < until:
        found = [first(one) for one in retry_outages(lambda: successor.receive(limit=5, wait=0.5))]
    assert found == [1]


def test_a_consumer_survives_a_cut(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """A consumer whose connection was cut continues: messages sent afterwards are run."""
    ran: list[int] = []
    with kit.running(transport, {"t": ran.append}, queue):
        transport.send([message("t", queue, 1)])
        wait_until(lambda: 1 in ran, timeout=2 * RECOVERY, what="the first task")
        kit.sever(transport)
        retry_outages(lambda: transport.send([message("t", queue, 2)]))
        wait_until(lambda: 2 in ran, timeout=2 * RECOVERY, what="the consumer's recovery")


@requires("replies")
def test_a_blocked_caller_survives_a_cut(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """A caller that waits for a reply during a cut gets the later reply or a TransportError."""
    key = kit.queue()
    transport.send([message("t", queue, 5, reply_key=key)])

    def wait() -> object:
        try:
            return transport.reply(key, timeout=30)
        except TransportError as exc:
            return exc

    waiting = start(wait)
    time.sleep(0.3)
    kit.sever(transport)
    with kit.running(transport, {"t": lambda n: n}, queue):
        found = waiting(40)
        if kit.capabilities.status and found is None:
            found = transport.reply(key, timeout=20)
    assert isinstance(found, TransportError) or (found is not None and getattr(found, "result", None) == 5)
