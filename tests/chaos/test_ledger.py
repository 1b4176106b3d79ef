"""The ledger of a chaos run: it finds lost and doubled dispatches, and allows repetitions that a fault explains."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.evidence import Evidence, InjectedFault, Rows
from chaos.history import History
from chaos.journal import Line
from chaos.ledger import SLOW_MACHINE, Ledger, build_ledger

SOUND = "before accepted claimed@e started@e finished@e settled@e claimed@c called@c settled@c"
AGAIN = "before accepted claimed@e started@e claimed@f started@f settled@f claimed@c called@c settled@c"
CALLED_AGAIN = SOUND.removesuffix("settled@c") + "claimed@d called@d settled@d"

KILLED = InjectedFault(1, "kill", 3.5, 3.5, 3.5, frozenset(["e"]), frozenset(["p/1"]))
"""Hits the worker `e` after the fourth event of a dispatch, which it has started."""
CALLBACK_KILLED = attrs.evolve(KILLED, began=7.5, ended=7.5, victims=frozenset(["c"]))


def lines(dispatch: str, events: str) -> list[Line]:
    """Return a line for each event, a second apart. `@` precedes its process, `=` its detail."""
    details = {"before": "on_success", "called": "on_success", "settled": "yes"}
    found = []
    for at, event in enumerate(events.split()):
        name, _, process = event.partition("@")
        name, _, detail = name.partition("=")
        found.append(Line(float(at), process or "p", name, dispatch, detail or details.get(name, "")))
    return found


@attrs.frozen
class Case:
    """The events of one dispatch, and the expected counts of the ledger."""

    events: str
    sent: int = 1
    follow_ups: int = 1
    accepted: int = 0
    unknown: int = 0
    arrived: int = 0
    refused: int = 0
    found: tuple[str, ...] = ()
    problems: int = 0


CASES = (
    Case(SOUND, accepted=1),
    Case("before refused", 0, 0, refused=1),
    Case("before unknown", 0, 0, unknown=1),
    Case("before", 0, 0, unknown=1),
    Case(SOUND.replace("accepted", "unknown"), unknown=1, arrived=1),
    Case(SOUND.replace("accepted ", ""), unknown=1, arrived=1),
    Case("before accepted", 1, 0, accepted=1, found=("lost",)),
    Case("before accepted claimed@e started@e settled@e", 1, 0, accepted=1, found=("lost",)),
    Case("before accepted claimed@e started@e settled@e claimed@c", 1, 1, accepted=1, found=("lost",)),
    Case("before unknown", 1, 0, unknown=1, arrived=1, found=("lost",)),
    Case("before stopped=sent", 0, 0, accepted=1, found=("lost",)),
    Case(SOUND.replace("accepted", "stopped=sent"), accepted=1),
    Case(SOUND, 1, 2, accepted=1, found=("doubled",)),
    Case(SOUND, 1, 3, accepted=1, found=("doubled", "doubled")),
    Case(SOUND, 2, 1, accepted=1, problems=1),
    Case(AGAIN, accepted=1, found=("ran again",)),
    Case(CALLED_AGAIN, accepted=1, found=("called again",)),
    Case(SOUND.replace("accepted", "refused"), refused=1, problems=1),
    Case(SOUND.replace("called", "called=on_error"), accepted=1, problems=1),
    Case(AGAIN.replace("settled@f", "settled@f settled@e"), accepted=1, found=("ran again",), problems=1),
    Case(AGAIN.replace("settled@f", "settled@f settled=no@e"), accepted=1, found=("ran again",)),
)


def stock(history: Sequence[Line], faults: Sequence[InjectedFault] = (), rows: Rows | None = None) -> Ledger:
    return build_ledger(Evidence(History(history), faults, rows, {}, []))


def one(events: str, *faults: InjectedFault, over_a_broker: bool = False) -> Ledger:
    rows = None if over_a_broker else Rows(Counter({"p/1": 1}), Counter({"p/1": 1}))
    return stock(lines("p/1", events), faults, rows)


@given(st.lists(st.sampled_from(CASES), max_size=12), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_journal_order(cases: list[Case], chance: random.Random) -> None:
    """The counts are the sums over single dispatches, however their lines are mixed."""
    found = [line for number, case in enumerate(cases) for line in lines(f"p/{number}", case.events)]
    chance.shuffle(found)
    sent = Counter({f"p/{number}": case.sent for number, case in enumerate(cases)})
    follow_ups = Counter({f"p/{number}": case.follow_ups for number, case in enumerate(cases)})
    ledger = stock(found, rows=Rows(sent, follow_ups))
    for name in ("accepted", "unknown", "arrived", "refused"):
        assert getattr(ledger, name) == sum(getattr(case, name) for case in cases), name
    expected = Counter(what for case in cases for what in case.found)
    assert Counter(anomaly.what for anomaly in ledger.anomalies) == expected
    assert len(ledger.problems) == sum(case.problems for case in cases)
    assert ledger.holds == (ledger.accepted > 0 and not expected and not ledger.problems)


@pytest.mark.parametrize("events", [AGAIN, CALLED_AGAIN])
def test_a_repetition_without_a_fault_is_a_failure(events: str) -> None:
    """A repetition that no fault explains is not allowed."""
    ledger = one(events)
    assert [anomaly.allowed for anomaly in ledger.anomalies] == [False]
    assert not ledger.holds
    assert "NOT EXPLAINED" in str(ledger.anomalies[0])


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        (AGAIN, KILLED),
        (AGAIN, attrs.evolve(KILLED, victims=None, touched=frozenset())),
        (CALLED_AGAIN, CALLBACK_KILLED),
    ],
)
def test_a_fault_explains_the_dispatches_it_affected(events: str, fault: InjectedFault) -> None:
    """A fault explains a repetition if its victim had the dispatch in between, or if it hit all processes."""
    ledger = one(events, fault)
    assert [anomaly.cause for anomaly in ledger.anomalies] == [fault]
    assert ledger.holds


@pytest.mark.parametrize(
    "change",
    [
        {"excuses": False},
        {"touched": frozenset(["p/2"])},
        {"began": 0.5, "ended": 0.5},
        {"began": 5.5, "ended": 5.5},
    ],
    ids=["is no excuse", "had another", "was over before", "came afterwards"],
)
def test_another_fault_explains_nothing(change: dict[str, Any]) -> None:
    """A fault that excuses nothing, affected other dispatches, or came at another time explains no repetition."""
    fault = attrs.evolve(KILLED, **change)
    assert not one(AGAIN, fault).holds


def test_a_fault_between_takes_precedence_as_explanation() -> None:
    """A fault that ended just before is named only if no fault lies between the two runs."""
    just_before = attrs.evolve(KILLED, number=2, began=1.0, ended=1.5, victims=None)
    assert one(AGAIN, just_before, KILLED).anomalies[0].cause == KILLED
    assert one(AGAIN, just_before).anomalies[0].cause == just_before


def test_no_fault_excuses_loss_or_second_follow_up() -> None:
    """A lost dispatch or a second follow-up row is never allowed; the anomaly names the last fault that affected it."""
    wide = attrs.evolve(KILLED, began=0.0, ended=100.0, victims=None)
    (lost,) = one("before accepted claimed@e started@e", wide).anomalies
    assert (lost.what, lost.allowed, lost.cause) == ("lost", False, wide)
    (doubled,) = stock(lines("p/1", SOUND), [wide], Rows(Counter({"p/1": 1}), Counter({"p/1": 2}))).anomalies
    assert (doubled.what, doubled.allowed, doubled.cause) == ("doubled", False, wide)


def test_an_unrecorded_accepted_message_counts_as_lost() -> None:
    """A message that was accepted before its producer was killed counts as accepted, also over a broker."""
    assert one(SOUND, over_a_broker=True).holds
    ledger = stock([*lines("p/1", SOUND), *lines("p/2", "before stopped=sent")])
    assert [(anomaly.what, anomaly.dispatch) for anomaly in ledger.anomalies] == [("lost", "p/2")]


def test_a_second_broker_callback_needs_a_fault() -> None:
    """Over a broker, a second callback counts as doubled and needs a fault that hit an earlier holder."""
    twice = AGAIN.replace("settled@f claimed@c", "claimed@c called@c settled@f settled@e claimed@c")
    killed = attrs.evolve(KILLED, began=4.2, ended=4.2)
    (again, doubled) = one(twice, killed, over_a_broker=True).anomalies
    assert (again.what, doubled.what) == ("ran again", "doubled")
    assert (again.cause, doubled.cause) == (killed, killed)
    assert not one(twice, over_a_broker=True).holds


def test_a_stalled_machine_explains_its_own_dispatches() -> None:
    """A recorded stall explains the dispatches of that process, and no others."""
    history = [*lines("p/1", AGAIN), Line(5.0, "e", "stalled", "", "3.0")]
    rows = Rows(Counter({"p/1": 1}), Counter({"p/1": 1}))
    (anomaly,) = stock(history, rows=rows).anomalies
    assert (anomaly.cause, anomaly.allowed) == (SLOW_MACHINE, True)
    assert not stock([*history[:-1], Line(5.0, "f", "stalled", "", "3.0")], rows=rows).holds


@pytest.mark.parametrize(
    "change",
    [
        lambda sound: attrs.evolve(sound, problems=["a worker has left by itself"]),
        lambda sound: attrs.evolve(sound, remaining={"chaos_executor": 1}),
        lambda sound: attrs.evolve(sound, history=History(), rows=Rows(Counter(), Counter())),
    ],
    ids=["a problem", "something left in a queue", "nothing accepted at all"],
)
def test_a_ledger_with_problems_does_not_hold(change: Callable[[Evidence], Evidence]) -> None:
    """Problems of the run, remaining messages, or a run without dispatches: the ledger does not hold."""
    rows = Rows(Counter({"p/1": 1}), Counter({"p/1": 1}))
    sound = Evidence(History(lines("p/1", SOUND)), [], rows, {"chaos_executor": 0}, [])
    assert build_ledger(sound).holds
    assert not build_ledger(change(sound)).holds
