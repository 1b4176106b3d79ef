"""The rights on the tables that each operation needs, so that an error can say which to grant.

docs/security.md has them as GRANT statements, by role.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Rights: TypeAlias = Mapping[str, Mapping[str, tuple[str, ...]]]
"""For each table and right, the columns that need it; no columns for a right on the whole table."""

_MESSAGE = ("msg_id", "queue_name", "message", "org_id", "enqueued_at", "vt", "read_ct", "priority", "state")
_RESULT = ("task_id", "status", "result", "error", "created_at", "expires_at")
_LETTER = ("msg_id", "queue_name", "message", "org_id", "priority", "attempts", "reason", "result", "enqueued_at")

CONSUMER: Rights = {
    "pg_queue_message": {
        "SELECT": _MESSAGE,
        "INSERT": _MESSAGE[1:],
        "UPDATE": ("state", "vt", "read_ct"),
        "DELETE": (),
    },
    "pg_task_result": {"SELECT": _RESULT, "INSERT": _RESULT, "UPDATE": _RESULT[1:]},
    "pg_queue_dead_letter": {
        "SELECT": ("dead_id", *_LETTER, "buried_at"),
        "INSERT": (*_LETTER, "buried_at"),
    },
}
"""The rights that a consumer needs. It works without DELETE on pg_task_result if another consumer purges replies."""

_SEND = {"pg_queue_message": "INSERT on its columns but msg_id, and SELECT on its column msg_id"}
_BY_OPERATION: Mapping[str, Mapping[str, str]] = {
    "send": _SEND,
    "send within the caller's transaction": _SEND,
    "read a reply": {"pg_task_result": "SELECT"},
    "look for replies": {"pg_task_result": "SELECT"},
    "clear a reply": {"pg_task_result": "SELECT, and UPDATE on its columns result and error"},
    "purge expired replies": {"pg_task_result": "SELECT and DELETE"},
    "look at the queues": {"pg_queue_message": "SELECT", "pg_queue_dead_letter": "SELECT"},
    "list dead letters": {"pg_queue_dead_letter": "SELECT"},
    "read dead letters": {"pg_queue_dead_letter": "SELECT"},
    "replay dead letters": {"pg_queue_dead_letter": "SELECT and DELETE", **_SEND},
    "purge dead letters": {"pg_queue_dead_letter": "SELECT and DELETE"},
}
_CONSUMERS = {
    "pg_queue_message": "SELECT, DELETE, INSERT on its columns but msg_id, UPDATE on its columns state, vt and read_ct",
    "pg_task_result": "SELECT, INSERT, UPDATE and DELETE",
    "pg_queue_dead_letter": "SELECT and INSERT",
}


def needed(operation: str, message: str) -> str:
    """Return the rights that an operation needs on the table, sequence or schema in a server's message.

    The message may be in any language; the names in it are not.

    Args:
        operation: the purpose of the failed statement.
        message: the server's message.

    Returns:
        A phrase for the error's text; "" if the message names no object of this package.
    """
    if operation == "migrate":
        return "it takes the owner of the tables, with CREATE on the schema (on the database, for a new schema)"
    if operation.startswith("check "):
        return "it takes SELECT on the table" if "pg_" in message else "it takes USAGE on the schema"
    if "_id_seq" in message:
        return "it takes USAGE on the sequence"
    for table, rights in _BY_OPERATION.get(operation, _CONSUMERS).items():
        if table in message:
            return f"it takes {rights}"
    return "" if "pg_" in message else "it takes USAGE on the schema"
