"""Fuzz the decoding and settling of a broker's message by a subscription.

Every message is a payload or a problem, and never an exception. Every follow-up of its outcome can be sent, or is
rejected with PayloadError. An input selects a golden message and its changes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections import Counter
from typing import Any

import amqp
import atheris
from amqp.serialization import decode_properties_basic
from kombu.serialization import dumps

with atheris.instrument_imports(include=["unstract_core", "transports"]):
    from transports.celery.broker_settings import BrokerSettings
    from transports.celery.copies import replay_copy, retry_copy, unchanged_copy
    from transports.celery.decode import Envelope, Received, read_message
    from transports.celery.incoming import Incoming, QueueConsumer
    from transports.celery.settlement_messages import settlement_messages
    from unstract_core import Delivery, from_wire, to_wire
    from unstract_core.codec import salvage
    from unstract_core.continuation import rejection, settle
    from unstract_core.errors import PayloadError
    from unstract_core.outcomes import Outcome, Raised, Rejected, RetryAsked, RetryPolicy, Returned

from fuzz.drawn import Drawn
from fuzz.findings import keep
from tools.golden import QUEUE, Golden, corpus, read, received

SEEDS = [read(path) for path in corpus()]
NAMES = sorted({name for golden in SEEDS for name in golden.headers})
NAMES += ["x-org-id", "x-delivery-count", "x-dead-id", "x-dead-result", "x-death", "compression", "redelivered"]
NAMES += ["callbacks", "errbacks", "args", "kwargs", "options", "queue", "task_id", "link", "link_error", "countdown"]
NAMES += ["immutable", "subtask_type", "reply_to", "callback_kwargs", "org_id", "workload_type", "pipeline_priority"]
NAMES += [
    "application/json",
    "application/x-gzip",
    "zlib",
    "bzip2",
    "utf-8",
    "1e400",
    "2020-01-01",
    "0001-01-01T00:00:00",
]
NAMES += ["9999-12-31T23:59:59.999999-23:59", "2020-W01-1T00Z", "x" * 255]
SETTINGS = BrokerSettings("memory://", {}, True, 1.0, 1.0, 0.0, False, {})
POLICY = RetryPolicy()
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
OUTCOMES: list[Outcome] = [
    Returned({"success": True}),
    Raised("ValueError", "bad"),
    RetryAsked("Retry", "again", delay=1.0),
    Rejected("no"),
]
PROPERTIES: dict[str, list[Any]] = {
    "content_type": ["application/json", "application/x-yaml", "application/data", "json", ""],
    "content_encoding": ["utf-8", "binary", "us-ascii", "utf-16", "base64", "idna", "klingon", "a\0b", ""],
    "priority": [0, 1, 5, 10, 11, 255],
    "delivery_mode": [1, 2, 7],
    "expiration": ["0", "60000", "x"],
}
"""The possible values of these properties; every other property of a message is a text."""


def check(headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> None:
    """Raise AssertionError, or the target's exception, if a guarantee is broken."""
    message = received(headers, properties, body)
    envelope = read_message(message, QUEUE, default_queue="celery")
    arrived = Incoming(message, QUEUE, QueueConsumer(None, "", 1, Counter()))
    if envelope.eta is not None:
        envelope.eta.timestamp()
    hash(arrived.key)
    delivery = _delivery(envelope)
    it = Received(message, envelope, QUEUE)
    for outcome in _outcomes(delivery):
        settlement = settle(delivery, outcome, POLICY)
        if settlement.reason.startswith("no rule could be applied"):
            raise AssertionError(settlement.reason)
        try:
            sent = settlement_messages(it, settlement, SETTINGS, "celery").values()
        except PayloadError:
            continue
        for one in sent:
            _write(one)
    for one in (
        retry_copy(it, retries=envelope.attempt),
        replay_copy(message, QUEUE),
        unchanged_copy(message, QUEUE),
    ):
        _write(one)


