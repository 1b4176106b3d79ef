"""Which claim is made next: over the whole index of ready rows, or only beyond what was taken before.

The index keeps the entries of rows that were taken until a vacuum may remove them, and while any session holds an old
snapshot none may: a claim over the whole index then walks over every message since. So what has been taken is a lower
bound, one id for each queue and priority, and the whole is looked at as often as that takes a small part of the time:
every few milliseconds as a rule, at once where nothing else was found, and every half minute at the longest, unless
it takes longer than a statement may: then it is tried ever more rarely. What lies below a bound:

- An id that was committed after a higher one was taken. Once a second a claim goes back to where the bounds were ten to
  twenty seconds ago.
- A row that became ready again. Where this subscription did that, the bound goes back to it at once.

Both are found by a claim over the whole at the latest, and are the only ones that others can overtake. Nothing in here
talks to the server: it is told what was found, and moments of the monotonic clock.

One statement merges the ready rows of at most MERGED queues. A subscription to more of them first reads which queues
have ready rows, and claims from those whose first rows come first. Where more than MERGED have some, it reads that
again after MERGED rows: so many come before the first row of every other queue. Where nothing is prepared, planning a
claim takes longer the more queues it merges: a subscription to more than UNPREPARED then reads that first as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from operator import itemgetter
from typing import Any

import attrs

from transports.postgres.statements import Statements
from unstract_core.payload import HIGHEST_PRIORITY, LOWEST_PRIORITY
from unstract_core.transport import Delivery

SHARE = 1 / 25
"""The part of the time that may go into looking at what is dead."""
LONGEST_REST = 30.0
CHEAP = 0.01
"""Seconds in which the whole can be looked at without a second thought, when there is nothing else to do."""
MERGED = 64
"""The number of queues that one claim merges."""
UNPREPARED = 8
"""The number of queues that a claim merges whether they have ready rows or not, where each claim is planned anew."""
_SIZES = (8, MERGED)
"""The numbers of queues for which a subscription to many has statements, so that only a few have to be prepared."""
RECENT_INTERVAL = 1.0
GENERATION = 10.0
_MOST_DOUBLINGS = 4

PART = 20_000
"""The number of claimed rows that are read at once."""
NEW = 1_000
MOST_KNOWN = 20_000
_SHARED = 8
"""So many times NEW rows are read at most where there are many queues, the same number of each."""
OLDEST = 30.0
_LOWEST = -(2**63)

PRIORITIES = list(range(HIGHEST_PRIORITY, LOWEST_PRIORITY - 1, -1))

_Bounds = dict[tuple[str, int], int]


class ScanBudget:
    """When something may be done again that takes a while: after a rest in proportion, of `shortest` seconds or more.

    It rests for half a minute at most, and longer only where it fails again and again: what cannot be done in the time
    that a statement has must not keep all else from being done. One time that took unusually long, on a busy machine,
    does not count.
    """

    def __init__(self, shortest: float = 0.0) -> None:
        self.due_at = 0.0
        self.seconds = 0.0
        self._shortest = shortest
        self._last = math.inf
        self._failures = 0

    def took(self, began: float, ended: float) -> None:
        self.seconds, self._last = min(ended - began, self._last), ended - began
        self._failures = 0
        self.due_at = ended + min(max(self.seconds / SHARE, self._shortest), LONGEST_REST)

    def failed(self, began: float, ended: float) -> None:
        """Note that it was cancelled, because it took too long."""
        self.seconds = max(self.seconds, ended - began)
        longest = LONGEST_REST * 2.0 ** min(self._failures, _MOST_DOUBLINGS)
        self._failures += 1
        self.due_at = ended + min(max((ended - began) / SHARE, self._shortest), longest)


class Scan(Enum):
    """How much of the index a claim looks at."""

    WHOLE = "whole"
    RECENT = "recent"
    FRONTIER = "beyond"


@attrs.frozen
class ClaimPlan:
    """A statement with those of its parameters that do not change from one worker to the next."""

    scan: Scan
    statement: bytes
    parameters: Mapping[str, Any]
    bounded: bool = True


class ClaimPlanner:
    """Chooses the claims of one subscription.

    Args:
        statements: the statements.
        queues: the queues that the subscription takes from.
        prepared: whether its connection keeps the plan of a statement. Default True.
    """

    def __init__(self, statements: Statements, queues: Sequence[str], *, prepared: bool = True) -> None:
        self._statements = statements
        self._all = frozenset(queues)
        #: Whether no statement is to merge all queues: `choose` is to be called before a claim over the whole.
        self.many = len(queues) > (MERGED if prepared else UNPREPARED)
        self._prepared = prepared
        self._left = math.inf
        self._select([] if self.many else queues)
        self._paces = {Scan.WHOLE: ScanBudget(), Scan.RECENT: ScanBudget(RECENT_INTERVAL)}
        self._last = Scan.WHOLE
        self._taken: _Bounds = {}
        self._highest = 0
        # What is true of the moment at which the last generation began, and the one before.
        self._marks: list[tuple[_Bounds, int]] = [({}, 0), ({}, 0)]
        self._marked_at = -math.inf

    def choose(self, ready: Sequence[tuple[str, int]], claim: ClaimPlan) -> ClaimPlan:
        """Take from the first of the queues that have ready rows; return a claim over the whole of these.

        Args:
            ready: queues, not only ours, and the priority of the first ready row of each, in the order of these rows.
            claim: the claim over the whole that is about to be made.
        """
        first = [(queue, priority) for queue, priority in ready if queue in self._all]
        self._left = MERGED if len(first) > MERGED else math.inf
        names = [queue for queue, _ in first[:MERGED]]
        if names != self._queues:
            self._select(names)
        self.none_ready_above(dict(first[:MERGED]))
        return self._whole if claim.bounded else self._thorough

    @property
    def queues(self) -> Sequence[str]:
        """The queues that the next claim takes from."""
        return self._queues

    @property
    def highest(self) -> int:
        """The highest id that was taken."""
        return self._highest

    def most(self, limit: int) -> int:
        """Return how many rows a claim may take so that none of another queue comes before them."""
        return int(min(limit, self._left))

    def _select(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)
        size = len(queues)
        if self.many and self._prepared:
            size = next(size for size in _SIZES if size >= len(queues))
        self._queue_slots: list[str | None] = [*queues, *[None] * (size - len(queues))]
        whole, self._names = self._statements.claim(self._queue_slots)
        thorough, _ = self._statements.claim(self._queue_slots, bounded=False)
        self._whole = ClaimPlan(Scan.WHOLE, whole, self._names)
        self._thorough = ClaimPlan(Scan.WHOLE, thorough, self._names, bounded=False)
        self._frontier, _ = self._statements.claim_frontier(self._queue_slots)

    def next(self, now: float) -> ClaimPlan:
        """Return the claim over as much as may be looked at now."""
        if now >= self._paces[Scan.WHOLE].due_at:
            return self._whole
        if now >= self._paces[Scan.RECENT].due_at:
            earlier, _ = self._marks[0]
            bounds = {key: min(bound, earlier.get(key, 0)) for key, bound in self._taken.items()}
            return self._from(Scan.RECENT, bounds)
        return self._from(Scan.FRONTIER, self._taken)

    def otherwise(self) -> ClaimPlan | None:
        """Return what to try at once after a claim that found nothing, if anything."""
        if self._last is Scan.WHOLE or self._paces[Scan.WHOLE].seconds > CHEAP:
            return None
        return self._whole

    def last_resorts(self) -> tuple[ClaimPlan, ClaimPlan]:
        """Return what to try where nothing was found and something is ready: it came meanwhile, or was passed over.

        The second passes over no row because others have locked many before it, and may read a whole queue for that.
        """
        return self._whole, self._thorough

    def made(self, claim: ClaimPlan, limit: int, taken: Sequence[Delivery], began: float, ended: float) -> None:
        """Learn what a claim has taken, in the order in which it comes."""
        self._last = claim.scan
        if (pace := self.pace_of(claim)) is not None:
            pace.took(began, ended)
        if ended - self._marked_at >= GENERATION:
            self._marks = [self._marks[1], (dict(self._taken), self._highest)]
            self._marked_at = ended
        # Of the priority at which a full batch ends there may be more that lies below the bound.
        unfinished = taken[-1].priority if len(taken) == limit else None
        last = {(one.queue, one.priority): int(one.id) for one in taken}
        self._left -= len(taken)
        if self._left <= 0 or (len(taken) < limit and self._left < math.inf):
            self._paces[Scan.WHOLE].due_at = ended  # the other queues' turn
        if claim.scan is Scan.WHOLE and unfinished is not None and self._any_below(taken):
            self._paces[Scan.WHOLE].due_at = ended  # more may lie below, of other priorities too
        for key, msg_id in last.items():
            self._taken[key] = msg_id if key[1] == unfinished else max(msg_id, self._taken.get(key, 0))
            self._highest = max(self._highest, msg_id)

    def pace_of(self, claim: ClaimPlan) -> ScanBudget | None:
        """Return when such a claim may be made again; None where that is always."""
        return self._paces.get(claim.scan)

    def _any_below(self, taken: Sequence[Delivery]) -> bool:
        return any(int(one.id) <= self._taken.get((one.queue, one.priority), 0) for one in taken)

    def became_ready(self, queue: str, priority: int, msg_id: int) -> None:
        """Go back to a row that is ready again."""
        key = (queue, priority)
        self._taken[key] = min(self._taken.get(key, 0), msg_id - 1)

    def none_ready_above(self, first: Mapping[str, int]) -> None:
        """Learn the priority of the first ready row of each queue: of a higher one, all that is old was taken."""
        _, seen = self._marks[0]
        for queue in self._queues:
            for priority in PRIORITIES:
                if priority > first.get(queue, 0):
                    key = (queue, priority)
                    self._taken[key] = max(self._taken.get(key, 0), seen)

    def sees_more_in(self, now: float) -> float:
        """Return the seconds until a claim looks at what the last one did not; infinite where that saw the whole."""
        if self._last is Scan.WHOLE:
            return math.inf
        due_at = self._paces[Scan.WHOLE].due_at
        if self._last is Scan.FRONTIER:
            due_at = min(due_at, self._paces[Scan.RECENT].due_at)
        return max(0.0, due_at - now)

    def _from(self, scan: Scan, bounds: _Bounds) -> ClaimPlan:
        beyond = {
            f"frontier_{number}": [0 if queue is None else bounds.get((queue, priority), 0) for priority in PRIORITIES]
            for number, queue in enumerate(self._queue_slots)
        }
        return ClaimPlan(scan, self._frontier, {**self._names, **beyond, "priorities": PRIORITIES})


class ExpiryPlanner:
    """Which claimed rows are read next for expired leases and delays, for which no index is in the order of time.

    Args:
        queues: the queues that are looked at one after the other; one name, which is not looked at, stands for all
            queues of the table, where a subscription has too many to be looked at one by one.
    """

    def __init__(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)
        self._share = min(NEW, _SHARED * NEW // len(self._queues))
        self._place = 0
        self._after = _LOWEST
        self._soon: dict[int, float] = {}
        self._seen: list[tuple[float, int]] = []

    @property
    def in_parts(self) -> bool:
        """Whether the last part has not reached the end of the claimed rows."""
        return (self._place, self._after) != (0, _LOWEST)

    def next_part(self) -> dict[str, Any]:
        """Return the parameters for the next part of all claimed rows."""
        walked = self._queues[self._place :]
        afters = [self._after, *[_LOWEST] * (len(walked) - 1)]
        return {"walked": walked, "afters": afters, "share": PART, "window": PART, "known": []}

    def due_and_new(self, now: float, ahead: float, margin: float) -> dict[str, Any]:
        """Return the parameters for rows that are known to be due, and for those that are new.

        Args:
            now: the moment, of the monotonic clock.
            ahead: seconds from now within which a row counts as due.
            margin: seconds that the transaction of a row may have taken.
        """
        due = [msg_id for msg_id, due_at in self._soon.items() if due_at <= now + ahead]
        first = self._seen[0][1] if self._seen else _LOWEST
        after = next((last for moment, last in reversed(self._seen) if moment <= now - margin), first)
        number = len(self._queues)
        limits = {"share": self._share, "window": number * self._share}
        return {"walked": self._queues, "afters": [after] * number, **limits, "known": due[:NEW]}

    def read_part(self, now: float, last: tuple[int, int] | None, newest: int | None, *, to_the_end: bool) -> None:
        """Learn what a part of all claimed rows was.

        Args:
            now: the moment at which it had been read, of the monotonic clock.
            last: the place of its last queue, from 1 on, and its last id there; None where it has no row.
            newest: the highest id of all claimed rows; None where there is none.
            to_the_end: whether no claimed row comes after it.
        """
        if to_the_end and not self.in_parts:
            self._soon = {}
        if to_the_end or last is None:
            self._place, self._after = 0, _LOWEST
        else:
            place, self._after = last
            self._place += place - 1
        self._reached(now, newest)

    def read_new(self, now: float, known: Iterable[int], last: int | None) -> None:
        """Learn that the rows of `known` were read, and new rows up to the id `last`."""
        for msg_id in known:
            self._soon.pop(msg_id, None)
        self._reached(now, last)

    def is_due_soon(self, now: float, soon: Iterable[tuple[int, float]]) -> None:
        """Remember rows that are due soon, each with the seconds until then."""
        self._soon.update((msg_id, now + seconds) for msg_id, seconds in soon)
        if len(self._soon) > MOST_KNOWN:
            self._soon = dict(sorted(self._soon.items(), key=itemgetter(1))[: MOST_KNOWN // 2])

    def _reached(self, now: float, last: int | None) -> None:
        before = self._seen[-1][1] if self._seen else _LOWEST
        self._seen.append((now, before if last is None else max(before, last)))
        while len(self._seen) > 1 and self._seen[1][0] <= now - OLDEST:
            del self._seen[0]

    def next_due(self, now: float) -> float:
        """Return the seconds until a row is due that is known; infinite where there is none."""
        return max(0.0, min(self._soon.values(), default=math.inf) - now)
