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
def test_the_fallbacks_find_a_result_that_no_status_keeps(
    awaits: str, data: st.DataObject, result: Any, kept: Any, returned_failure: Any
) -> None:
    """When a settlement is refused, its dead letter has the result, wherever the result was to be stored."""
    policy = RetryPolicy(status_payload=kept, returned_failure=returned_failure)
    delivery = data.draw(some.deliveries(awaits, task_id=True))
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), "refused", policy)
    assert some.same(first.result, result)


def tellings(found: list[Settlement]) -> list[tuple[bool, bool, bool]]:
    """For each fallback: whether it sends the callback, answers or leaves a status, and keeps a result."""
    return [(each.follow_up is not None, each.reply is not None, each.result is not None) for each in found]


@given(some.deliveries(), outcomes, policies, errors)
def test_every_fallback_buries_and_the_last_asks_for_nothing_else(
    delivery: Delivery, outcome: Outcome, policy: RetryPolicy, refusal: str
) -> None:
    """Each fallback ends the same delivery in the dead letters with its reason; the last carries nothing refusable."""
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
def test_a_paid_result_is_kept_unless_it_is_the_result_that_is_refused(
    awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """Each way of telling the sender is tried with the result first; buried alone it is kept as well."""
    delivery = data.draw(some.deliveries(awaits))
    found = list(fallbacks(settle(delivery, Returned(result), policy), refusal))
    assert all(each.result is None or some.same(each.result, result) for each in found)
    told = tellings(found)
    if result is not None:
        assert told[::2] == [(*telling[:2], True) for telling in told[1::2]]
        assert told[-2:] == [(False, False, True), (False, False, False)]


@given(
    some.deliveries("on_error", task_id=True),
    some.json_values.filter(lambda value: value is not None),
    policies,
    errors,
)
def test_whatever_is_refused_the_rest_of_the_word_to_a_sender_is_said(
    delivery: Delivery, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """A callback, a status or a result that is refused costs none of the other two."""
    told = tellings(list(fallbacks(settle(delivery, Returned(result), policy), refusal)))

    def said_without(refused: int) -> tuple[bool, bool, bool]:
        return next(telling for telling in told if not telling[refused])

    assert said_without(0) == (False, True, True)
    assert said_without(1) == (True, False, True)
    assert said_without(2) == (True, True, False)


@given(some.deliveries("on_error", task_id=True), some.json_values, policies, errors)
def test_a_result_without_on_success_is_kept_by_the_fallbacks_too(
    delivery: Delivery, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """The result of a dispatch with on_error alone, which is its status, ends in the dead letter as well."""
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), refusal)
    assert some.same(first.result, result)


@pytest.mark.parametrize("awaits", AWAITED)
@given(data=st.data(), result=some.json_values, policy=policies, refusal=errors)
def test_the_first_fallback_tells_the_sender_that_the_delivery_failed(
    awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy, refusal: str
) -> None:
    """on_error, or the blocked caller, hears "result delivery failed: ..." with the reason of the refusal."""
    delivery = data.draw(some.deliveries(awaits))
    first, *_ = fallbacks(settle(delivery, Returned(result), policy), refusal)
    expected = failed(delivery, f"result delivery failed: {refusal}", Verdict.BURY, "")
    assert attrs.evolve(first, result=None) == expected


@given(some.deliveries(), errors, policies, errors)
def test_a_failure_has_no_result_to_bury(delivery: Delivery, error: str, policy: RetryPolicy, refusal: str) -> None:
    """A task that raised or was rejected has no result, and its dead letter shows none."""
    for outcome in (Raised(error), Rejected(error), RetryAsked(error)):
        assert {each.result for each in fallbacks(settle(delivery, outcome, policy), refusal)} == {None}


@given(some.deliveries(), some.names.map("RealError: {}".format), policies, errors)
def test_the_real_error_survives_a_refused_settlement(
    delivery: Delivery, error: str, policy: RetryPolicy, refusal: str
) -> None:
    """When telling of a failure is refused, the dead letter still says why the task failed, beside why telling did."""
    for outcome in (Raised(error), Rejected(error)):
        assert all(error in each.reason for each in fallbacks(settle(delivery, outcome, policy), refusal))


@given(some.deliveries("both"), st.sampled_from(["x", "\x00", "\ud800"]), st.integers(1, 9000))
def test_the_text_of_a_refusal_is_made_to_fit(delivery: Delivery, character: str, count: int) -> None:
    """Even a driver's strange or endless text can be written."""
    first, *_ = fallbacks(settle(delivery, Returned(1), RetryPolicy()), character * count)
    assert first.follow_up is not None
    write_message(first.follow_up)
    assert len(first.reason) <= 4000
    assert some.outside(first.reason) is None
