"""Which tasks wait in a queue: what `unstract-wire worker --strict` looks at before it subscribes."""

from __future__ import annotations

from collections.abc import Mapping

from transports.postgres.pool import Pool
from transports.postgres.statements import Statements, load_statements


def waiting_tasks(pool: Pool, statements: Statements, queue: str, limit: int) -> Mapping[str, int]:
    """Return how often each task is named by the first `limit` ready rows of `queue`. Raises errors of ours."""
    messages = statements.table("messages").replace("%", "%%")
    statement = load_statements("waiting.sql")["waiting_tasks"].format(messages=messages).encode()
    return dict(pool.execute("look at what waits", statement, {"queue": queue, "limit": limit}, idempotent=True))
