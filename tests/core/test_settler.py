"""Settling what is finished: batches, those that fail alone, and what is never given up; over a scripted transport."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_clock import VirtualClock

from unstract_core import (
    Delivery,
    Settlement,
    Subscription,
    TaskPayload,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)
from unstract_core.errors import NoRoom, QueueFull
from unstract_core.observability.observer import Observers
from unstract_core.worker.in_flight import Entry, InFlight, State
from unstract_core.worker.settler import PATIENCE, Settler


@attrs.define
class Script:
    """Answers each settle as `act` does, and writes down what it was asked."""

    act: Callable[[Sequence[Settlement]], Any] = lambda batch: None
    asked: list[list[Settlement]] = attrs.field(factory=list)

    def settle(self, batch: Sequence[Settlement]) -> Sequence[bool]:
        self.asked.append(list(batch))
        return [self.act(batch) is not False] * len(batch)


@attrs.define(slots=False)
class Case:
    """A settler with the deliveries that it is to settle, on virtual time."""

    script: Script
    renew_in_time: Callable[[], None] = lambda: None
    clock: VirtualClock = attrs.field(factory=VirtualClock)
    counters: Counter[str] = attrs.field(factory=Counter)

    def __attrs_post_init__(self) -> None:
        self.in_flight = InFlight(self.clock)
        self.settler = Settler(
            cast(Subscription, self.script),  # only settle is used
            self.in_flight,
            self.counters,
            Observers([]),
            lambda: self.renew_in_time(),
            None,
            self.clock,
        )

    def finish(self, number: int, **fields: Any) -> Entry:
        """Add a delivery whose settlement is known."""
        delivery = Delivery(str(number), "q", 1, TaskPayload(task_name="t", queue="q", reply_key=f"k{number}"), {})
        entry = self.in_flight.add(delivery)
        self.in_flight.finish(entry, attrs.evolve(Settlement(delivery, Verdict.ACK), **fields))
        self.in_flight.collect()
        return entry

    def settle(self) -> Exception | None:
        """Settle what is due; return the error that ended it."""
        try:
            self.settler.settle()
        except (TransportUnavailable, TransportNotReady) as exc:
            return exc
        return None

    def settle_again(self, times: int = 1, *, pause: float = 2.5) -> list[Exception | None]:
        """Settle `times` times, after a pause each, the transport having answered another call in between."""
        met = []
        for _ in range(times):
            self.clock.advance(pause)
            self.settler.answers += 1
            met.append(self.settle())
        return met

    @property
    def left(self) -> list[Entry]:
        return list(self.in_flight)


def failing(error: Exception, when: Callable[[Sequence[Settlement]], bool] = lambda batch: True) -> Any:
    def act(batch: Sequence[Settlement]) -> None:
        if when(batch):
            raise error

    return act


def test_batches_grow_again_after_an_outage() -> None:
    """A batch that failed is halved, down to one; after a success batches double, up to the largest."""
    case = Case(Script(failing(TransportUnavailable("away"))))
    for number in range(600):
        case.finish(number)
    for _ in range(8):
        assert case.settle() is not None
    smallest = len(case.script.asked[-1])
    assert smallest < 10
    case.script.act = lambda batch: None
    assert case.settle() is None
    assert case.left == []
    assert max(map(len, case.script.asked[8:])) > 100


def test_a_settlement_that_fails_alone_delays_no_other() -> None:
    """Between two attempts of one settlement there is a pause, which the others do not share."""
    case = Case(Script(failing(TransportUnavailable("away"), lambda batch: batch[0].delivery.id == "0")))
    case.finish(0)
    assert case.settle() is not None
    for number in range(1, 6):
        case.finish(number)
        assert case.settle() is None
    assert case.counters["settled"] == 5
    assert [len(batch) for batch in case.script.asked] == [1] * 6


def test_attempts_without_permission_grow_apart() -> None:
    """Each attempt costs the others a pause, so the pauses between attempts become longer, up to two seconds."""
    case = Case(Script(failing(TransportNotReady("no such queue"), lambda batch: batch[0].delivery.id == "0")))
    case.finish(0)
    pauses = []
    for number in range(1, 8):
        assert case.settle() is not None
        pauses.append(case.settler.next_retry_at - case.clock.monotonic())
        case.finish(number)
        assert case.settle() is None
        case.clock.advance(pauses[-1])
    assert pauses == sorted(pauses)
    assert 1 < pauses[-1] <= 2
    assert case.counters["settled"] == 7


def test_failures_within_the_patience_are_no_refusal() -> None:
    """A settlement may fail for just under `PATIENCE` seconds while the transport answers others."""
    case = Case(Script(failing(TransportUnavailable("lock timeout"))))
    entry = case.finish(0)
    case.settle_again(int(PATIENCE / 2.5) - 1)
    assert (case.counters["refused"], case.left, entry.state) == (0, [entry], State.RETRYING)
    case.script.act = lambda batch: None
    assert case.settle_again() == [None]
    assert case.counters["settled"] == 1
    assert case.script.asked[-1][0].verdict is Verdict.ACK


def test_a_settlement_waits_for_an_operator() -> None:
    """While a permission is missing nothing is dead-lettered, however long that takes."""
    case = Case(Script(failing(TransportNotReady("permission denied"))))
    entry = case.finish(0)
    assert None not in case.settle_again(50, pause=PATIENCE)
    assert (case.counters["refused"], case.left) == (0, [entry])


def test_a_settlement_that_alone_fails_counts_as_refused() -> None:
    """While others are settled, the settlement itself is at fault, and its sender gets the error."""
    case = Case(Script(failing(TransportNotReady("policy"), lambda batch: batch[0].verdict is Verdict.ACK)))
    case.finish(0)
    case.settle_again(3, pause=PATIENCE)
    case.settler.settled += 1
    case.settle_again(10, pause=PATIENCE)
    assert (case.counters["refused"], case.counters["buried"], case.left) == (1, 1, [])


def test_a_settlement_failing_in_every_form_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """If no fallback can be written either, the settler starts again with the original settlement."""
    case = Case(Script(failing(TransportUnavailable("lock timeout"))))
    entry = case.finish(0, result={"paid": 1})
    forms = set()
    for _ in range(100):
        case.settle_again(pause=PATIENCE)
        forms.add(repr(entry.settlement))
    assert len(forms) > 3
    assert case.left == [entry]
    assert case.counters["refused"] == 1
    assert [vars(record)["wire.event"] for record in caplog.records] == ["settlement_refused"]


@pytest.mark.parametrize(
    "error", [TransportRefused("no"), TransportUnavailable("in doubt", fate_unknown=True), ValueError("odd")], ids=repr
)
def test_a_release_in_doubt_is_not_repeated(error: Exception) -> None:
    """The next holder of the message may have the same attempt. A refused release is not repeated either."""
    case = Case(Script(failing(error)))
    case.finish(0, verdict=Verdict.RETRY, counted=False)
    case.settle()
    assert case.left == []
    case.settle()
    assert len(case.script.asked) == 1


def test_a_failed_release_is_repeated_for_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """Over a short outage a message that never started keeps its attempt; after a long one its lease ends."""
    away = [True]
    case = Case(Script(failing(TransportUnavailable("away"), lambda batch: away[0])))
    case.finish(0, verdict=Verdict.RETRY, counted=False)
    case.settle_again(3)
    away[0] = False
    case.settle_again()
    assert (len(case.script.asked), case.left, case.counters["given_back"]) == (4, [], 1)

    away[0] = True
    case.finish(1, verdict=Verdict.RETRY, counted=False)
    case.settle()
    case.settle_again(pause=10)
    assert case.left == []
    assert [vars(record)["wire.event"] for record in caplog.records] == []


@pytest.mark.parametrize("error", [TransportRefused("no"), TransportNotReady("no right"), TransportUnavailable("away")])
def test_releases_are_settled_before_and_without_the_rest(error: Exception) -> None:
    """A failing settlement of a finished task costs no message that never started its attempt."""
    case = Case(Script(failing(error, lambda settlements: any(one.counted for one in settlements))))
    entries = [case.finish(n, **({"verdict": Verdict.RETRY, "counted": False} if n % 2 else {})) for n in range(6)]
    with contextlib.suppress(type(error)):
        case.settler.settle()
    assert [one.delivery.id for one in case.script.asked[0]] == ["1", "3", "5"]
    assert all(one.counted for settlements in case.script.asked[1:] for one in settlements)
    assert case.counters["given_back"] == 3
    assert not {*case.left} & {*entries[1::2]}


def test_a_lost_lease_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first of renewal and settlement logs it; a delivery that waits does not start any more."""
    case = Case(Script())
    waiting = case.in_flight.add(Delivery("0", "q", 1, TaskPayload(task_name="t", queue="q"), {}))
    assert waiting.startable_until == math.inf
    case.settler.lease_lost(waiting)
    case.settler.lease_lost(waiting)
    assert (case.counters["lost"], waiting.startable_until) == (1, -math.inf)
    assert [vars(record)["wire.event"] for record in caplog.records] == ["lease_lost"]


