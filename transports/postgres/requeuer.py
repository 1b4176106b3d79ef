"""`Requeuer`: makes messages ready again when their lease or delay has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from transports.postgres.claim_planner import MERGED, ClaimPlanner, FirstReady, ReadyAgain
from transports.postgres.content_errors import was_cancelled
from transports.postgres.expiry_planner import LIMIT, ExpiryPlanner, ExpiryScan
from transports.postgres.listener import Listener
from transports.postgres.rows import RequeueRow
from transports.postgres.statements import Statements
from unstract_core.errors import TransportError


@attrs.frozen
class RequeueResult:
    """The result of one `run`.

    Attributes:
        requeued: the number of messages that are ready again.
        next_in: seconds until the next run; infinite if no claimed row has an end.
        any_ready: whether any message of the queues is ready now.
    """

    requeued: int
    next_in: float
    any_ready: bool


class Requeuer:
    """Runs the scans of an ExpiryPlanner for one subscription, and informs its ClaimPlanner of rows that are ready.

    Args:
        listener: the subscription's connection.
        statements: the statements of its schema.
        queues: its queues.
        claims: its claim planner.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        listener: Listener,
        statements: Statements,
        queues: Sequence[str],
        claims: ClaimPlanner,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._listener = listener
        self._statements = statements
        self._queues = list(queues)
        self._claims = claims
        self._any_queue = len(self._queues) > MERGED
        self.planner = ExpiryPlanner([""] if self._any_queue else self._queues, clock=clock)

    def run(self, ahead: float, hurried: Callable[[], bool]) -> RequeueResult:
        """Make expired messages ready again, at most LIMIT in one statement.

        Args:
            ahead: seconds from now within which a row counts as due.
            hurried: returns True as soon as the caller must do something else.

        Raises:
            TransportError: a statement failed.
        """
        was_in_parts = self.planner.in_parts
        scan = self.planner.plan(ahead, self._claims.highest)
        result = self._run(scan)
        in_parts = was_in_parts or self.planner.in_parts
        if scan.full and in_parts and result.requeued < LIMIT and not hurried():
            recent = self._run(self.planner.plan(ahead, self._claims.highest, recent=True))
            return RequeueResult(result.requeued + recent.requeued, recent.next_in, result.any_ready)
        return result

    def _run(self, scan: ExpiryScan) -> RequeueResult:
        name = "requeue_expired" if scan.full else "requeue_expired_recent"
        statement = self._statements[f"{name}_any_queue" if self._any_queue else name]
        parameters = {"queues": self._queues, **scan.parameters}
        try:
            ((*columns,),) = self._listener.execute("requeue expired messages", statement, parameters)
        except TransportError as exc:
            if was_cancelled(exc):
                self.planner.record_cancelled(scan)
            raise
        row = RequeueRow(*columns)
        next_in = self.planner.record(scan, row)
        if row.first_ready is not None:
            self._claims.record(FirstReady(row.first_ready))
        for queue, priority, msg_id in row.lowest or ():
            self._claims.record(ReadyAgain(queue, priority, msg_id))
        any_ready = bool(self._claims.queues) if self._any_queue else bool(row.first_ready)
        return RequeueResult(row.requeued, next_in, any_ready)
