"""The printed report: a table by fault, the counts, and every anomaly with its explanation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from chaos.evidence import Evidence, InjectedFault
from chaos.ledger import SLOW_MACHINE, Anomaly, AnomalyKind, Ledger
from chaos.recovery import recovery

_COLUMNS = ("fault", "times", "lost", "doubled", "ran again", "called again", "recovery median", "max")
_COUNTED: tuple[AnomalyKind, ...] = ("lost", "doubled", "ran again", "called again")
_MOST = 20
"""The number of allowed repetitions that are printed; all other anomalies are printed."""


def table(evidence: Evidence, ledger: Ledger) -> list[str]:
    """Return the lines of the table: a row for each kind of fault, and one for anomalies without fault."""
    rows = [_row(name, evidence, ledger) for name in dict.fromkeys(fault.name for fault in evidence.faults)]
    for cause, name in ((SLOW_MACHINE, f"({SLOW_MACHINE})"), (None, "(no fault)")):
        anomalies = [anomaly for anomaly in ledger.anomalies if anomaly.cause == cause]
        if anomalies:
            rows.append([name, "", *_counts(anomalies), "", ""])
    rows.append(["all", str(len(evidence.faults)), *_counts(ledger.anomalies), *_seconds(evidence.faults, evidence)])
    return _aligned([list(_COLUMNS), *rows])


def summary(evidence: Evidence, ledger: Ledger) -> Iterator[str]:
    """Yield the lines with the counts, the allowed anomalies and the errors."""
    yield (
        f"{ledger.accepted} accepted, {ledger.unknown} of unknown fate ({ledger.arrived} of them arrived), "
        f"{ledger.refused} refused; {ledger.called} called back; "
        + ", ".join(f"{ledger.count(what)} {what}" for what in _COUNTED)
    )
    if evidence.rows is not None:
        rows = evidence.rows
        yield f"{rows.sent.total()} messages stored, {rows.follow_ups.total()} follow-ups committed"
    allowed = [anomaly for anomaly in ledger.anomalies if anomaly.allowed]
    ran_again = [anomaly for anomaly in allowed if anomaly.what == "ran again"]
    for anomaly in [one for one in allowed if one.what != "ran again"] + ran_again[:_MOST]:
        yield f"  {anomaly}"
    if len(ran_again) > _MOST:
        yield f"  ... and {len(ran_again) - _MOST} more that ran again, each explained by a fault"
    for anomaly in ledger.anomalies:
        if not anomaly.allowed:
            yield f"  WRONG: {anomaly}"
    for problem in ledger.problems:
        yield f"  WRONG: {problem}"
    yield "the ledger holds" if ledger.holds else "THE LEDGER DOES NOT HOLD"


def _row(name: str, evidence: Evidence, ledger: Ledger) -> list[str]:
    faults = [fault for fault in evidence.faults if fault.name == name]
    anomalies = [one for one in ledger.anomalies if isinstance(one.cause, InjectedFault) and one.cause.name == name]
    return [name, str(len(faults)), *_counts(anomalies), *_seconds(faults, evidence)]


def _counts(anomalies: Sequence[Anomaly]) -> list[str]:
    return [str(sum(1 for anomaly in anomalies if anomaly.what == what)) for what in _COUNTED]


def _seconds(faults: Iterable[InjectedFault], evidence: Evidence) -> list[str]:
    found = [seconds for fault in faults if (seconds := recovery(fault, evidence.history)) is not None]
    return [f"{statistics.median(found):.2f} s", f"{max(found):.2f} s"] if found else ["-", "-"]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return lines
