"""Celery's exceptions in a task: each asks for the outcome that it has in a Celery worker."""

from __future__ import annotations

import datetime
from typing import Any

import celery.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.messages import message
from transports.celery.task_exceptions import outcome_of
from transports.memory import MemoryTransport
from unstract_core import Consumer, Delivery, Settlement, TaskPayload, Verdict
from unstract_core.continuation import settle
from unstract_core.outcomes import Rejected, RetryAsked, RetryPolicy
from unstract_core.transport import check_delay

PLAIN = Delivery("1", "q", 1, TaskPayload(task_name="t", queue="q"), {})


@pytest.mark.parametrize("exc", [ValueError("x"), KeyboardInterrupt(), celery.exceptions.TaskError("x")], ids=repr)
def test_other_exceptions_have_no_outcome(exc: BaseException) -> None:
    """Only Retry, Reject and Ignore have an outcome of their own."""
    assert outcome_of(exc) is None


def test_celerys_retry_is_a_retry() -> None:
    """A task that raises Celery's Retry is run again after the countdown of the exception."""
    outcome = outcome_of(celery.exceptions.Retry("again", exc=ConnectionError("away"), when=7))
    assert outcome == RetryAsked("ConnectionError", "away", delay=7)


@pytest.mark.parametrize("zone", [None, datetime.UTC, datetime.timezone(datetime.timedelta(hours=-5))], ids=str)
@pytest.mark.parametrize("seconds", [600, -600])
def test_celerys_retry_may_have_an_eta(seconds: int, zone: datetime.tzinfo | None) -> None:
    """A Retry with an ETA is run again at that time, or at once if that has passed."""
    moment = datetime.datetime.now(zone) + datetime.timedelta(seconds=seconds)
    outcome = outcome_of(celery.exceptions.Retry(when=moment))
    assert isinstance(outcome, RetryAsked)
    assert outcome.delay is not None
    assert max(0, seconds - 60) <= outcome.delay <= max(0, seconds)


@given(st.none() | st.floats() | st.integers() | st.booleans() | st.text() | st.datetimes())
def test_any_celery_retry_can_be_settled(when: Any) -> None:
    """A Retry with any delay becomes a valid delay or none, and never an error."""
    outcome = outcome_of(celery.exceptions.Retry(when=when))
    assert outcome is not None
    check_delay(settle(PLAIN, outcome, RetryPolicy()).delay)


@pytest.mark.parametrize("requeue", [False, True])
@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (ValueError("not for me"), "ValueError: not for me"),
        ("not for me", "Reject: not for me"),
        ("a\0b", "Reject: a\ufffdb"),
        (None, "Reject"),
        (7, "Reject: (7, {requeue})"),
    ],
)
def test_celerys_reject_reports_its_reason(reason: Any, error: str, requeue: bool) -> None:
    """Reject has the error or the text of its reason, and with `requeue` asks for another run."""
    error = error.format(requeue=requeue)
    outcome = outcome_of(celery.exceptions.Reject(reason, requeue=requeue))
    assert isinstance(outcome, RetryAsked if requeue else Rejected)
    assert outcome.error == error


def test_celerys_ignore_has_no_consequence() -> None:
    """The message of a task that raises Ignore is only acknowledged."""
    outcome = outcome_of(celery.exceptions.Ignore("whatever"))
    assert outcome is not None
    assert settle(PLAIN, outcome, RetryPolicy()) == Settlement(PLAIN, Verdict.ACK)


class Skipped(celery.exceptions.Ignore):  # type: ignore[misc]  # celery has no types
    """An application's own kind of Ignore."""


@pytest.mark.parametrize(
    ("exc", "counters"),
    [
        (celery.exceptions.Ignore(), {"ran": 1, "settled": 1}),
        (Skipped(), {"ran": 1, "settled": 1}),
        (celery.exceptions.Reject("no", requeue=False), {"ran": 1, "buried": 1}),
        (celery.exceptions.Retry("again", when=0), {"ran": 3, "retried": 2, "buried": 1}),
        (ValueError("x"), {"ran": 3, "retried": 2, "buried": 1}),
    ],
    ids=repr,
)
def test_plain_function_may_raise_celerys_exceptions(exc: Exception, counters: dict[str, int]) -> None:
    """Celery's exceptions have their meaning in any task, over a transport that does not know Celery."""

    def task() -> None:
        raise exc

    transport = MemoryTransport()
    transport.send([message("t", "q")])
    consumer = Consumer(transport, {"t": task}, ["q"], max_attempts=3, backoff=0)
    consumer.drain(timeout=30)
    assert +consumer.counters == counters