def _delivery(envelope: Envelope) -> Delivery:
    if (envelope.payload is None) == (envelope.problem is None):
        raise AssertionError("a message is a payload or a problem")
    if (envelope.problem or "").startswith("unreadable ("):
        raise AssertionError(f"the decoder raised what it does not foresee: {envelope.problem}")
    with contextlib.suppress(PayloadError):  # the fairness and the names are read unchecked
        if envelope.payload is not None and from_wire(to_wire(envelope.payload)) != envelope.payload:
            raise AssertionError("the payload reads back as something else")
    if envelope.attempt < 1 or not 1 <= envelope.priority <= 10 or type(envelope.org_id) is not str:
        raise AssertionError("an attempt, a priority or an owner that is none")
    salvage(envelope.raw)
    for moment in (envelope.eta, envelope.expires):
        if moment is not None:
            moment.timestamp()
    return envelope.delivery(envelope.id or "q/1", QUEUE)


def _outcomes(delivery: Delivery) -> list[Outcome]:
    rejected = rejection(delivery, {"execute_extraction", "step"}, POLICY, NOW)
    return [rejected] if rejected is not None else OUTCOMES


def _write(one: Any) -> None:
    """Encode the messages for the wire."""
    if one.content_type is None:
        dumps(one.body, serializer="json")
    elif not isinstance(one.body, bytes | bytearray | memoryview):
        raise AssertionError(f"a body that is copied is a {type(one.body).__name__}")
    properties = {**one.properties, "content_type": one.content_type or "application/json"}
    frame = amqp.Message(b"", application_headers=one.headers, **properties)._serialize_properties()
    if len(frame) > 131_000:
        raise AssertionError(f"the headers of {len(frame)} bytes fit in no frame of RabbitMQ's")


def drawn(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    source = Drawn(data, NAMES)
    seed: Golden = source.one_of(SEEDS)
    headers, properties, body = dict(seed.headers), dict(seed.properties), seed.body
    for _ in range(1 + source.number(4)):
        part = source.number(8)
        if part < 3:
            headers = _table(source.changed(headers, foreign=True), headers)
        elif part < 6:
            body = _changed_json(source, body)
        elif part == 6:
            properties = _changed_properties(source, properties)
        else:
            body = source.changed_bytes(body)
    return headers, properties, body


def _table(found: Any, before: dict[str, Any]) -> dict[str, Any]:
    return found if isinstance(found, dict) else before


def _changed_json(source: Drawn, body: bytes) -> bytes:
    try:
        return json.dumps(source.changed(json.loads(body))).encode()
    except (ValueError, RecursionError):  # the bytes are not JSON, or the value is too deep
        return source.changed_bytes(body)


def _changed_properties(source: Drawn, properties: dict[str, Any]) -> dict[str, Any]:
    name = source.one_of([*PROPERTIES, "correlation_id", "reply_to", "message_id", "type", "app_id"])
    if not source.number(4):
        return {key: value for key, value in properties.items() if key != name}
    return {**properties, name: source.one_of(PROPERTIES[name]) if name in PROPERTIES else source.text()}


def _travelled(headers: dict[str, Any], properties: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the messages as they arrive; raises the error of AMQP's writer for those that cannot be sent."""
    frame = amqp.Message(b"", application_headers=headers, **properties)._serialize_properties()
    found, _ = decode_properties_basic(frame, 0)
    return found.pop("application_headers", {}), found


def test_one(data: bytes) -> None:
    headers, properties, body = drawn(data)
    try:
        headers, properties = _travelled(headers, properties)
    except Exception:  # no client can have sent it
        return
    try:
        check(headers, properties, body)
    except Exception as exc:
        about = f"{type(exc).__name__}: {exc}"
        try:
            text = Golden(about, "none", "none", headers, properties, body).text()
        except (TypeError, ValueError):  # headers that JSON cannot represent
            text = repr((about, headers, properties, body))
        keep("celery", text)
        raise


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
