"""The ledger: compares accepted dispatches with callbacks. It has no side effects.

- Every dispatch that was accepted, or that arrived with an unknown fate, has a final callback.
- Over PostgreSQL, exactly one follow-up row is committed for it.
- A task or callback that ran again needs a fault that excuses it, between the two runs. Over a broker this also
  applies to a duplicate callback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import attrs

from chaos.evidence import Evidence, InjectedFault
from chaos.journal import Line

AnomalyKind: TypeAlias = Literal["lost", "doubled", "ran again", "called again"]

SLOW_MACHINE: Literal["a machine that stood still"] = "a machine that stood still"

Cause: TypeAlias = InjectedFault | Literal["a machine that stood still"] | None

_GRACE = 1.0
"""Seconds within which a process notices a cut connection, and a broker processes a received frame."""


@attrs.frozen
class Anomaly:
    """A dispatch that was not sent, run and called back exactly once.

    Attributes:
        what: The kind of anomaly.
        dispatch: The id of the dispatch.
        cause: The fault that explains it; None if there is none.
        allowed: Whether the design allows it and its cause is known.
        why: The details, for the report.
    """

    what: AnomalyKind
    dispatch: str
    cause: Cause
    allowed: bool
    why: str

    def __str__(self) -> str:
        cause = f"explained by {self.cause}" if self.cause is not None else "NOT EXPLAINED by any fault"
        return f"{self.what}: {self.dispatch}: {self.why}; {cause}"


@attrs.frozen
class Ledger:
    """The result of a run.

    Attributes:
        accepted: Dispatches whose send returned.
        unknown: Dispatches whose send raised an error with an unknown fate, or whose producer was killed.
        arrived: Those of `unknown` that were received.
        refused: Dispatches whose send raised an error that says that nothing was sent.
        called: Dispatches that were called back.
        anomalies: Dispatches that were lost, doubled or repeated.
        problems: Other problems, which no fault excuses.
    """

    accepted: int
    unknown: int
    arrived: int
    refused: int
    called: int
    anomalies: Sequence[Anomaly]
    problems: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether something was accepted, every anomaly is allowed, and there are no problems."""
        return self.accepted > 0 and not self.problems and all(anomaly.allowed for anomaly in self.anomalies)

    def count(self, what: AnomalyKind, cause: object = None) -> int:
        """Count the anomalies of a kind; only those with this `cause`, unless it is None."""
        return sum(1 for one in self.anomalies if one.what == what and (cause is None or one.cause == cause))


@attrs.define
class _Sends:
    accepted: int = 0
    unknown: int = 0
    arrived: int = 0
    refused: int = 0
    called: int = 0


def build_ledger(evidence: Evidence) -> Ledger:
    """Examine every dispatch, and return the ledger."""
    sends = _Sends()
    anomalies: list[Anomaly] = []
    problems = list(evidence.problems)
    dispatches = dict.fromkeys(evidence.history.lines)
    if evidence.rows is not None:
        dispatches |= dict.fromkeys([*evidence.rows.sent, *evidence.rows.follow_ups])
    for dispatch in dispatches:
        exists = _count(dispatch, evidence, sends)
        problems += _problems(dispatch, evidence, exists=exists)
        anomalies += _anomalies(dispatch, evidence, exists=exists)
    problems += [f"queue {queue} still holds {count}" for queue, count in evidence.remaining.items() if count]
    return Ledger(**attrs.asdict(sends), anomalies=anomalies, problems=problems)


def _count(dispatch: str, evidence: Evidence, sends: _Sends) -> bool:
    """Count a dispatch; return whether it exists, because it was accepted or has arrived."""
    history = evidence.history
    arrived = bool(history.of(dispatch, "claimed", "started", "called"))
    if evidence.rows is not None:
        arrived = arrived or bool(evidence.rows.sent[dispatch])
    accepted = bool(history.of(dispatch, "accepted"))
    if accepted:
        sends.accepted += 1
    elif history.of(dispatch, "refused"):
        sends.refused += 1
    else:
        sends.unknown += 1
        sends.arrived += arrived
    sends.called += bool(history.of(dispatch, "called"))
    return accepted or arrived


