"""The fallbacks of a settlement that a transport refused for good."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import strategies as some
from core.settlements import (
    AWAITED,
    errors,
    failed,
    outcomes,
    policies,
    results,
)
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    Delivery,
    Settlement,
    Verdict,
)
from unstract_core.continuation import fallbacks, settle
from unstract_core.outcomes import Outcome, Raised, Rejected, RetryAsked, RetryPolicy, Returned
from unstract_core.transport import write_message


@pytest.mark.parametrize("awaits", ["reply", "both", "on_success"])
@given(
    data=st.data(),
    result=results.filter(lambda value: value is not None),
    kept=st.sampled_from([None, "none", "result"]),
    returned_failure=st.sampled_from(["completed", "failed"]),
)
def test_fallbacks_find_a_result_without_status(
    awaits: str, data: st.DataObject, result: Any, kept: Any, returned_failure: Any
) -> None:
    """When a settlement is refused, its dead letter has the result, wherever it was to be stored."""
    policy = RetryPolicy(status_payload=kept, returned_failure=returned_failure)
    delivery = data.draw(some.deliveries(awaits, task_id=True))
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), "refused", policy)
    assert some.same(first.result, result)


def parts_of(found: list[Settlement]) -> list[tuple[bool, bool, bool]]:
    """Return for each fallback whether it has a callback, a reply or status, and a result."""
    return [(each.follow_up is not None, each.reply is not None, each.result is not None) for each in found]


@given(some.deliveries(), outcomes, policies, errors)
def test_every_fallback_is_a_dead_letter(
    delivery: Delivery, outcome: Outcome, policy: RetryPolicy, refusal: str
) -> None:
    """Each has the reason; the last one has nothing else that a transport could refuse."""
    refused = settle(delivery, outcome, policy)
    found = list(fallbacks(refused, refusal))
    if refused.verdict is Verdict.RETRY and refused.delay:
        assert found.pop(0) == attrs.evolve(refused, delay=0.0)
    assert all(each.verdict is Verdict.BURY and each.delivery is delivery and each.reason for each in found)
    last = found[-1]
    assert (last.follow_up, last.reply, last.result, last.delay) == (None, None, None, 0.0)
    assert len({repr(each) for each in found}) == len(found)


@pytest.mark.parametrize("awaits", ["reply", "both", "on_success"])
@given(data=st.data(), result=some.json_values, policy=policies, refusal=errors)
def test_fallbacks_try_the_result_first(
    awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """Each fallback is tried with the result before it is tried without; a dead letter alone keeps the result too."""
    delivery = data.draw(some.deliveries(awaits))
    found = list(fallbacks(settle(delivery, Returned(result), policy), refusal))
    assert all(each.result is None or some.same(each.result, result) for each in found)
    parts = parts_of(found)
    if result is not None:
        assert parts[::2] == [(*each[:2], True) for each in parts[1::2]]
        assert parts[-2:] == [(False, False, True), (False, False, False)]


@given(
    some.deliveries("on_error", task_id=True),
    some.json_values.filter(lambda value: value is not None),
    policies,
    errors,
)
def test_a_refused_part_leaves_the_others_in_fallbacks(
    delivery: Delivery, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """If a callback, a status or a result is refused, a fallback has the other two."""
    parts = parts_of(list(fallbacks(settle(delivery, Returned(result), policy), refusal)))

    def first_without(refused: int) -> tuple[bool, bool, bool]:
        return next(each for each in parts if not each[refused])

    assert first_without(0) == (False, True, True)
    assert first_without(1) == (True, False, True)
    assert first_without(2) == (True, True, False)


@given(some.deliveries("on_error", task_id=True), some.json_values, policies, errors)
def test_fallbacks_keep_a_result_without_on_success(
    delivery: Delivery, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """The result of a dispatch with on_error alone is kept in the dead letter as well."""
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), refusal)
    assert some.same(first.result, result)


@pytest.mark.parametrize("awaits", AWAITED)
@given(data=st.data(), result=some.json_values, policy=policies, refusal=errors)
def test_the_first_fallback_notifies_the_sender(
    awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """on_error, or the blocking call, gets "result delivery failed: ..." with the reason of the refusal."""
    delivery = data.draw(some.deliveries(awaits))
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), refusal)
    expected = failed(delivery, f"result delivery failed: {refusal}", Verdict.BURY, typed=False)
    assert attrs.evolve(first, result=None) == expected


@given(some.deliveries(), errors, policies, errors)
def test_a_failure_has_no_result_in_fallbacks(
    delivery: Delivery, error: str, policy: RetryPolicy, refusal: str
) -> None:
    """A task that raised or was rejected has no result, and so has its dead letter."""
    for outcome in (Raised(error), Rejected(error), RetryAsked(error)):
        assert {each.result for each in fallbacks(settle(delivery, outcome, policy), refusal)} == {None}


@given(some.deliveries(), some.names.map("RealError: {}".format), policies, errors)
def test_the_real_error_survives_a_refused_settlement(
    delivery: Delivery, error: str, policy: RetryPolicy, refusal: str
) -> None:
    """If the settlement of a failure is refused, the dead letter has the reason of both failures."""
    for outcome in (Raised(error), Rejected(error)):
        assert all(error in each.reason for each in fallbacks(settle(delivery, outcome, policy), refusal))


@given(some.deliveries("both"), policies)
def test_fallbacks_keep_the_type_of_a_failure(delivery: Delivery, policy: RetryPolicy) -> None:
    """The dead letter of a failure has its error type, and its message with the reason of the refusal."""
    for message, expected in (("no: x", "no: x (settling it failed: full)"), ("", "(settling it failed: full)")):
        for fallback in fallbacks(settle(delivery, Rejected("RealError", message), policy), "full", policy):
            assert (fallback.error_type, fallback.error_message) == ("RealError", expected)


@given(some.deliveries("both"), st.sampled_from(["x", "\x00", "\ud800"]), st.integers(1, 9000))
def test_the_text_of_a_refusal_can_be_written(delivery: Delivery, character: str, count: int) -> None:
    """A strange or endless error text of a driver is cut to a valid one."""
    first, *_ = fallbacks(settle(delivery, Returned(1), RetryPolicy()), character * count)
    assert first.follow_up is not None
    write_message(first.follow_up)
    assert len(first.reason) <= 4000
    assert some.outside(first.reason) is None
