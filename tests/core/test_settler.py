"""Settling what is finished: batches, those that fail alone, and what is never given up; over a scripted transport."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    Delivery,
    Settlement,
    TaskPayload,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)
from unstract_core.errors import NoRoom, QueueFull
from unstract_core.observability.observer import Observers
from unstract_core.worker import settler
from unstract_core.worker.in_flight import Held
from unstract_core.worker.settler import Endings


@attrs.define
class Script:
    """Answers each settle as `act` does, and writes down what it was asked."""

    act: Callable[[Sequence[Settlement]], Any] = lambda batch: None
    asked: list[list[Settlement]] = attrs.field(factory=list)

    def settle(self, batch: Sequence[Settlement]) -> Sequence[bool]:
        self.asked.append(list(batch))
        self.act(batch)
        return [True] * len(batch)


def finished(number: int, **fields: Any) -> Held:
    delivery = Delivery(str(number), "q", 1, TaskPayload(task_name="t", queue="q", reply_key=f"k{number}"), {})
    held = Held(delivery)
    held.settlement = attrs.evolve(Settlement(delivery, Verdict.ACK), **fields)
    return held


def endings(
    script: Script, *all_held: Held, renew_in_time: Callable[[], None] = lambda: None
) -> tuple[Endings, dict[Any, Held], Counter[str]]:
    held = {one.key: one for one in all_held}
    counters: Counter[str] = Counter()
    made = Endings(script, held, counters, Observers([]), renew_in_time)  # type: ignore[arg-type]  # only settle is used
    made.add(all_held)
    return made, held, counters


def settle(made: Endings) -> Exception | None:
    try:
        made.settle()
    except TransportUnavailable as exc:
        return exc
    except TransportNotReady as exc:
        return exc
    return None


def settle_again(made: Endings, one: Held, times: int = 1) -> list[Exception | None]:
    """Settle a suspect without its pauses, the transport having answered something else before each try."""
    met = []
    for _ in range(times):
        one.retry_at = min(one.retry_at, 1e-9)
        made.answers += 1
        met.append(settle(made))
    return met


def failing(error: Exception, when: Callable[[Sequence[Settlement]], bool] = lambda batch: True) -> Any:
    def act(batch: Sequence[Settlement]) -> None:
        if when(batch):
            raise error

    return act


def test_batches_grow_again_after_an_outage() -> None:
    """A batch that failed is halved, down to one; when it works again they double, up to the largest."""
    script = Script()
    made, held, _ = endings(script, *[finished(n) for n in range(600)])
    script.act = failing(TransportUnavailable("away"))
    for _ in range(8):
        assert settle(made) is not None
    smallest = len(script.asked[-1])
    assert smallest < 10
    script.act = lambda batch: None
    assert settle(made) is None
    assert held == {}
    assert max(map(len, script.asked[8:])) > 100


def test_what_fails_alone_is_not_tried_before_its_time() -> None:
    """Between two tries of a suspect there is a pause, which the others do not share."""
    script = Script(failing(TransportUnavailable("away"), lambda batch: batch[0].delivery.id == "0"))
    suspect = finished(0)
    made, held, counters = endings(script, suspect)
    assert settle(made) is not None
    for number in range(1, 6):
        other = finished(number)
        held[other.key] = other
        made.add([other])
        assert settle(made) is None
    assert counters["settled"] == 5
    assert [len(batch) for batch in script.asked] == [1] * 6


def test_what_is_not_ready_alone_is_tried_ever_more_seldom() -> None:
    """A queue that takes no dead letter, say: each try costs the others a pause, so the tries grow apart."""
    script = Script(failing(TransportNotReady("no such queue"), lambda batch: batch[0].delivery.id == "0"))
    suspect = finished(0)
    made, held, counters = endings(script, suspect)
    gaps = []
    for number in range(1, 8):
        suspect.retry_at = min(suspect.retry_at, time.monotonic())
        assert settle(made) is not None
        gaps.append(round(suspect.retry_at - time.monotonic(), 1))
        other = finished(number)
        held[other.key] = other
        made.add([other])
        assert settle(made) is None
    assert gaps == sorted(gaps)
    assert gaps[-1] > 1
    assert counters["settled"] == 7


def test_trouble_of_some_seconds_is_no_refusal() -> None:
    """However often a settlement fails while the transport answers others: within PATIENCE nothing is given up."""
    script = Script(failing(TransportUnavailable("lock timeout")))
    one = finished(0)
    made, held, counters = endings(script, one)
    settle_again(made, one, 50)
    assert (counters["refused"], list(held.values())) == (0, [one])
    script.act = lambda batch: None
    assert settle_again(made, one) == [None]
    assert counters["settled"] == 1
    assert script.asked[-1][0].verdict is Verdict.ACK


def test_what_is_not_ready_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing right is an operator's to give, and nothing is buried for it, however long that takes."""
    monkeypatch.setattr(settler, "PATIENCE", 0.0)
    script = Script(failing(TransportNotReady("permission denied")))
    one = finished(0)
    made, held, counters = endings(script, one)
    assert None not in settle_again(made, one, 50)
    assert (counters["refused"], list(held.values())) == (0, [one])