# Renewals.


@given(st.sets(st.integers(0, 19)))
def test_a_due_renewal_precedes_each_settlement(refused: set[int]) -> None:
    """However many statements a batch takes because some are refused, the leases are looked at before each."""
    order: list[str] = []

    def act(batch: Sequence[Settlement]) -> None:
        order.append("settle")
        if any(int(one.delivery.id) in refused and one.verdict is Verdict.ACK for one in batch):
            raise TransportRefused("no")

    case = Case(Script(act), lambda: order.append("renew"))
    for number in range(20):
        case.finish(number)
    case.settle()
    assert case.left == []
    assert order.count("settle") > 2 * len(refused)
    assert all(order[place - 1] == "renew" for place, step in enumerate(order) if step == "settle")


def test_a_renewal_does_not_renew_settled_deliveries() -> None:
    """A settled delivery is removed before the next renewal asks for leases."""
    in_flight: list[int] = []
    case = Case(Script(), lambda: in_flight.append(len(case.left)))
    case.finish(1)
    case.finish(2)
    case.settle()
    assert in_flight[0] == 2
    assert set(in_flight[1:]) == {0}


# Queues and transports without room.


@pytest.mark.parametrize("failure", [NoRoom("blocked"), QueueFull("full")], ids=["transport", "queue"])
def test_a_result_without_room_is_never_refused(failure: NoRoom) -> None:
    """However long a queue is full, or a transport takes nothing, the settler repeats the settlement unchanged."""
    case = Case(Script(failing(failure)))
    entry = case.finish(0)
    case.settle_again(50, pause=PATIENCE)
    assert (case.counters["refused"], case.left) == (0, [entry])
    assert {batch[0].verdict for batch in case.script.asked} == {Verdict.ACK}
    case.script.act = lambda batch: None
    assert case.settle_again() == [None]
    assert case.counters["settled"] == 1


