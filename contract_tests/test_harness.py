"""The harness: it opens and closes transports, and its hooks work as the other tests expect."""

from __future__ import annotations

import threading

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit, wait_until
from contract_tests.messages import message
from unstract_core import TransportClosed


def test_the_harness_closes_the_transport_that_it_opened(kit: Kit) -> None:
    """After its context has ended, a transport raises TransportClosed."""
    with kit.open() as transport:
        transport.send([])
    with pytest.raises(TransportClosed):
        transport.send([message("t", kit.queue())])


def test_a_closed_transport_leaves_no_thread_behind(kit: Kit) -> None:
    """Closing a transport ends every thread that it started for sending, receiving and waiting."""
    before = set(threading.enumerate())
    with kit.open() as transport:
        queue = kit.queue()
        transport.send([message("t", queue, reply_key=queue if kit.capabilities.replies else None)])
        if kit.capabilities.replies:
            transport.reply(queue, timeout=0.1)
        subscription = transport.subscribe([queue], lease=60)
        kit.take_one(subscription)
        subscription.close()

    def left() -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - before]

    wait_until(lambda: not left(), timeout=15, what=f"the end of the threads {left()}")


def test_expire_makes_claimed_messages_ready_again(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`expire` ends the leases of one queue only; without leases, claims end when their subscription is closed."""
    other = kit.queue()
    transport.send([message("t", queue), message("t", other)])
    holder = subscribe(queue)
    kit.take_one(holder)
    kit.take_one(subscribe(other))
    if not kit.capabilities.fencing:
        holder.close()
    kit.expire(transport, queue)
    kit.take_one(subscribe(queue))
    assert kit.nothing(subscribe(other))


def test_inject_stores_a_readable_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`inject` stores a ready message, which arrives with the values of its text as attempt 1."""
    text = f'{{"task_name": "t", "args": [1, "x"], "kwargs": {{"k": null}}, "queue": "{queue}", "fairness": null}}'
    kit.inject(transport, queue, text)
    delivery = kit.take_one(subscribe(queue))
    assert delivery.payload is not None
    assert (delivery.payload.task_name, delivery.payload.args, delivery.payload.kwargs) == ("t", [1, "x"], {"k": None})
    assert delivery.attempt == 1
