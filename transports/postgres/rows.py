"""The parameters of the settle statement: a batch of settlements as columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from unstract_core.transport import Message, Reply, Settlement, check_delay, write_message
from unstract_core.values import normalise
from unstract_core.values.limits import JSONValue


def settle_parameters(batch: Sequence[Settlement]) -> dict[str, Any]:
    """Write a batch as arrays. Raises PayloadError for whatever the wire refuses, before anything is sent."""
    for one in batch:
        check_delay(one.delay)
    follow_ups = [(place, one.follow_up) for place, one in enumerate(batch, 1) if one.follow_up is not None]
    replies = [(place, one.reply) for place, one in enumerate(batch, 1) if one.reply is not None]
    return {
        "ids": [int(one.delivery.id) for one in batch],
        "attempts": [one.delivery.attempt for one in batch],
        "enqueued": [bytes.fromhex(one.delivery.fence) for one in batch],
        "verdicts": [one.verdict.value for one in batch],
        "delays": [float(one.delay) for one in batch],
        "counted": [one.counted for one in batch],
        "reasons": [one.reason for one in batch],
        "results": [None if one.result is None else value_text(one.result, "$.result") for one in batch],
        "next_of": [place for place, _ in follow_ups],
        **_follow_up_columns([follow_up for _, follow_up in follow_ups]),
        "reply_of": [place for place, _ in replies],
        **_reply_columns([reply for _, reply in replies]),
    }


def message_text(message: Message) -> str:
    """Write a message's payload as JSON text; raises PayloadError for whatever the wire refuses."""
    return orjson.dumps(write_message(message)).decode()


def value_text(value: object, path: str) -> str:
    """Write one value as JSON text; raises PayloadError below `path`."""
    return orjson.dumps(normalise(value, path=path)).decode()


def parsed(text: str | None) -> JSONValue:
    """Parse a stored value; what Python cannot (too deep, a number too long) stays text."""
    try:
        value: JSONValue = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


def message_columns(messages: Sequence[Message], texts: list[str]) -> dict[str, list[Any]]:
    """Write messages, and their texts, as the columns that are inserted."""
    return {
        "messages": texts,
        "queues": [message.queue for message in messages],
        "org_ids": [message.org_id for message in messages],
        "priorities": [message.priority for message in messages],
        "delays": [float(message.delay) for message in messages],
    }


def _follow_up_columns(messages: Sequence[Message]) -> dict[str, list[Any]]:
    columns = message_columns(messages, [message_text(message) for message in messages])
    return {f"next_{name}": column for name, column in columns.items()}


def _reply_columns(replies: Sequence[Reply]) -> dict[str, list[Any]]:
    return {
        "reply_keys": [reply.key for reply in replies],
        "reply_statuses": [reply.status for reply in replies],
        "reply_results": [
            value_text(reply.result, "$.reply.result") if reply.status == "completed" else None for reply in replies
        ],
        "reply_errors": [reply.error for reply in replies],
        "reply_ttls": [float(reply.ttl) for reply in replies],
    }
