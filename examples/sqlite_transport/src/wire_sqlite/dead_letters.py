"""`SqliteDeadLetters`: the operator's access to dead letters."""

from __future__ import annotations

import datetime
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from unstract_core import DeadLetter

from wire_sqlite.database import Database
from wire_sqlite.messages import parsed
from wire_sqlite.statements import statement


class SqliteDeadLetters:
    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        with self._database.reading("list dead letters") as connection:
            rows = connection.execute(statement("find_dead"), {"queue": queue, "limit": limit})
            return [_dead_letter(*row) for row in rows]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        with self._database.reading("read dead letters") as connection:
            found = [connection.execute(statement("get_dead"), {"id": id}).fetchone() for id in _numbers(ids)]
            return [_dead_letter(*row) for row in found if row is not None]

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        with self._database.writing("replay dead letters") as connection:
            replayed = _chosen(connection, ids, queue, older_than=0.0)
            for id in replayed:
                connection.execute(statement("replay_dead"), {"id": id, "now": time.time()})
                connection.execute(statement("remove_dead"), {"id": id})
        self._database.notifier.notify()
        return [str(id) for id in replayed]

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        with self._database.writing("purge dead letters") as connection:
            purged = _chosen(connection, ids, queue, older_than=older_than)
            connection.executemany(statement("remove_dead"), [{"id": id} for id in purged])
        return len(purged)


def _chosen(
    connection: sqlite3.Connection, ids: Sequence[str] | None, queue: str | None, *, older_than: float
) -> list[int]:
    """Return the ids of the existing dead letters, the oldest first."""
    until = time.time() - older_than
    found = [id for (id,) in connection.execute(statement("dead_ids"), {"queue": queue, "until": until})]
    if ids is None:
        return found
    wanted = set(_numbers(ids))
    return [id for id in found if id in wanted]


def _numbers(ids: Sequence[str]) -> list[int]:
    """Return the ids that can be row ids; no other id exists."""
    return [int(id) for id in ids if id.isascii() and id.isdigit() and len(id) <= 19 and int(id) < 1 << 63]


def _dead_letter(id: int, queue: str, body: str, reason: str, attempts: int, result: str, *rest: Any) -> DeadLetter:
    org_id, priority, *times = rest
    sent, buried = (datetime.datetime.fromtimestamp(time, datetime.UTC) for time in times)
    return DeadLetter(str(id), queue, parsed(body), reason, attempts, parsed(result), org_id, priority, sent, buried)
