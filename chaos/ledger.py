"""The ledger: what was accepted against what was called back. Pure.

Every dispatch that was accepted, or whose fate was unknown and that has arrived, has its terminal callback. Over
PostgreSQL exactly one follow-up row is committed for it. What ran again, or was called again, has to be explained by a
fault that excuses it and that stood between the two times; over a broker also what was called twice.
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
"""Seconds within which a process has seen that its connection was cut, or the broker what it was sent."""


@attrs.frozen
class Anomaly:
    """One dispatch that was not simply sent, run and called back once; `cause` is the fault that explains it.

    `allowed` where the design says that this may happen, and the cause is known.
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
    """Counts, anomalies, and problems. `unknown` are sends whose fate nobody knew, of which `arrived` were accepted."""

    accepted: int
    unknown: int
    arrived: int
    refused: int
    called: int
    anomalies: Sequence[Anomaly]
    problems: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether nothing was lost or doubled that may not be, and nothing else is wrong."""
        return self.accepted > 0 and not self.problems and all(anomaly.allowed for anomaly in self.anomalies)

    def count(self, what: AnomalyKind, cause: object = None) -> int:
        """How often something was found; of one `cause` only, if that is given."""
        return sum(1 for one in self.anomalies if one.what == what and (cause is None or one.cause == cause))


@attrs.define
class _Sends:
    accepted: int = 0
    unknown: int = 0
    arrived: int = 0
    refused: int = 0
    called: int = 0


def build_ledger(evidence: Evidence) -> Ledger:
    """Go through every dispatch, and return what was found."""
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
    """Count a dispatch by its send; return whether it exists: it was accepted, or it has arrived."""
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
        yield f"{dispatch}: its sender was told that nothing was sent, and it has arrived"
    if rows is not None and rows.sent[dispatch] > 1:
        yield f"{dispatch}: sent once, and stored {rows.sent[dispatch]} times"
    if (before := history.of(dispatch, "before")) and (calls := history.of(dispatch, "called")):
        for kind in sorted({call.detail for call in calls} - {before[0].detail}):
            yield f"{dispatch}: called with {kind}, and not {before[0].detail}"
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
    """Look for a fault that hit who had the dispatch, between its being received and its second time.

    Over a broker that may be anybody who has ever had it: what is doubled there was published twice before.
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
    """Return the first fault that stands between, or else just before, and had the dispatch in its hands."""
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
    """Whether a fault had a dispatch in its hands; over a broker, also what was acknowledged a moment before."""
    if fault.victims is None or dispatch in fault.touched:
        return True
    if evidence.rows is not None or not fault.victims & holders:
        return False
    settled = evidence.history.of(dispatch, "settled")
    return any(line.process in fault.victims and fault.began - _GRACE <= line.at <= fault.began for line in settled)


def _last_touched(dispatch: str, evidence: Evidence) -> InjectedFault | None:
    """Return the fault that had a lost or doubled dispatch in its hands, for the report: it excuses nothing."""
    touching = [fault for fault in evidence.faults if dispatch in fault.touched]
    return touching[-1] if touching else None
