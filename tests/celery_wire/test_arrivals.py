"""What arrives at a subscription and is odd: torn, early, misaddressed, or given back once too often."""

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


def test_a_connection_that_stalls_inside_a_message_is_given_up(through: Make, between: Proxy, queue: str) -> None:
    """Neither is it waited for without an end, nor at full speed: the heartbeats end it, and the message comes anew."""
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


def test_a_confirm_that_stalls_halfway_is_given_up(through: Make, between: Proxy, queue: str) -> None:
    """A batch whose confirms stop in the middle of a frame raises within its deadline; what is in doubt says so."""
    transport = through(confirm_timeout=2)
    transport.send([message("t", queue)])
    between.stall_after(9)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        transport.send([message("t", queue, number) for number in range(400)])
    assert time.monotonic() - began < 15
    assert getattr(caught.value, "fate_unknown", False)


def test_messages_whose_time_has_not_come_hold_up_no_other(make_celery: Make, queue: str) -> None:
    """However many stand in front, what is behind them is received at once."""
    transport = make_celery()
    transport.send([message("later", queue, delay=3600) for _ in range(50)])
    transport.send([message("now", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        began = time.monotonic()
        assert received(subscription).payload is not None
        assert time.monotonic() - began < 10


def test_more_than_a_broker_can_grant_may_be_asked_for(make_celery: Make, queue: str) -> None:
    """A prefetch beyond AMQP's 65535 is cut to that."""
    transport = make_celery()
    transport.send([message("t", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        assert len(subscription.receive(limit=70_000, wait=ALIVE)) == 1


def test_a_routing_key_that_is_no_text_is_lived_with(make_celery: Make, pipe: Pipe, queue: str) -> None:
    """An exchange may have sent a message here by any bytes: it is received like any other."""
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
        found = received(subscription)
    assert (found.id, found.problem) == ("the-id", None)


def test_a_quorum_queue_that_nobody_told_us_of_drops_nothing_that_is_given_back(make_celery: Make, pipe: Pipe) -> None:
    """It counts what is put back and drops it in the end: from its first count on it is sent anew instead."""
    queue = pipe.declare(queue_name(), **{"x-queue-type": "quorum", "x-delivery-limit": 3})
    transport = make_celery(declare=False)
    transport.send([message("t", queue)])
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        for _ in range(8):
            (delivery,) = subscription.receive(limit=1, wait=ALIVE)
            assert list(subscription.settle([Settlement(delivery, Verdict.RETRY, counted=False)])) == [True]
        assert received(subscription).payload is not None


def test_the_rest_of_a_chain_that_cannot_be_addressed_is_not_told(bench: Bench) -> None:
    """An address of 300 letters fits into no message: the chain is buried with its reason, and the next one runs."""
    later = {"task": "n", "options": {"task_id": "x", "reply_to": "r" * 300}}
    bench.put(json.dumps([[1], {}, {"chain": [later]}]), {"task": "note", "id": str(uuid.uuid4())})
    bench.the_next_one_runs()
    assert "part of a chain" in bench.reason()


@pytest.mark.parametrize("id", [["a"], {"a": 1}, None, 7])
def test_any_id_can_be_looked_up(id: object) -> None:
    """What a foreign message has for an id never breaks the search for messages that come back."""
    raw = Raw(headers={"id": id, "retries": "many"}, delivery_info={"redelivered": True})
    arrived = Incoming(raw, "q", QueueConsumer(kombu.Queue("q"), "t", 1, Counter()))
    assert {arrived.key: 1} == {(None, 0): 1}


def test_a_message_that_is_too_large_for_the_broker_is_refused_for_good() -> None:
    """RabbitMQ says so as of a queue with other arguments; to try it again cannot help."""
    said = "PRECONDITION_FAILED - message size 2000123 is larger than configured max size 1000000"
    assert isinstance(translate(PreconditionFailed(said), "send"), TransportRefused)