def test_what_alone_is_not_ready_counts_as_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right that only this settlement lacks, while others are settled, is its own fault: its sender is told."""
    monkeypatch.setattr(settler, "PATIENCE", 0.0)
    script = Script(failing(TransportNotReady("policy"), lambda batch: batch[0].verdict is Verdict.ACK))
    one = finished(0)
    made, held, counters = endings(script, one)
    settle_again(made, one, 3)
    made.settled += 1
    settle_again(made, one, 10)
    assert (counters["refused"], counters["buried"], held) == (1, 1, {})


def test_what_fails_in_every_form_is_never_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When no fallback can be written either, all begins anew: the result is still there when the trouble is over."""
    monkeypatch.setattr(settler, "PATIENCE", 0.0)
    script = Script(failing(TransportUnavailable("lock timeout")))
    one = finished(0, result={"paid": 1})
    made, held, counters = endings(script, one)
    forms = set()
    for _ in range(100):
        settle_again(made, one)
        forms.add(repr(one.settlement))
    assert len(forms) > 3
    assert list(held.values()) == [one]
    assert counters["refused"] == 1
    assert [vars(record)["wire.event"] for record in caplog.records] == ["settlement_refused"]


@pytest.mark.parametrize(
    "error", [TransportRefused("no"), TransportUnavailable("in doubt", fate_unknown=True), ValueError("odd")], ids=repr
)
def test_a_release_that_may_have_taken_effect_is_not_made_again(error: Exception) -> None:
    """It was the last use of its delivery: the next holder may have the same attempt. A refusal is final as well."""
    script = Script(failing(error))
    made, held, _ = endings(script, finished(0, verdict=Verdict.RETRY, counted=False))
    settle(made)
    assert held == {}
    settle(made)
    assert len(script.asked) == 1


def test_a_release_that_failed_for_certain_is_made_again_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """Over a short outage a message that was never started keeps its attempt; a long one ends with its lease."""
    away = [True]
    script = Script(failing(TransportUnavailable("away"), lambda batch: away[0]))
    one = finished(0, verdict=Verdict.RETRY, counted=False)
    made, held, counters = endings(script, one)
    settle_again(made, one, 3)
    away[0] = False
    settle_again(made, one)
    assert (len(script.asked), held, counters["given_back"]) == (4, {}, 1)

    away[0] = True
    other = finished(1, verdict=Verdict.RETRY, counted=False)
    held[other.key] = other
    made.add([other])
    settle(made)
    other.failing_since -= 10
    settle_again(made, other)
    assert held == {}
    assert [vars(record)["wire.event"] for record in caplog.records] == []


