"""Rows of the tables: the one module that writes messages, settlements and replies as SQL parameters and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import orjson

from transports.postgres.connection import Rows
from unstract_core.codec import from_wire
from unstract_core.errors import MalformedPayload
from unstract_core.observability.diagnostics import WorkerState
from unstract_core.payload import TaskPayload
from unstract_core.transport import (
    DeadLetter,
    Delivery,
    Message,
    Reply,
    ReplyStatus,
    Settlement,
    check_delay,
    write_message,
)
from unstract_core.values import normalise
from unstract_core.values.limits import JSONValue

Fence: TypeAlias = tuple[str, int, str]
"""Identifies a delivery: the message id, the attempt, and the time when the message was enqueued."""


class Counts(NamedTuple):
    """A row of the statement `queues`."""

    queue: str
    ready: int
    in_flight: int
    delayed: int
    oldest: float | None
    dead: int
    cut: bool
    unknown: int


class RequeueRow(NamedTuple):
    """The row of the statement `requeue_expired`.

    Attributes:
        requeued: the number of rows that are ready again.
        next_due: seconds until the next of the scanned rows is due; None if there is none.
        first_ready: the priority of the first ready row of each queue; None if the statement did not read it.
        lowest: for each queue and priority, the lowest id that is ready again: (queue, priority, id).
        last: the position of the last queue, from 1, and the last id in it; None if no row was scanned.
        newest: the highest id of all claimed rows; None if there is none.
        scanned: the number of scanned rows.
        due_soon: rows that are due soon: (id, seconds).
        complete_to: the id up to which all rows were scanned, if a queue has more rows; else None.
    """

    requeued: int
    next_due: float | None
    first_ready: dict[str, int] | None
    lowest: list[tuple[str, int, int]] | None
    last: tuple[int, int] | None
    newest: int | None
    scanned: int
    due_soon: list[tuple[int, float]] | None
    complete_to: int | None


class SettledRow(NamedTuple):
    """A row of the statement `settle`.

    Attributes:
        place: the position of the settlement in its batch, from 1; None for a notification.
        kept: "kept" if a trigger kept the row, so that the settlement had no effect; else None.
    """

    place: int | None
    kept: str | None


class RemovedRow(NamedTuple):
    """A row of the statements `replay_dead` and `purge_dead`.

    Attributes:
        dead_id: the id of a chosen dead letter.
        removed: whether this statement removed it; False if another session did so meanwhile.
    """

    dead_id: int
    removed: bool


# Writing


def message_text(message: Message) -> str:
    """Return a message's payload as JSON text. Raises PayloadError for a value that the wire refuses."""
    return orjson.dumps(write_message(message)).decode()


def value_text(value: object, path: str) -> str:
    """Return one value as JSON text. Raises PayloadError, below `path`, for a value that the wire refuses."""
    return orjson.dumps(normalise(value, path=path)).decode()


def message_columns(messages: Sequence[Message], texts: list[str]) -> dict[str, list[Any]]:
    """Return messages, with their JSON texts, as the columns to insert."""
    return {
        "messages": texts,
        "queues": [message.queue for message in messages],
        "org_ids": [message.org_id for message in messages],
        "priorities": [message.priority for message in messages],
        "delays": [float(message.delay) for message in messages],
    }


def settle_parameters(batch: Sequence[Settlement]) -> dict[str, Any]:
    """Return a batch of settlements as arrays. Raises PayloadError for a value that the wire refuses."""
    for settlement in batch:
        check_delay(settlement.delay)
    follow_ups = [(place, each.follow_up) for place, each in enumerate(batch, 1) if each.follow_up is not None]
    replies = [(place, each.reply) for place, each in enumerate(batch, 1) if each.reply is not None]
    return {
        **fence_columns([each.delivery for each in batch]),
        "verdicts": [each.verdict.value for each in batch],
        "delays": [float(each.delay) for each in batch],
        "counted": [each.counted for each in batch],
        "reasons": [each.reason for each in batch],
        "results": [None if each.result is None else value_text(each.result, "$.result") for each in batch],
        "next_of": [place for place, _ in follow_ups],
        **_follow_up_columns([follow_up for _, follow_up in follow_ups]),
        "reply_of": [place for place, _ in replies],
        **_reply_columns([reply for _, reply in replies]),
    }


