"""Copies of a received message: for a retry, for the dead letters, and from there back to its queue."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Collection
from typing import Any

import attrs
import kombu

from transports.celery.compression import HEADER as COMPRESSION_HEADER
from transports.celery.compression import bytes_of, is_compressed
from transports.celery.decode import Received, read_message
from transports.celery.encode import DEAD_SUFFIX, Outgoing, eta_of
from unstract_core.transport import Settlement

DEAD_HEADERS = ("x-dead-id", "x-dead-queue", "x-dead-reason", "x-dead-attempts", "x-dead-at")
DEAD_RESULT = "x-dead-result"
"""The member of the body's third part with the result of a task that ran."""

_MAX_HEADERS = 100_000
"""The highest number of bytes of headers in a copy; RabbitMQ accepts frames of 128 KiB."""
_KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "message_id")
_COUNT_HEADERS = frozenset({"redelivered", "x-delivery-count", "x-death"})
"""The headers in which a broker counts the deliveries of a message; a copy begins without them."""
_UNTRIED = {"retries": 0, "eta": None, "expires": None}


def retry_copy(received: Received, *, retries: int, delay: float = 0.0) -> Outgoing:
    """Return the same message for another delivery.

    Args:
        received: The message.
        retries: The number of attempts that it has had.
        delay: The time in seconds before it may be started; 0 (default) keeps its current start time.
    """
    message, envelope = received.message, received.envelope
    keeps = not delay and (envelope.eta is not None or envelope.problem is not None)  # a malformed one stays malformed
    eta = message.headers.get("eta") if keeps else eta_of(delay)
    return _copy(message, received.queue, {**_fitting(_kept_headers(message)), "retries": retries, "eta": eta})


def dead_letter_copy(received: Received, settlement: Settlement) -> Outgoing:
    """Return the dead letter of a message, with the reason and the result of its settlement."""
    message, envelope = received.message, received.envelope
    dead_headers = {
        "x-dead-id": str(uuid.uuid4()),
        "x-dead-queue": received.queue,
        "x-dead-reason": settlement.reason,
        "x-dead-attempts": settlement.delivery.attempt,
        "x-dead-at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    copy = _copy(message, received.queue + DEAD_SUFFIX, {**_fitting(_kept_headers(message)), **dead_headers})
    if settlement.result is None or envelope.body is None:
        return copy
    args, kwargs, embed = envelope.body
    return _with_body(copy, (args, kwargs, {**embed, DEAD_RESULT: settlement.result}))


def replay_copy(message: kombu.Message, queue: str) -> Outgoing:
    """Return a dead letter as the message was before its first attempt."""
    fresh = {name: value for name, value in _kept_headers(message).items() if name not in DEAD_HEADERS}
    untried = {name: value for name, value in _UNTRIED.items() if name in fresh}
    copy = _copy(message, queue, {**fresh, **untried})
    body = read_message(message, queue, default_queue="").body
    if body is None or DEAD_RESULT not in body[2]:
        return copy
    args, kwargs, embed = body
    return _with_body(copy, (args, kwargs, {name: value for name, value in embed.items() if name != DEAD_RESULT}))


def unchanged_copy(message: kombu.Message, queue: str) -> Outgoing:
    """Return a message unchanged, for the queue from which it was received."""
    return attrs.evolve(_copy(message, queue, _kept_headers(message, without={"x-delivery-count"})), declared=False)


def _kept_headers(message: kombu.Message, without: Collection[str] = _COUNT_HEADERS) -> dict[str, Any]:
    dropped = {*without} if is_compressed(message) else {*without, COMPRESSION_HEADER}
    return {name: value for name, value in message.headers.items() if name not in dropped}


def _copy(message: kombu.Message, queue: str, headers: dict[str, Any]) -> Outgoing:
    return Outgoing(
        queue=queue,
        headers=headers,
        properties={name: message.properties[name] for name in _KEPT_PROPERTIES if name in message.properties},
        body=bytes_of(message),
        content_type=message.content_type or "application/data",
        content_encoding=message.content_encoding,
    )


def _with_body(copy: Outgoing, body: tuple[Any, Any, Any]) -> Outgoing:
    """Return a copy with another body, compressed as the message was."""
    headers = {name: value for name, value in copy.headers.items() if name != COMPRESSION_HEADER}
    return attrs.evolve(
        copy,
        body=body,
        headers=headers,
        content_type=None,
        content_encoding=None,
        compression=copy.headers.get(COMPRESSION_HEADER) or None,
    )


def _fitting(headers: dict[str, Any]) -> dict[str, Any]:
    """Drop the largest headers until the others fit into one frame of AMQP."""
    while len(ascii(headers)) > _MAX_HEADERS:
        largest = max(headers, key=lambda name: len(ascii(headers[name])))
        headers = {name: value for name, value in headers.items() if name != largest}
    return headers
