"""Queues for tests: unused names, and helpers that receive, dead-letter and answer messages."""

from __future__ import annotations

import uuid

from contract_tests.messages import make_settlement, message
from unstract_core import Delivery, Reply, Transport, Verdict
from unstract_core.values.limits import JSONValue

issued: list[str] = []
"""The names returned by `queue_name`, so that fixtures can delete their queues."""


def queue_name(*, lasting: bool = False) -> str:
    """Return an unused queue name. The caller must delete a `lasting` queue, which outlasts its module."""
    name = f"q-{uuid.uuid4().hex[:12]}"
    if not lasting:
        issued.append(name)
    return name


def receive_all(transport: Transport, queue: str, *, lease: float = 60.0) -> list[Delivery]:
    """Claim every ready message of a queue, like a worker that crashes."""
    subscription = transport.subscribe([queue], lease=lease)
    try:
        return list(subscription.receive(limit=10_000, wait=0))
    finally:
        subscription.close()


def bury(transport: Transport, queue: str, reason: str = "because", *, result: JSONValue = None) -> None:
    """Dead-letter every ready message of a queue, one by one in the order of delivery."""
    subscription = transport.subscribe([queue], lease=60.0)
    for delivery in subscription.receive(limit=10_000, wait=0):
        assert subscription.settle([make_settlement(delivery, Verdict.BURY, reason=reason, result=result)]) == [True]
    subscription.close()


def answer(transport: Transport, *replies: Reply) -> None:
    """Write each reply in turn: send a message with its key, and settle it with the reply."""
    queue = queue_name()
    subscription = transport.subscribe([queue], lease=60.0)
    for reply in replies:
        transport.send([message("t", queue, reply_key=reply.key)])
        (delivery,) = subscription.receive(limit=1, wait=5)
        assert list(subscription.settle([make_settlement(delivery, Verdict.ACK, reply=reply)])) == [True]
    subscription.close()
