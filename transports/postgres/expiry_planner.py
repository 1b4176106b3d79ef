"""`ExpiryPlanner`: chooses the claimed rows that are scanned next for expired leases and delays.

No index has the rows in the order of time, because the renewal of a lease must be a HOT update. So a full scan reads
all claimed rows, in parts if they are many, for a small part of the time. Between full scans, a recent scan reads rows
that are known to be due and rows that are new. A row is new if its id is higher than all ids at the last scan. A margin
covers transactions that had not committed at that time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import attrs

from transports.postgres.rows import RequeueRow
from transports.postgres.scan_budget import LONGEST_REST, ScanBudget

INTERVAL = 0.5
"""Seconds between two scans."""
LIMIT = 500
"""The number of rows that one scan makes ready. If there are more, the next scan follows at once."""
PART = 20_000
"""The number of claimed rows that a full scan reads at once."""
NEW = 1_000
"""The number of new rows that a recent scan reads."""
MOST_KNOWN = 20_000
"""The number of rows due soon that are remembered."""
OLDEST = 30.0
"""Seconds for which the highest id of a scan is remembered."""
_SHARED = 8
"""A recent scan of many queues reads so many times NEW rows at most, the same number of each queue."""
_COMMIT_MARGIN = 2.0
"""Seconds that a claim or a settlement may take to commit."""
_SLOW_COMMIT_MARGIN = 20.0
"""Seconds that a slow transaction may take. A recent scan once a second allows for that."""
_SLOW_COMMIT_INTERVAL = 1.0
_LOWEST = -(2**63)


@attrs.frozen
class ExpiryScan:
    """A scan for expired leases and delays.

    Attributes:
        full: whether it reads a part of all claimed rows; else it reads those that are due and those that are new.
        began: when it was planned, on the monotonic clock.
        parameters: the parameters of the statement `requeue_expired`, or of its recent variant.
        budget: the budget of the scan; None if it has none.
        highest: the highest id that the subscription had claimed.
    """

    full: bool
    began: float
    parameters: dict[str, Any]
    budget: ScanBudget | None
    highest: int


class ExpiryPlanner:
    """Plans the scans of one subscription (`plan`) and learns from their results (`record`).

    Args:
        queues: the queues, which are scanned one after the other. For a subscription to too many queues, one name means
            all queues of the table.
        clock: returns monotonic seconds. Default: the machine's clock.
    """

    def __init__(self, queues: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._queues = list(queues)
        self._clock = clock
        self._share = min(NEW, _SHARED * NEW // len(self._queues))
        self._place = 0
        self._after = _LOWEST
        self._due_soon: dict[int, float] = {}
        self._highest_at: list[tuple[float, int]] = []
        self._full_budget = ScanBudget()
        self._slow_commit_budget = ScanBudget(_SLOW_COMMIT_INTERVAL)
        self._due_at = 0.0

    @property
    def is_due(self) -> bool:
        """Whether the next scan is due."""
        return self._clock() >= self._due_at

    @property
    def full_due_at(self) -> float:
        """When the next full scan may run, on the monotonic clock."""
        return self._full_budget.due_at

    @property
    def in_parts(self) -> bool:
        """Whether the last full scan did not reach the end of the claimed rows."""
        return (self._place, self._after) != (0, _LOWEST)

    def plan(self, ahead: float, highest: int, *, recent: bool = False) -> ExpiryScan:
        """Return the next scan: a full one if its budget allows.

        Args:
            ahead: seconds from now within which a row counts as due.
            highest: the highest id that the subscription has claimed.
            recent: whether to plan a recent scan in any case. Default False.
        """
        now = self._clock()
        common = {"limit": LIMIT, "ahead": LONGEST_REST}
        if not recent and now >= self._full_budget.due_at:
            return ExpiryScan(True, now, {**common, **self.next_part()}, self._full_budget, highest)
        allows_slow_commits = now >= self._slow_commit_budget.due_at
        margin = _SLOW_COMMIT_MARGIN if allows_slow_commits else _COMMIT_MARGIN
        budget = self._slow_commit_budget if allows_slow_commits else None
        return ExpiryScan(False, now, {**common, **self._due_and_new(now, ahead, margin)}, budget, highest)

    def record(self, scan: ExpiryScan, row: RequeueRow) -> float:
        """Learn from a scan's result; return the seconds until the next scan."""
        now = self._clock()
        if scan.budget is not None:
            scan.budget.record(scan.began, now)
        complete = row.scanned < scan.parameters["window"] if scan.full else row.complete_to is None
        if row.requeued < LIMIT:
            self._due_at = now + INTERVAL
            if scan.full:
                self._record_part(now, row, to_the_end=complete)
            else:
                self._record_recent(now, scan, scan.highest if complete else row.complete_to)
            self.is_due_soon(row.due_soon or ())
        else:
            self._due_at = 0.0
        return max(0.0, self._next_at(scan, row, now, all_read=complete and scan.full) - now)

    def record_cancelled(self, scan: ExpiryScan) -> None:
        """Record that the server cancelled a scan because it took too long."""
        if scan.budget is not None:
            scan.budget.record_failure(scan.began, self._clock())

    def is_due_soon(self, rows: Iterable[tuple[int, float]]) -> None:
        """Remember rows that are due soon: (id, seconds)."""
        now = self._clock()
        self._due_soon.update((msg_id, now + seconds) for msg_id, seconds in rows)
        if len(self._due_soon) > MOST_KNOWN:
            self._due_soon = dict(sorted(self._due_soon.items(), key=itemgetter(1))[: MOST_KNOWN // 2])

    def next_part(self) -> dict[str, Any]:
        """Return the parameters for the next part of all claimed rows."""
        walked = self._queues[self._place :]
        afters = [self._after, *[_LOWEST] * (len(walked) - 1)]
        return {"walked": walked, "afters": afters, "share": PART, "window": PART, "known": []}

    def _due_and_new(self, now: float, ahead: float, margin: float) -> dict[str, Any]:
        """Return the parameters for rows that are known to be due, and for new rows."""
        due = [msg_id for msg_id, due_at in self._due_soon.items() if due_at <= now + ahead]
        first = self._highest_at[0][1] if self._highest_at else _LOWEST
        after = next((last for moment, last in reversed(self._highest_at) if moment <= now - margin), first)
        number = len(self._queues)
        limits = {"share": self._share, "window": number * self._share}
        return {"walked": self._queues, "afters": [after] * number, **limits, "known": due[:NEW]}

    def _next_at(self, scan: ExpiryScan, row: RequeueRow, now: float, *, all_read: bool) -> float:
        next_at = math.inf if row.next_due is None else now + row.next_due
        if all_read:
            return next_at
        next_at = min(next_at, self._full_budget.due_at, *self._due_soon.values())
        if not scan.full and scan.budget is None:
            next_at = min(next_at, self._slow_commit_budget.due_at)
        return next_at

    def _record_part(self, now: float, row: RequeueRow, *, to_the_end: bool) -> None:
        if to_the_end and not self.in_parts:
            self._due_soon = {}
        if to_the_end or row.last is None:
            self._place, self._after = 0, _LOWEST
        else:
            place, self._after = row.last
            self._place += place - 1
        self._note_highest(now, row.newest)

    def _record_recent(self, now: float, scan: ExpiryScan, last: int | None) -> None:
        for msg_id in scan.parameters["known"]:
            self._due_soon.pop(msg_id, None)
        self._note_highest(now, last)

    def _note_highest(self, now: float, last: int | None) -> None:
        before = self._highest_at[-1][1] if self._highest_at else _LOWEST
        self._highest_at.append((now, before if last is None else max(before, last)))
        while len(self._highest_at) > 1 and self._highest_at[1][0] <= now - OLDEST:
            del self._highest_at[0]
