"""`QueueInspector`: counts messages and lists waiting tasks and connected workers, for operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transports.postgres.connection import Rows
from transports.postgres.diagnostics.probe import diagnostic_statements
from transports.postgres.pool import Pool
from transports.postgres.rows import Counts, estimate_in, first_column_in, workers_in
from transports.postgres.statements import Statements
from unstract_core.observability.diagnostics import WorkerState
from unstract_core.transport import QueueState

_MOST_COUNTED = 100_000
"""The number of messages of a queue in one state that `queues` counts, unless it reads many queues."""
_FEWEST_COUNTED = 1_000
"""The same for very many queues."""


class QueueInspector:
    """Reads the state of queues through a pool. Thread-safe."""

    def __init__(self, pool: Pool, statements: Statements) -> None:
        self._pool = pool
        self._statements = statements

    def queues(self, names: Sequence[str] | None) -> Sequence[QueueState]:
        """Return the state of each queue of `names`; None: of all queues that hold a message."""
        if names is None:
            names = first_column_in(self._inspect("queue_names", {"most": _MOST_COUNTED}))
        wanted = list(dict.fromkeys(names))
        most = max(_FEWEST_COUNTED, min(_MOST_COUNTED, 10 * _MOST_COUNTED // max(1, len(wanted))))
        rows = self._inspect("queues", {"names": wanted, "most": most})
        return [self._state(most, Counts(*row)) for row in rows]

    def waiting_tasks(self, queue: str, limit: int) -> Mapping[str, int]:
        """Return the names of the tasks of the first `limit` ready messages, with their counts."""
        parameters = {"queue": queue, "limit": limit}
        return dict(
            self._pool.execute("list waiting tasks", self._statements["waiting_tasks"], parameters, idempotent=True)
        )

    def workers(self) -> Sequence[WorkerState]:
        """Return the sessions of this package in the database."""
        statement = diagnostic_statements(self._statements)["workers"]
        return workers_in(self._pool.execute("look at the workers", statement, {}, idempotent=True))

    def _state(self, most: int, row: Counts) -> QueueState:
        ready = row.ready
        if ready >= most:
            ready = max(ready, estimate_in(self._inspect("ready_estimate", {"queue": row.queue})))
        return QueueState(
            row.queue, ready, row.in_flight, row.delayed, row.oldest, row.dead, row.unknown, estimated=row.cut
        )

    def _inspect(self, name: str, parameters: dict[str, Any]) -> Rows:
        return self._pool.execute("look at the queues", self._statements[name], parameters, idempotent=True)
