"""`ClaimPlanner`: chooses the claim that a subscription makes next.

A claim scans the index of ready rows. The index keeps the entries of claimed rows until a vacuum removes them. While a
session holds an old snapshot, a vacuum cannot remove them. So a claim over the whole index reads every message since
that snapshot. The planner avoids that with a frontier: for each queue and priority, the highest id that was claimed.

- A WHOLE scan reads the whole index, as often as its ScanBudget allows: every few milliseconds to every 30 s.
- A RECENT scan reads the rows beyond the frontier of 10 to 20 s ago, once a second.
- A FRONTIER scan reads the rows beyond the frontier, at any time.

A ready row can have an id below the frontier for two reasons:

- Its transaction committed after a higher id was claimed. A RECENT scan finds it.
- It became ready again. If this subscription made it ready, the frontier is lowered to it at once.

A WHOLE scan finds all others. Only rows below the frontier may be claimed after later ones. The planner sends nothing
to the server.

One statement merges the ready rows of at most MERGED queues. A subscription to more queues first reads which queues
have ready rows, and claims from the queues whose first rows come first. If more than MERGED queues have ready rows, it
reads them again after MERGED claimed rows, because so many rows come before the first row of every other queue. Without
prepared statements, the time to plan a claim grows with the number of merged queues, so the limit is UNPREPARED.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias, overload

import attrs

from transports.postgres.scan_budget import ScanBudget
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements
from unstract_core.payload import HIGHEST_PRIORITY, LOWEST_PRIORITY
from unstract_core.transport import Delivery

CHEAP = 0.01
"""Seconds that a WHOLE scan may take to run also when another scan has found nothing."""
MERGED = 64
"""The number of queues that one claim merges."""
UNPREPARED = 8
"""The number of queues that a claim merges without reading which have ready rows, if no statement is prepared."""
_SIZES = (8, MERGED)
"""The numbers of queues for which a subscription to many queues has statements, so that few must be prepared."""
RECENT_INTERVAL = 1.0
GENERATION = 10.0
"""Seconds between two records of the frontier."""

PRIORITIES = list(range(HIGHEST_PRIORITY, LOWEST_PRIORITY - 1, -1))

_Bounds: TypeAlias = dict[tuple[str, int], int]


class Scan(Enum):
    """The part of the index that a claim reads."""

    WHOLE = "whole"
    RECENT = "recent"
    FRONTIER = "frontier"


class Attempt(Enum):
    """The attempts of one `receive` to claim messages, in this order."""

    FIRST = "first"
    """As much of the index as the budgets allow."""
    IF_CHEAP = "if cheap"
    """The first attempt found nothing: the whole index if that is cheap."""
    WHOLE = "whole"
    """Nothing was found although rows are ready: the whole index."""
    UNBOUNDED = "unbounded"
    """Still nothing: also rows behind many that others have locked. This can read a whole queue."""


@attrs.frozen
class ClaimPlan:
    """A claim to make.

    Attributes:
        scan: the part of the index that it reads.
        began: when it was planned, on the monotonic clock.
        limit: the number of messages to claim at most.
        statement: the statement; None if no queue has ready rows.
        parameters: its parameters, except the lease.
        needs_ready_queues: whether the caller must read the queues with ready rows and plan again with them.
    """

    scan: Scan
    began: float
    limit: int
    statement: Statement | None
    parameters: Mapping[str, Any]
    needs_ready_queues: bool = False


@attrs.frozen
class ClaimResult:
    """A claim that was made, with the claimed messages in the order of the claim."""

    plan: ClaimPlan
    claimed: Sequence[Delivery]


@attrs.frozen
class ClaimCancelled:
    """A claim that the server cancelled because it took too long."""

    plan: ClaimPlan


@attrs.frozen
class ReadyAgain:
    """A row that this subscription made ready again."""

    queue: str
    priority: int
    msg_id: int


@attrs.frozen
class FirstReady:
    """The priority of the first ready row of each queue; a queue without ready rows is missing."""

    priorities: Mapping[str, int]


Event: TypeAlias = ClaimResult | ClaimCancelled | ReadyAgain | FirstReady


class ClaimPlanner:
    """Plans the claims of one subscription (`plan`) and learns from their results (`record`).

    Args:
        statements: the statements.
        queues: the queues of the subscription.
        prepared: whether its connection keeps the plan of a statement. Default True.
        clock: returns monotonic seconds. Default: the machine's clock.
    """

    def __init__(
        self,
        statements: Statements,
        queues: Sequence[str],
        *,
        prepared: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._statements = statements
        self._all = frozenset(queues)
        self._prepared = prepared
        self._clock = clock
        self._many = len(queues) > (MERGED if prepared else UNPREPARED)
        self._left = math.inf
        self._began = 0.0
        self._budgets = {Scan.WHOLE: ScanBudget(), Scan.RECENT: ScanBudget(RECENT_INTERVAL)}
        self._last_scan = Scan.WHOLE
        self._frontier: _Bounds = {}
        self._highest = 0
        # The frontier and the highest id when the last two generations began.
        self._generations: list[tuple[_Bounds, int]] = [({}, 0), ({}, 0)]
        self._generation_began = -math.inf
        self._select([] if self._many else queues)

    @property
    def reads_queues_first(self) -> bool:
        """Whether a WHOLE claim needs the queues with ready rows, because there are too many to merge all."""
        return self._many

    @property
    def queues(self) -> Sequence[str]:
        """The queues that the next claim merges."""
        return self._queues

    @property
    def highest(self) -> int:
        """The highest id that was claimed."""
        return self._highest

    @property
    def due_at(self) -> Mapping[Scan, float]:
        """When each scan with a budget may run again, on the monotonic clock."""
        return {scan: budget.due_at for scan, budget in self._budgets.items()}

    @property
    def sees_more_in(self) -> float:
        """Seconds until a claim reads more than the last one did; infinite if that read the whole index."""
        if self._last_scan is Scan.WHOLE:
            return math.inf
        due_at = self._budgets[Scan.WHOLE].due_at
        if self._last_scan is Scan.FRONTIER:
            due_at = min(due_at, self._budgets[Scan.RECENT].due_at)
        return max(0.0, due_at - self._clock())

    @overload
    def plan(self, limit: int, attempt: Attempt = ..., *, ready: None = None) -> ClaimPlan | None: ...

    @overload
    def plan(self, limit: int, attempt: Attempt = ..., *, ready: Sequence[tuple[str, int]]) -> ClaimPlan: ...

    def plan(
        self, limit: int, attempt: Attempt = Attempt.FIRST, *, ready: Sequence[tuple[str, int]] | None = None
    ) -> ClaimPlan | None:
        """Return the claim to make now; None if this attempt would find nothing.

        Args:
            limit: the number of messages to claim at most.
            attempt: the attempt within the current `receive`.
            ready: the queues with ready rows, if the last plan asked for them, also those of other workers. Each has
                the priority of its first ready row; the order is that of these rows.
        """
        if ready is None:
            self._began = self._clock()
        scan = Scan.WHOLE if attempt is not Attempt.FIRST or ready is not None else self._affordable()
        if attempt is Attempt.IF_CHEAP and ready is None and not self._whole_is_cheap():
            return None
        if scan is not Scan.WHOLE:
            return self._beyond(scan, limit)
        if ready is not None:
            self._choose(ready)
        elif self._many:
            return ClaimPlan(scan, self._began, limit, None, {}, needs_ready_queues=True)
        statement = self._unbounded if attempt is Attempt.UNBOUNDED else self._whole
        return self._claim(scan, limit, statement, self._names)

    def record(self, event: Event) -> None:
        """Learn from the result of a claim, or from rows that are ready."""
        match event:
            case ClaimResult(plan, claimed):
                self._record_result(plan, claimed)
            case ClaimCancelled(plan):
                if plan.scan in self._budgets:
                    self._budgets[plan.scan].record_failure(plan.began, self._clock())
            case ReadyAgain(queue, priority, msg_id):
                key = (queue, priority)
                self._frontier[key] = min(self._frontier.get(key, 0), msg_id - 1)
            case FirstReady(priorities):
                self._record_first_ready(priorities)

    def _affordable(self) -> Scan:
        now = self._clock()
        return next((scan for scan, budget in self._budgets.items() if now >= budget.due_at), Scan.FRONTIER)

    def _whole_is_cheap(self) -> bool:
        return self._last_scan is not Scan.WHOLE and self._budgets[Scan.WHOLE].seconds <= CHEAP

    def _choose(self, ready: Sequence[tuple[str, int]]) -> None:
        """Claim from the first of the queues that have ready rows."""
        first = [(queue, priority) for queue, priority in ready if queue in self._all]
        self._left = MERGED if len(first) > MERGED else math.inf
        names = [queue for queue, _ in first[:MERGED]]
        if names != self._queues:
            self._select(names)
        self._record_first_ready(dict(first[:MERGED]))

    def _select(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)
        size = len(queues)
        if self._many and self._prepared:
            size = next(size for size in _SIZES if size >= len(queues))
        self._slots: list[str | None] = [*queues, *[None] * (size - len(queues))]
        self._whole, self._names = self._statements.claim(self._slots)
        self._unbounded, _ = self._statements.claim(self._slots, bounded=False)
        self._claim_frontier, _ = self._statements.claim_frontier(self._slots)

    def _beyond(self, scan: Scan, limit: int) -> ClaimPlan:
        """Return a claim beyond the current frontier, or beyond the frontier of ten to twenty seconds ago."""
        bounds = self._frontier
        if scan is Scan.RECENT:
            earlier, _ = self._generations[0]
            bounds = {key: min(bound, earlier.get(key, 0)) for key, bound in bounds.items()}
        frontier = {
            f"frontier_{number}": [0 if queue is None else bounds.get((queue, priority), 0) for priority in PRIORITIES]
            for number, queue in enumerate(self._slots)
        }
        parameters = {**self._names, **frontier, "priorities": PRIORITIES}
        return self._claim(scan, limit, self._claim_frontier, parameters)

    def _claim(self, scan: Scan, limit: int, statement: Statement, parameters: Mapping[str, Any]) -> ClaimPlan:
        # No row of another queue may come before those that are claimed.
        limit = int(min(limit, self._left))
        return ClaimPlan(scan, self._began, limit, statement if self._queues else None, {**parameters, "limit": limit})

    def _record_result(self, plan: ClaimPlan, claimed: Sequence[Delivery]) -> None:
        ended = self._clock()
        self._last_scan = plan.scan
        if (budget := self._budgets.get(plan.scan)) is not None:
            budget.record(plan.began, ended)
        if ended - self._generation_began >= GENERATION:
            self._generations = [self._generations[1], (dict(self._frontier), self._highest)]
            self._generation_began = ended
        full = len(claimed) == plan.limit
        self._left -= len(claimed)
        turn_of_others = self._left <= 0 or (not full and self._left < math.inf)
        # A full WHOLE claim that found a row below the frontier may have left more, of other priorities too.
        more_below = plan.scan is Scan.WHOLE and full and self._any_below(claimed)
        if turn_of_others or more_below:
            self._budgets[Scan.WHOLE].due_at = ended
        # A full claim may have left rows below the frontier in the priority at which it ends.
        unfinished = claimed[-1].priority if claimed and full else None
        last = {(delivery.queue, delivery.priority): int(delivery.id) for delivery in claimed}
        for key, msg_id in last.items():
            self._frontier[key] = msg_id if key[1] == unfinished else max(msg_id, self._frontier.get(key, 0))
            self._highest = max(self._highest, msg_id)

    def _any_below(self, claimed: Sequence[Delivery]) -> bool:
        return any(int(row.id) <= self._frontier.get((row.queue, row.priority), 0) for row in claimed)

    def _record_first_ready(self, priorities: Mapping[str, int]) -> None:
        """Raise the frontier of each higher priority: all its old rows were claimed."""
        _, seen = self._generations[0]
        for queue in self._queues:
            for priority in PRIORITIES:
                if priority > priorities.get(queue, 0):
                    key = (queue, priority)
                    self._frontier[key] = max(self._frontier.get(key, 0), seen)