@pytest.mark.parametrize("error", [TransportRefused("no"), TransportNotReady("no right"), TransportUnavailable("away")])
def test_what_is_given_back_is_settled_before_and_without_the_rest(error: Exception) -> None:
    """Whatever becomes of a finished task's settlement, one that was never started keeps its attempt."""
    batch = [finished(n, **({"verdict": Verdict.RETRY, "counted": False} if n % 2 else {})) for n in range(6)]
    script = Script(failing(error, lambda settlements: any(one.counted for one in settlements)))
    made, held, counters = endings(script, *batch)
    with contextlib.suppress(type(error)):
        made.settle()
    assert [one.delivery.id for one in script.asked[0]] == ["1", "3", "5"]
    assert all(one.counted for settlements in script.asked[1:] for one in settlements)
    assert counters["given_back"] == 3
    assert not held.keys() & {one.key for one in batch[1::2]}


def test_a_lease_that_is_lost_is_told_once() -> None:
    """By the renewal or by the settlement, whichever comes first; what waits is not started any more."""
    waiting = finished(0)
    waiting.settlement = None
    made, held, counters = endings(Script())
    held[waiting.key] = waiting
    assert waiting.until == math.inf
    made.lost(waiting)
    made.lost(waiting)
    assert (counters["lost"], waiting.until) == (1, 0.0)


# Renewals.


@given(st.sets(st.integers(0, 19)))
def test_a_due_renewal_comes_before_each_settlement(refused: set[int]) -> None:
    """However many statements a batch takes because some are refused, each is preceded by the look at the leases."""
    order: list[str] = []

    def act(batch: Sequence[Settlement]) -> None:
        order.append("settle")
        if any(int(one.delivery.id) in refused and one.verdict is Verdict.ACK for one in batch):
            raise TransportRefused("no")

    script = Script(act)
    made, _, _ = endings(script, *map(finished, range(20)), renew_in_time=lambda: order.append("renew"))
    settle(made)
    assert len(made) == 0
    assert order.count("settle") > 2 * len(refused)
    assert all(order[place - 1] == "renew" for place, step in enumerate(order) if step == "settle")


def test_a_renewal_between_two_statements_takes_nothing_for_lost_that_was_settled() -> None:
    """What took effect has left the deliveries in flight before the next renewal asks for them."""
    in_flight: list[int] = []
    script = Script()
    made, held, _ = endings(script, finished(1), finished(2), renew_in_time=lambda: in_flight.append(len(held)))
    settle(made)
    assert in_flight[0] == 2
    assert set(in_flight[1:]) == {0}


# Queues and transports without room.


@pytest.mark.parametrize("failure", [NoRoom("blocked"), QueueFull("full")], ids=["transport", "queue"])
def test_a_result_without_room_is_never_refused(monkeypatch: pytest.MonkeyPatch, failure: NoRoom) -> None:
    """However long a queue is full or a transport takes nothing, the settlement itself is tried again, and no other."""
    monkeypatch.setattr(settler, "PATIENCE", 0.0)
    script = Script(failing(failure))
    one = finished(0)
    made, held, counters = endings(script, one)
    settle_again(made, one, 50)
    assert (counters["refused"], list(held.values())) == (0, [one])
    assert {batch[0].verdict for batch in script.asked} == {Verdict.ACK}
    script.act = lambda batch: None
    assert settle_again(made, one) == [None]
    assert counters["settled"] == 1


@given(full=st.sets(st.integers(0, 19)))
def test_a_full_queue_holds_up_no_other_settlement(full: set[int]) -> None:
    """Of a batch in which some find their queue full the others are settled at once, whichever they are."""

    def act(batch: Sequence[Settlement]) -> None:
        if any(int(one.delivery.id) in full for one in batch):
            raise QueueFull("full")

    made, held, counters = endings(Script(act), *map(finished, range(20)))
    assert settle(made) is None
    assert {int(one.delivery.id) for one in held.values()} == full
    assert counters["settled"] == 20 - len(full)
    assert all(one.no_room for one in held.values())


def test_a_lost_lease_leaves_what_is_finished_to_its_settlement(caplog: pytest.LogCaptureFixture) -> None:
    """It is settled all the same, and no lease_lost is logged for what took effect."""
    one = finished(0)
    made, held, counters = endings(Script(), one)
    one.doubtful = True
    made.lost(one)
    assert list(held.values()) == [one]
    assert settle(made) is None
    assert (counters["settled"], counters["lost"], held) == (1, 0, {})
    assert not any("lease_lost" in text for text in caplog.messages)