@given(full=st.sets(st.integers(0, 19)))
def test_a_full_queue_delays_no_other_settlement(full: set[int]) -> None:
    """The settlements of a batch whose queues have room take effect at once."""

    def act(batch: Sequence[Settlement]) -> None:
        if any(int(one.delivery.id) in full for one in batch):
            raise QueueFull("full")

    case = Case(Script(act))
    for number in range(20):
        case.finish(number)
    assert case.settle() is None
    assert {int(entry.delivery.id) for entry in case.left} == full
    assert case.counters["settled"] == 20 - len(full)
    assert (case.settler.failing, case.settler.at_fault) == (len(full), 0)


def test_a_dropped_release_blocks_nothing() -> None:
    """A release into a full queue that may have taken effect is not repeated, and no queue counts as full after it."""
    case = Case(Script(failing(QueueFull("full", fate_unknown=True))))
    case.finish(0, verdict=Verdict.RETRY, counted=False)
    assert case.settle() is None
    assert (case.left, case.settler.no_room, case.settler.failing) == ([], None, 0)


def test_a_finished_delivery_is_settled_despite_its_lease(caplog: pytest.LogCaptureFixture) -> None:
    """It is settled nevertheless, and no lease_lost is logged for a settlement that took effect."""
    case = Case(Script())
    entry = case.finish(0)
    case.settler.lease_lost(entry)
    assert case.left == [entry]
    assert case.settle() is None
    assert (case.counters["settled"], case.counters["lost"], case.left) == (1, 0, [])
    assert not any("lease_lost" in text for text in caplog.messages)


@given(st.lists(st.sampled_from(["ok", "lost", "refused", "unavailable", "doubt", "full", "not ready"]), max_size=12))
def test_each_delivery_ends_once_for_every_answer(answers: list[str]) -> None:
    """A delivery is counted as settled, buried or lost at most once, and is in flight exactly until then."""
    errors = {
        "refused": TransportRefused("no"),
        "unavailable": TransportUnavailable("away"),
        "doubt": TransportUnavailable("in doubt", fate_unknown=True),
        "full": QueueFull("full"),
        "not ready": TransportNotReady("right"),
    }
    left = [*answers]

    def act(batch: Sequence[Settlement]) -> bool:
        answer = left.pop(0) if left else "ok"
        if answer in errors:
            raise errors[answer]
        return answer == "ok"

    case = Case(Script(act))
    entry = case.finish(0)
    for _ in range(40):
        before = len(case.left)
        case.settle_again()
        assert len(case.left) <= before
        assert (entry.state is State.DONE) == (not case.settler.failing) or not case.left
    assert case.left == []
    assert case.counters["settled"] + case.counters["buried"] + case.counters["lost"] <= 1
