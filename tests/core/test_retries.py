"""Retries: tasks that ask to run again, and the back-off."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import strategies as some
from core.settlements import (
    errors,
    policies,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from unstract_core import (
    ConfigurationError,
    Delivery,
    RetryLater,
    Settlement,
    TaskPayload,
    Verdict,
)
from unstract_core.continuation import settle
from unstract_core.outcomes import Raised, RetryAsked, RetryPolicy, outcome_of
from unstract_core.transport import check_delay


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(st.data(), st.none() | st.floats(0, 1e6), errors, policies)
def test_a_task_that_asks_is_run_again_within_bounds(
    awaits: str, data: st.DataObject, delay: float | None, error: str, policy: RetryPolicy
) -> None:
    """asked to retry: again after its delay or the backoff, whoever awaits it; with the attempts used up, as raised."""
    delivery = data.draw(some.deliveries(awaits))
    settlement = settle(delivery, RetryAsked(error, delay=delay), policy)
    if delivery.attempt < policy.max_attempts:
        wait = policy.delay(delivery) if delay is None else delay
        assert settlement == Settlement(delivery, Verdict.RETRY, delay=wait, reason=error)
    else:
        assert settlement == settle(delivery, Raised(error), policy)


def test_retry_later_becomes_a_request_with_the_text_of_its_cause() -> None:
    """RetryLater is a request; the exception that it was raised from gives the text."""
    asked = outcome_of(RetryLater(delay=2))
    assert isinstance(asked, RetryAsked)
    assert (asked.delay, asked.error.partition(":")[0]) == (2, "RetryLater")
    request = RetryLater()
    request.__cause__ = ConnectionError("away")
    assert outcome_of(request) == RetryAsked("ConnectionError", "away")


def test_a_request_of_a_users_own_kind_is_one_too() -> None:
    """A subclass of RetryLater that never called its parent asks all the same; a senseless delay is made to fit."""

    class NotYet(RetryLater):
        def __init__(self, document: str) -> None:
            self.document = document

    assert isinstance(outcome_of(NotYet("d")), RetryAsked)
    for senseless, understood in ((-5, 0.0), ("5", None), (float("nan"), None)):
        request = NotYet("d")
        request.delay = senseless  # type: ignore[assignment]
        found = outcome_of(request)
        assert isinstance(found, RetryAsked)
        assert found.delay == understood


def test_a_request_whose_cause_is_hostile_is_one_too() -> None:
    """The cause of a request is looked at for its text alone."""

    class Hostile(Exception):
        def __bool__(self) -> bool:
            raise SystemExit

    request = RetryLater(0)
    request.__cause__ = Hostile("x")
    assert outcome_of(request) == RetryAsked("Hostile", "x", delay=0)


@pytest.mark.parametrize("delay", [-1, -0.001, float("nan"), float("inf"), -float("inf"), "5"])
def test_a_delay_that_makes_no_sense_is_refused_where_it_is_written(delay: Any) -> None:
    """RetryLater refuses a delay that is negative, not finite or no number."""
    with pytest.raises(ConfigurationError):
        RetryLater(delay)


@given(some.deliveries(attempts=st.just(1)), st.floats(0, allow_infinity=False) | st.integers(0, 10**30))
def test_any_delay_that_retry_later_takes_can_be_settled(delivery: Delivery, delay: float) -> None:
    """A delay that was accepted from a task is one that a transport accepts: the retry is not lost to it."""
    try:
        outcome = outcome_of(RetryLater(delay))
    except ConfigurationError:
        assume(False)
    check_delay(settle(delivery, outcome, RetryPolicy()).delay)


@given(some.deliveries(), errors, policies)
def test_a_task_without_retries_is_never_run_again_because_it_raised(
    delivery: Delivery, error: str, policy: RetryPolicy
) -> None:
    """Without `retry_raised` a failure ends its message, and the sender hears of it as of a last attempt."""
    settlement = settle(delivery, Raised(error), attrs.evolve(policy, retry_raised=False))
    assert settlement.verdict is not Verdict.RETRY
    assert settlement == settle(delivery, Raised(error), attrs.evolve(policy, max_attempts=1))


@given(some.deliveries(attempts=st.integers(1, 2000)), policies)
def test_the_backoff_is_bounded_and_determined(delivery: Delivery, policy: RetryPolicy) -> None:
    """The wait lies between three quarters and the whole of the doubled backoff, capped, and is always the same."""
    longest = min(policy.backoff * 2.0 ** min(delivery.attempt - 1, 1000), policy.backoff_max)
    if delivery.attempt <= 33:
        assert 0.75 * longest <= policy.delay(delivery) <= longest
    assert 0 <= policy.delay(delivery) <= policy.backoff_max
    assert policy.delay(delivery) == policy.delay(copy.deepcopy(delivery))
    check_delay(policy.delay(delivery))


def test_the_backoff_doubles_with_each_attempt_up_to_its_maximum() -> None:
    """1, 2, 4, ... seconds, less up to a quarter each, until 300."""
    policy = RetryPolicy(backoff=1.0, backoff_max=300.0)
    for attempt in range(1, 60):
        longest = min(2.0 ** (attempt - 1), 300.0)
        assert 0.75 * longest <= policy.delay(_plain(attempt=attempt)) <= longest


def test_the_backoff_spreads_messages_that_failed_together() -> None:
    """A hundred messages that failed at one time do not come back at one time."""
    waits = {RetryPolicy().delay(_plain(id=str(number))) for number in range(100)}
    assert len(waits) > 90
    assert max(waits) - min(waits) > 0.1


def _plain(**fields: Any) -> Delivery:
    payload = TaskPayload(task_name="t", queue="q")
    return attrs.evolve(Delivery("1", "q", 1, payload, {}), **fields)
