"""Messages as rows of the table."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

from unstract_core import Delivery, MalformedPayload, Message, from_wire
from unstract_core.transport import write_message
from unstract_core.values.limits import JSONValue

from wire_sqlite.statements import statement

Row = dict[str, Any]


def written(message: Message) -> Row:
    """Return a message as the parameters of `send`; raises PayloadError if the wire cannot carry it."""
    return {
        "body": json.dumps(write_message(message), ensure_ascii=False),
        "queue": message.queue,
        "org_id": message.org_id,
        "priority": message.priority,
        "delay": float(message.delay),
    }


def insert(cursor: sqlite3.Cursor, rows: Iterable[Row]) -> list[str]:
    """Insert rows in the open transaction, and return their ids."""
    now, ids = time.time(), []
    for row in rows:
        cursor.execute(statement("send"), row | {"now": now})
        ids.append(str(cursor.lastrowid))
    return ids


def delivered(row: Sequence[Any]) -> Delivery:
    """Return a claimed row as a delivery; an unreadable one has a problem instead of a payload."""
    id, queue, attempt, body, org_id, priority, fence = row
    payload, problem = None, None
    try:
        payload = from_wire(body, queue)
    except MalformedPayload as exc:
        problem = str(exc)
    return Delivery(str(id), queue, attempt, payload, body, problem, org_id, priority, fence=fence)


def parsed(text: str) -> JSONValue:
    """Return a stored JSON text as a value; text that is not JSON is returned unchanged."""
    try:
        value: JSONValue = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value
