"""Unusual messages at a subscription: interrupted, early, misaddressed, or released too often."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable

import kombu
import pytest
from amqp.exceptions import PreconditionFailed
from celery_wire.support import ALIVE, Bench, Pipe
from kombu.message import Message as Raw
from proxy import Proxy
from queues import queue_name

from contract_tests.messages import message
from transports.celery import CeleryTransport
from transports.celery.errors import translate
from transports.celery.incoming import Incoming, QueueConsumer
from unstract_core import Delivery, Settlement, Subscription, TransportError, TransportRefused, Verdict

Make = Callable[..., CeleryTransport]


def received(subscription: Subscription) -> Delivery:
    """Receive and settle the message that must come, over as many connections as that takes."""
    deadline = time.monotonic() + ALIVE
    while time.monotonic() < deadline:
        with contextlib.suppress(TransportError):
            for delivery in subscription.receive(limit=1, wait=1):
                subscription.settle([Settlement(delivery, Verdict.ACK)])
                return delivery
    raise AssertionError("the message did not come")


def test_a_connection_stalled_in_a_message_is_closed(through: Make, between: Proxy, queue: str) -> None:
    """Missing heartbeats end the connection without a busy loop, and the message is redelivered."""
    transport = through(heartbeat=2, confirm_timeout=2)
    transport.send([message("t", queue, "x" * 100_000)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        between.stall_after(20_000)
        used, began = time.process_time(), time.monotonic()
        with contextlib.suppress(TransportError):
            assert not subscription.receive(limit=1, wait=2)
        assert time.monotonic() - began < 15
        assert time.process_time() - used < 1
        assert received(subscription).problem is None


def test_a_stalled_confirm_raises_in_time(through: Make, between: Proxy, queue: str) -> None:
    """A batch whose confirms stop within a frame raises within its timeout, with an unknown fate."""
    transport = through(confirm_timeout=2)
    transport.send([message("t", queue)])
    between.stall_after(9)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        transport.send([message("t", queue, number) for number in range(400)])
    assert time.monotonic() - began < 15
    assert getattr(caught.value, "fate_unknown", False)


def test_delayed_messages_block_no_other(make_celery: Make, queue: str) -> None:
    """Messages behind many delayed ones are received at once."""
    transport = make_celery()
    transport.send([message("later", queue, delay=3600) for _ in range(50)])
    transport.send([message("now", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        began = time.monotonic()
        assert received(subscription).payload is not None
        assert time.monotonic() - began < 10


def test_a_prefetch_is_capped_at_amqps_limit(make_celery: Make, queue: str) -> None:
    """A prefetch beyond AMQP's 65535 is cut to that."""
    transport = make_celery()
    transport.send([message("t", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        assert len(subscription.receive(limit=70_000, wait=ALIVE)) == 1


def test_a_binary_routing_key_is_received(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """A message that an exchange routed by bytes that are no UTF-8 is received like any other."""
    channel = pipe._channel
    exchange = f"{queue}.fanout"
    channel.exchange_declare(exchange, "fanout", durable=False, auto_delete=True)
    channel.queue_bind(queue, exchange)
    odd = channel.prepare_message(
        json.dumps([[1], {}, {}]).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": "t", "id": "the-id"},
    )
    channel.basic_publish(odd, exchange=exchange, routing_key=b"\xff\xfe")
    with contextlib.closing(make_celery().subscribe([queue], lease=60)) as subscription:
        delivery = received(subscription)
    assert (delivery.id, delivery.problem) == ("the-id", None)


def test_an_undeclared_quorum_queue_keeps_releases(make_celery: Make, pipe: Pipe) -> None:
    """A quorum queue of unknown type drops no released message: from its first count on a copy is sent instead."""
    queue = pipe.declare(queue_name(), **{"x-queue-type": "quorum", "x-delivery-limit": 3})
    transport = make_celery(declare=False)
    transport.send([message("t", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        for _ in range(8):
            (delivery,) = subscription.receive(limit=1, wait=ALIVE)
            assert list(subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)])) == [True]
        assert received(subscription).payload is not None


def test_an_unaddressable_chain_is_dead_lettered(bench: Bench) -> None:
    """A chain with an address of 300 characters is dead-lettered with its reason, and the next message runs."""
    later = {"task": "n", "options": {"task_id": "x", "reply_to": "r" * 300}}
    bench.put(json.dumps([[1], {}, {"chain": [later]}]), {"task": "note", "id": str(uuid.uuid4())})
    bench.the_next_one_runs()
    assert "part of a chain" in bench.reason()


@pytest.mark.parametrize("id", [["a"], {"a": 1}, None, 7])
def test_any_id_has_a_key(id: object) -> None:
    """A foreign message with an id of any type never breaks the search for redelivered messages."""
    raw = Raw(headers={"id": id, "retries": "many"}, delivery_info={"redelivered": True})
    arrived = Incoming(raw, "q", QueueConsumer(kombu.Queue("q"), "t", 1, Counter()))
    assert {arrived.key: 1} == {(None, 0): 1}


def test_a_message_beyond_the_brokers_limit_is_refused() -> None:
    """RabbitMQ's refusal of a large message is TransportRefused, although its reply code is that of other arguments."""
    said = "PRECONDITION_FAILED - message size 2000123 is larger than configured max size 1000000"
    assert isinstance(translate(PreconditionFailed(said), "send"), TransportRefused)
