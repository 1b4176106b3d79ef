"""Queues of the tests' own: their names, and what is taken from them, buried and answered."""

from __future__ import annotations

import uuid

from contract_tests.messages import make_settlement, message
from unstract_core import Delivery, Reply, Transport, Verdict
from unstract_core.values.limits import JSONValue

issued: list[str] = []
"""Every name that `queue_name` has given out, for whoever has to delete what was made under them."""


def queue_name(*, lasting: bool = False) -> str:
    """Return the name of a queue that nobody else uses; one that outlasts its module is deleted by whoever made it."""
    name = f"q-{uuid.uuid4().hex[:12]}"
    if not lasting:
        issued.append(name)
    return name


def receive_all(transport: Transport, queue: str, *, lease: float = 60.0) -> list[Delivery]:
    """Take everything that is ready in a queue, as a worker that never comes back."""
    subscription = transport.subscribe([queue], lease=lease)
    try:
        return list(subscription.receive(limit=10_000, wait=0))
    finally:
        subscription.close()


def bury(transport: Transport, queue: str, reason: str = "because", *, result: JSONValue = None) -> None:
    """Bury everything that is ready in a queue, one after the other in the order in which it is received."""
    subscription = transport.subscribe([queue], lease=60.0)
    for delivery in subscription.receive(limit=10_000, wait=0):
        assert subscription.settle([make_settlement(delivery, Verdict.BURY, reason=reason, result=result)]) == [True]
    subscription.close()


def answer(transport: Transport, *replies: Reply) -> None:
    """Settle a message that asks for it with each reply, one after the other, as workers would."""
    queue = queue_name()
    subscription = transport.subscribe([queue], lease=60.0)
    for reply in replies:
        transport.send([message("t", queue, reply_key=reply.key)])
        (delivery,) = subscription.receive(limit=1, wait=5)
        assert list(subscription.settle([make_settlement(delivery, Verdict.ACK, reply=reply)])) == [True]
    subscription.close()
