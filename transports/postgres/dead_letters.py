"""The operator's side: buried messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transports.postgres.connections import Pool
from transports.postgres.notifier import Channels
from transports.postgres.statements import Statements
from unstract_core.transport import DeadLetter
from unstract_core.values import JSONValue


class PostgresDeadLetters:
    """The table pg_queue_dead_letter."""

    def __init__(self, pool: Pool, statements: Statements, channels: Channels) -> None:
        self._pool = pool
        self._statements = statements
        self._channels = channels

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        rows = self._execute("list dead letters", "find_dead", {"queue": queue, "limit": limit})
        return [_letter(*row) for row in rows]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        return [_letter(*row) for row in self._execute("read dead letters", "get_dead", {"ids": _numbers(ids)})]

    def replay(self, ids: Sequence[str]) -> Sequence[str]:
        parameters = {"ids": _numbers(ids), "channel": self._channels.queues}
        return [str(row[0]) for row in self._execute("replay dead letters", "replay_dead", parameters)]

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        parameters = {
            "ids": None if ids is None else _numbers(ids),
            "queue": queue,
            "older_than": float(older_than),
        }
        with self._pool.connection("purge dead letters") as connection:
            return connection.execute(self._statements["purge_dead"], parameters).rowcount

    def _execute(self, doing: str, name: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        with self._pool.connection(doing) as connection:
            return connection.execute(self._statements[name], parameters).fetchall()


def _numbers(ids: Sequence[str]) -> list[int]:
    """Return the ids that can be rows at all: anything else is simply not there."""
    return [int(id) for id in ids if id.isascii() and id.isdigit() and len(id) <= 18]


def _letter(dead_id: int, queue: str, message: Any, reason: str, attempts: int, result: Any, *rest: Any) -> DeadLetter:
    return DeadLetter(str(dead_id), queue, _parsed(message), reason, attempts, _parsed(result), *rest)


def _parsed(text: str | None) -> JSONValue:
    """Parse what was stored; what Python cannot (too deep, a number too long) stays text."""
    try:
        value: JSONValue = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value
