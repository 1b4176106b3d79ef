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
    outcomes,
)
from unstract_core.continuation import settle
from unstract_core.outcomes import Raised, RetryAsked, RetryPolicy, outcome_of
from unstract_core.transport import check_delay


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(st.data(), st.none() | st.floats(0, 1e6), errors, policies)
def test_a_retry_request_is_granted_within_max_attempts(
    awaits: str, data: st.DataObject, delay: float | None, error: str, policy: RetryPolicy
) -> None:
    """An awaited task too runs again after its delay or the back-off; after the last attempt it counts as raised."""
    delivery = data.draw(some.deliveries(awaits))
    settlement = settle(delivery, RetryAsked(error, delay=delay), policy)
    if delivery.attempt < policy.max_attempts:
        wait = policy.delay(delivery) if delay is None else delay
        assert settlement == Settlement(delivery, Verdict.RETRY, delay=wait, reason=error, error_type=error)
    else:
        assert settlement == settle(delivery, Raised(error), policy)


def test_retry_later_has_the_text_of_its_cause() -> None:
    """RetryLater asks for a retry; the exception that it was raised from gives the error text."""
    asked = outcome_of(RetryLater(delay=2))
    assert isinstance(asked, RetryAsked)
    assert (asked.delay, asked.error.partition(":")[0]) == (2, "RetryLater")
    request = RetryLater()
    request.__cause__ = ConnectionError("away")
    assert outcome_of(request) == RetryAsked("ConnectionError", "away")


def test_a_subclass_of_retry_later_asks_for_retry() -> None:
    """It need not call its parent, and an invalid delay is replaced by the nearest valid one."""

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


def test_a_hostile_cause_does_not_stop_a_retry() -> None:
    """Only the text of the cause is read."""

    class Hostile(Exception):
        def __bool__(self) -> bool:
            raise SystemExit

    request = RetryLater(0)
    request.__cause__ = Hostile("x")
    assert outcome_of(request) == RetryAsked("Hostile", "x", delay=0)


@pytest.mark.parametrize("delay", [-1, -0.001, float("nan"), float("inf"), -float("inf"), "5"])
def test_retry_later_refuses_an_invalid_delay(delay: Any) -> None:
    """A delay that is negative, not finite or not a number raises ConfigurationError."""
    with pytest.raises(ConfigurationError):
        RetryLater(delay)


@given(some.deliveries(attempts=st.just(1)), st.floats(0, allow_infinity=False) | st.integers(0, 10**30))
def test_every_delay_of_retry_later_can_be_settled(delivery: Delivery, delay: float) -> None:
    """A transport accepts each delay that RetryLater accepts, so no retry is lost."""
    try:
        outcome = outcome_of(RetryLater(delay))
    except ConfigurationError:
        assume(False)
    check_delay(settle(delivery, outcome, RetryPolicy()).delay)


@given(some.deliveries(), errors, policies)
def test_a_task_without_retries_never_runs_again(delivery: Delivery, error: str, policy: RetryPolicy) -> None:
    """Without `retry_raised` a raise is settled like a raise in the last attempt."""
    settlement = settle(delivery, Raised(error), attrs.evolve(policy, retry_raised=False))
    assert settlement.verdict is not Verdict.RETRY
    assert settlement == settle(delivery, Raised(error), attrs.evolve(policy, max_attempts=1))


@given(some.deliveries(attempts=st.integers(1, 2000)), policies)
def test_the_backoff_is_bounded_and_determined(delivery: Delivery, policy: RetryPolicy) -> None:
    """The wait is three quarters to all of the doubled and capped back-off, and is always the same."""
    longest = min(policy.backoff * 2.0 ** min(delivery.attempt - 1, 1000), policy.backoff_max)
    if delivery.attempt <= 33:
        assert 0.75 * longest <= policy.delay(delivery) <= longest
    assert 0 <= policy.delay(delivery) <= policy.backoff_max
    assert policy.delay(delivery) == policy.delay(copy.deepcopy(delivery))
    check_delay(policy.delay(delivery))


def test_the_backoff_doubles_up_to_its_maximum() -> None:
    """1, 2, 4, ... seconds, less up to a quarter each, until 300."""
    policy = RetryPolicy(backoff=1.0, backoff_max=300.0)
    for attempt in range(1, 60):
        longest = min(2.0 ** (attempt - 1), 300.0)
        assert 0.75 * longest <= policy.delay(_plain(attempt=attempt)) <= longest


def test_the_backoff_spreads_messages_that_failed_together() -> None:
    """A hundred messages that failed at one moment return at different moments."""
    waits = {RetryPolicy().delay(_plain(id=str(number))) for number in range(100)}
    assert len(waits) > 90
    assert max(waits) - min(waits) > 0.1


def _plain(**fields: Any) -> Delivery:
    payload = TaskPayload(task_name="t", queue="q")
    return attrs.evolve(Delivery("1", "q", 1, payload, {}), **fields)


def test_a_failing_exception_reader_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's own error is the outcome if the reader of its framework raises."""

    def broken(exc: BaseException) -> None:
        raise RuntimeError("reader broke")

    monkeypatch.setattr(outcomes, "_exception_reader", lambda package: broken)
    assert outcome_of(ValueError("no")) == Raised("ValueError", "no")