def fence_columns(deliveries: Sequence[Delivery]) -> dict[str, list[Any]]:
    """Return deliveries as the columns by which statements find their rows."""
    return {
        "ids": [int(delivery.id) for delivery in deliveries],
        "attempts": [delivery.attempt for delivery in deliveries],
        "enqueued": [bytes.fromhex(delivery.fence) for delivery in deliveries],
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


# Reading


def fence_of(delivery: Delivery) -> Fence:
    return delivery.id, delivery.attempt, delivery.fence


def fences_in(rows: Rows) -> set[Fence]:
    """Return the fences of the deliveries that the statement `renew` returns."""
    return {_fence(*row) for row in rows}


def contents_in(rows: Rows) -> dict[Fence, str | None]:
    """Return the JSON text of each delivery that the statement `contents` returns; None if it is too large."""
    return {_fence(*fence): text for *fence, text in rows}


def delivery_in(row: tuple[Any, ...]) -> Delivery:
    """Return a claimed row as a delivery. Its `raw` is empty if the row came without its content."""
    msg_id, queue, attempt, text, org_id, priority, enqueued = row
    payload, problem = (None, None) if text is None else payload_in(text, queue)
    return Delivery(str(msg_id), queue, attempt, payload, text or "", problem, org_id, priority, fence=enqueued.hex())


def payload_in(text: str, queue: str) -> tuple[TaskPayload | None, str | None]:
    """Return the payload in the JSON text of a queue's message, or the problem that makes it unreadable."""
    try:
        return from_wire(text, queue), None
    except MalformedPayload as exc:
        return None, str(exc)


def reply_in(key: str, row: tuple[Any, ...]) -> Reply:
    status, result, error, ttl = row
    return Reply(key, cast(ReplyStatus, status), value_in(result), error, ttl)


def dead_letter_in(row: tuple[Any, ...], omitted: str) -> DeadLetter:
    """Return a row of dead letters.

    Args:
        row: the row.
        omitted: the reason to give if the row came without its content.
    """
    dead_id, queue, message, reason, attempts, result, org_id, priority, enqueued_at, buried_at, whole = row
    return DeadLetter(
        id=str(dead_id),
        queue=queue,
        message=value_in(message),
        reason=reason,
        attempts=attempts,
        result=value_in(result),
        org_id=org_id,
        priority=priority,
        enqueued_at=enqueued_at,
        buried_at=buried_at,
        omitted="" if whole else omitted,
    )


def removed_rows_in(rows: Rows) -> list[RemovedRow]:
    return [RemovedRow(dead_id, removed) for dead_id, removed, *_ in rows]


def sent_ids_in(rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> list[str]:
    """Return new ids in the order of sending. The NULLs of notifications are omitted.

    Args:
        rows: the rows of a statement that sends. They are tuples, or dicts from a caller's cursor of psycopg2.
    """
    ids = [row["msg_id"] if isinstance(row, Mapping) else row[0] for row in rows]
    return [str(msg_id) for msg_id in sorted(int(msg_id) for msg_id in ids if msg_id is not None)]


def digest_in(rows: Rows) -> str | None:
    """Return the JSON text of the parts that the statement `digest` returns; None if there are none."""
    return rows[0][0] if rows else None


def workers_in(rows: Rows) -> list[WorkerState]:
    """Return the sessions that the diagnostic statement `workers` returns."""
    return [WorkerState(name, address, pid, state, since) for name, address, pid, state, since in rows]


def estimate_in(rows: Rows) -> int:
    """Return the number of rows that the planner estimates in the statement `ready_estimate`."""
    ((plan,),) = rows
    return int(plan[0]["Plan"]["Plan Rows"])


def first_column_in(rows: Rows) -> list[Any]:
    """Return the values of rows of one column."""
    return [value for (value,) in rows]


def value_in(text: str | None) -> JSONValue:
    """Return a stored JSON value, or its text if Python cannot parse it (too deep, a number too long)."""
    try:
        value: JSONValue = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


def _fence(msg_id: int, attempt: int, enqueued: bytes) -> Fence:
    return str(msg_id), attempt, enqueued.hex()
