"""The operator's side: buried messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transports.postgres.errors import NotifyQueueFull
from transports.postgres.notifier import Channels
from transports.postgres.pool import Pool
from transports.postgres.settling import parsed
from transports.postgres.statements import Statements
from unstract_core.transport import DeadLetter


class PostgresDeadLetters:
    """The table pg_queue_dead_letter."""

    def __init__(self, pool: Pool, statements: Statements, channels: Channels) -> None:
        self._pool = pool
        self._statements = statements
        self._channels = channels

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest letters first."""
        rows = self._read("list dead letters", "find_dead", {"queue": queue, "limit": limit})
        return [_letter(*row) for row in rows]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return those of `ids` that are there."""
        return [_letter(*row) for row in self._read("read dead letters", "get_dead", {"ids": _numbers(ids)})]

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each again as new, the oldest first, and remove it here, in one commit; return the ids of those."""
        parameters = {"ids": None if ids is None else _numbers(ids), "queue": queue}
        try:
            rows = self._replay({**parameters, "channel": self._channels.queues})
        except NotifyQueueFull:
            rows = self._replay({**parameters, "channel": None})
        return [str(row[0]) for row in rows]

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove for good those that were buried more than `older_than` seconds ago; return how many."""
        parameters = {
            "ids": None if ids is None else _numbers(ids),
            "queue": queue,
            "older_than": float(older_than),
        }
        ((purged,),) = self._pool.execute("purge dead letters", self._statements["purge_dead"], parameters)
        return int(purged)

    def _replay(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        return self._pool.execute("replay dead letters", self._statements["replay_dead"], parameters)

    def _read(self, doing: str, name: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        return self._pool.execute(doing, self._statements[name], parameters, harmless=True)


def _numbers(ids: Sequence[str]) -> list[int]:
    """Return the ids that can be rows at all: anything else is simply not there."""
    return [int(id) for id in ids if id.isascii() and id.isdigit() and len(id) <= 18]


def _letter(dead_id: int, queue: str, message: Any, reason: str, attempts: int, result: Any, *rest: Any) -> DeadLetter:
    return DeadLetter(str(dead_id), queue, parsed(message), reason, attempts, parsed(result), *rest)