def _problems(dispatch: str, evidence: Evidence, *, exists: bool) -> Iterator[str]:
    history, rows = evidence.history, evidence.rows
    if history.of(dispatch, "refused") and exists:
        yield f"{dispatch}: the send raised an error that says that nothing was sent, but it has arrived"
    if rows is not None and rows.sent[dispatch] > 1:
        yield f"{dispatch}: sent once, but stored {rows.sent[dispatch]} times"
    if (before := history.of(dispatch, "before")) and (calls := history.of(dispatch, "called")):
        for kind in sorted({call.detail for call in calls} - {before[0].detail}):
            yield f"{dispatch}: called with {kind} instead of {before[0].detail}"
    if rows is not None:
        runners = {line.process for line in history.of(dispatch, "started")}
        effective = [one for one in history.of(dispatch, "settled") if one.detail == "yes" and one.process in runners]
        if len(effective) > 1:
            yield f"{dispatch}: {len(effective)} settlements of its task took effect: the fence did not hold"


def _anomalies(dispatch: str, evidence: Evidence, *, exists: bool) -> Iterator[Anomaly]:
    history, rows = evidence.history, evidence.rows
    starts, calls = history.of(dispatch, "started"), history.of(dispatch, "called")
    follow_ups = rows.follow_ups[dispatch] if rows is not None else None
    if exists and not calls:
        why = "no follow-up was ever committed" if follow_ups == 0 else "its callback was never called"
        yield Anomaly("lost", dispatch, _last_touched(dispatch, evidence), allowed=False, why=why)
    for earlier, later in pairwise(starts):
        yield _explained("ran again", dispatch, earlier, later, evidence)
    if follow_ups is not None:
        for _ in range(follow_ups - 1):
            cause = _last_touched(dispatch, evidence)
            yield Anomaly("doubled", dispatch, cause, allowed=False, why=f"{follow_ups} follow-ups were committed")
    for earlier, later in pairwise(calls):
        yield _explained("doubled" if rows is None else "called again", dispatch, earlier, later, evidence)


def _explained(what: AnomalyKind, dispatch: str, earlier: Line, later: Line, evidence: Evidence) -> Anomaly:
    """Look for a fault that hit a holder of the dispatch, between its claim and the second run.

    Over a broker, this may be any earlier holder: a duplicate callback was published twice before.
    """
    held = [line for line in evidence.history.of(dispatch, "claimed") if line.at <= later.at]
    if evidence.rows is not None or what == "ran again":
        held = [line for line in held if line.process == earlier.process and line.at <= earlier.at][-1:]
    since = min((line.at for line in held), default=earlier.at)
    holders = {earlier.process, *(line.process for line in held)}
    why = f"{earlier.process}, and again {later.at - earlier.at:.1f} s later {later.process}"
    cause = _cause(dispatch, since, later.at, holders, evidence)
    return Anomaly(what, dispatch, cause, allowed=cause is not None, why=why)


def _cause(dispatch: str, since: float, until: float, holders: set[str], evidence: Evidence) -> Cause:
    """Return the first fault between the two times, or else just before, that may have affected the dispatch."""
    for grace in (0.0, _GRACE):
        for fault in evidence.faults:
            between = fault.began <= until and since <= fault.ended + grace
            if fault.excuses and between and _hit(fault, dispatch, holders, evidence):
                return fault
    for stall in evidence.history.stalls:
        if stall.process in holders and stall.at - float(stall.detail) <= until and since <= stall.at:
            return SLOW_MACHINE
    return None


def _hit(fault: InjectedFault, dispatch: str, holders: set[str], evidence: Evidence) -> bool:
    """Return whether a fault may have affected a dispatch; over a broker, also one acknowledged just before."""
    if fault.victims is None or dispatch in fault.touched:
        return True
    if evidence.rows is not None or not fault.victims & holders:
        return False
    settled = evidence.history.of(dispatch, "settled")
    return any(line.process in fault.victims and fault.began - _GRACE <= line.at <= fault.began for line in settled)


def _last_touched(dispatch: str, evidence: Evidence) -> InjectedFault | None:
    """Return the last fault that affected a lost or doubled dispatch. For the report: it excuses nothing."""
    touching = [fault for fault in evidence.faults if dispatch in fault.touched]
    return touching[-1] if touching else None
