"""The report of a chaos run: recovery times, and the table by fault."""

from __future__ import annotations

import re
from collections import Counter

import attrs
import pytest

from chaos.evidence import Evidence, InjectedFault, Rows
from chaos.history import History
from chaos.journal import Line
from chaos.ledger import build_ledger
from chaos.recovery import recovery
from chaos.report import summary, table


def sent(dispatch: str, at: float, *calls: float) -> list[Line]:
    """Return the lines of a dispatch that was accepted at once and called back at these times."""
    found = [Line(at, "producer-1.1", event, dispatch, "on_success") for event in ("before", "accepted")]
    return found + [
        Line(call, "callback-1.1", event, dispatch, "on_success") for call in calls for event in ("claimed", "called")
    ]


FAULT = InjectedFault(1, "server-away", 10.0, 20.0, 20.0)
HISTORY = History(
    [*sent("producer-1.1/1", 9.0, 21.5), *sent("producer-1.1/2", 9.5, 22.5), *sent("producer-2.1/1", 20.5, 20.9)]
)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (attrs.evolve(FAULT, awaited=frozenset(["producer-1.1/1", "producer-1.1/2"])), 2.5),
        (FAULT, pytest.approx(0.9)),
        (attrs.evolve(FAULT, victims=frozenset(["producer-2.1"])), pytest.approx(0.9)),
        (attrs.evolve(FAULT, victims=frozenset(["producer-1.1"])), None),
        (attrs.evolve(FAULT, awaited=frozenset(["producer-1.1/9"])), None),
        (attrs.evolve(FAULT, recovers_from=22.0, awaited=frozenset(["producer-1.1/1"])), 0.0),
        (attrs.evolve(FAULT, recovers_from=22.0, again=frozenset(["producer-1.1/1"])), None),
        (attrs.evolve(FAULT, recovers_from=21.0, again=frozenset(["producer-1.1/1"])), 0.5),
    ],
    ids=[
        "the last that was open",
        "a new one where none was",
        "a new one of the slot that was hit",
        "none of that slot yet",
        "one that was never called",
        "called in time",
        "to be called again, and not yet",
        "called again",
    ],
)
def test_a_recovery_ends_with_the_last_awaited_callback(fault: InjectedFault, seconds: float | None) -> None:
    """The recovery time ends when all affected dispatches were called back; it is None before."""
    assert recovery(fault, HISTORY) == seconds


def test_the_table_has_a_row_per_fault_kind() -> None:
    """The table has counts and recovery times for each kind of fault, for anomalies without fault, and in total."""
    faults = [
        attrs.evolve(FAULT, recovers_from=since, awaited=frozenset(["producer-1.1/1"])) for since in (20.0, 20.5, 21.0)
    ]
    lost = [*HISTORY.lines["producer-1.1/1"], *sent("producer-2.1/7", 5.0)]
    calls = [*sent("producer-2.1/8", 1.0, 2.0, 3.0)]
    evidence = Evidence(History([*lost, *calls]), faults, Rows(Counter(), Counter({"producer-1.1/1": 1})), {}, [])
    assert [re.split(" {2,}", line) for line in table(evidence, build_ledger(evidence))] == [
        ["fault", "times", "lost", "doubled", "ran again", "called again", "recovery median", "max"],
        ["server-away", "3", "0", "0", "0", "0", "1.00 s", "1.50 s"],
        ["(no fault)", "1", "0", "0", "1"],
        ["all", "3", "1", "0", "0", "1", "1.00 s", "1.50 s"],
    ]


def test_the_summary_lists_every_error() -> None:
    """Each forbidden anomaly and each problem has a line, and the last line is the verdict."""
    rows = Rows(Counter({"producer-1.1/3": 1}), Counter())
    evidence = Evidence(History(sent("producer-1.1/3", 1.0)), [], rows, {"chaos_executor": 2}, ["a worker has left"])
    text = list(summary(evidence, build_ledger(evidence)))
    wrong = [line for line in text if "WRONG" in line]
    assert len(wrong) == 3
    assert any("lost: producer-1.1/3" in line for line in wrong)
    assert any("a worker has left" in line for line in wrong)
    assert any("chaos_executor still holds 2" in line for line in wrong)
    assert text[-1] == "THE LEDGER DOES NOT HOLD"
