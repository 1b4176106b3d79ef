"""The messages and replies that a settlement sends: every one can be written, and has its id and error text."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import strategies as some
from core.settlements import (
    errors,
    outcomes,
    parent_of,
    payload_of,
    policies,
)
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    Delivery,
    TaskPayload,
    to_wire,
)
from unstract_core.codec import to_json, value_to_json
from unstract_core.continuation import settle
from unstract_core.outcomes import Outcome, Raised, RetryPolicy, Returned
from unstract_core.transport import check_delay, write_message


@given(some.deliveries(), outcomes, policies)
def test_settle_is_pure(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> None:
    """The same arguments give the same settlement, and none of them is changed."""
    before = copy.deepcopy((delivery, outcome, policy))
    first = settle(delivery, outcome, policy)
    assert settle(delivery, outcome, policy) == first
    assert (delivery, outcome, policy) == before
    assert first.delivery is delivery


@given(some.deliveries(), outcomes, policies)
def test_every_settlement_can_be_written(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> None:
    """The strict writer accepts every settlement of a readable message."""
    settlement = settle(delivery, outcome, policy)
    check_delay(settlement.delay)
    if settlement.follow_up is not None:
        write_message(settlement.follow_up)
    if settlement.reply is not None:
        value_to_json(settlement.reply.result)


@pytest.mark.parametrize("kind", ["text", "list", "nested"])
def test_the_largest_result_can_be_passed_on(kind: str) -> None:
    """A result that lenient normalisation accepts is accepted as an argument and in a reply."""
    spec = ContinuationSpec(task_name="c", queue="q")
    payload = TaskPayload(task_name="t", queue="q", on_success=spec, task_id="id")
    for size in range(99_900, 100_100, 7):
        value = {"text": "x" * size, "list": ["x" * (size - 16)], "nested": some.nest(63, "x" * (size - 1008))}[kind]
        with some.size_limit(100_000):
            settlement = settle(Delivery("1", "q", 1, payload, {}), Returned.of(value), RetryPolicy())
            assert settlement.follow_up is not None
            assert settlement.reply is not None
            write_message(settlement.follow_up)
            value_to_json(settlement.reply.result)


@given(some.deliveries("both"), some.anything, policies)
def test_every_return_value_reaches_its_callback(delivery: Delivery, value: Any, policy: RetryPolicy) -> None:
    """A strange return value never loses the callback: its message can be written."""
    settlement = settle(delivery, Returned.of(value), policy)
    assert settlement.follow_up is not None
    assert some.outside(settlement.follow_up.payload.args[0]) is None
    to_json(settlement.follow_up.payload)


@given(some.anything)
def test_a_returned_value_lists_its_replaced_paths(value: Any) -> None:
    """Returned.of lists the paths of replaced values, for the warning in the log."""
    returned = Returned.of(value)
    assert some.outside(returned.result) is None
    assert all(path.startswith("$") for path in returned.replaced)


@pytest.mark.parametrize("depth", [1, 62, 63, 64])
@pytest.mark.parametrize("outcome", [Returned(1), Raised("E: x")], ids=["returned", "raised"])
def test_continuation_kwargs_arrive_unchanged(depth: int, outcome: Outcome) -> None:
    """kwargs that the wire carried once are sent on unchanged, up to the greatest depth."""
    spec = ContinuationSpec(task_name="c", kwargs={"x": some.nest(depth, "leaf"), "y": 1}, queue="q")
    payload = TaskPayload(task_name="t", queue="q", on_success=spec, on_error=spec, task_id="id")
    settlement = settle(Delivery("1", "q", 1, payload, to_wire(payload)), outcome, RetryPolicy())
    assert settlement.follow_up is not None
    assert settlement.follow_up.payload.kwargs == spec.kwargs


# The error text in callback_kwargs.


@given(some.json_objects.filter(lambda found: found.get("error") is None), errors)
def test_callback_kwargs_get_the_error_text(wanted: dict[str, Any], error: str) -> None:
    """A callback_kwargs mapping without an error, or with null, gets the text; the rest of it stays."""
    for mapping in (wanted, {**wanted, "error": None}):
        assert _kwargs_of_on_error({"callback_kwargs": mapping}, error) == {
            "callback_kwargs": {**wanted, "error": error}
        }


@given(some.json_objects, some.json_values.filter(lambda value: value is not None), errors)
def test_an_existing_error_in_callback_kwargs_stays(wanted: dict[str, Any], present: Any, error: str) -> None:
    """An error that the sender has set is not overwritten, not even an empty one."""
    kwargs = {"callback_kwargs": {**wanted, "error": present}}
    assert some.same(_kwargs_of_on_error(kwargs, error), kwargs)


@given(some.json_objects.filter(lambda found: not isinstance(found.get("callback_kwargs"), dict)), errors)
def test_kwargs_without_callback_kwargs_stay(kwargs: dict[str, Any], error: str) -> None:
    """Without a callback_kwargs mapping the kwargs are unchanged."""
    assert some.same(_kwargs_of_on_error(kwargs, error), kwargs)


@given(some.scalars | some.json_arrays, errors)
def test_callback_kwargs_of_another_type_stay(value: Any, error: str) -> None:
    """callback_kwargs that are not a mapping are unchanged."""
    assert some.same(_kwargs_of_on_error({"callback_kwargs": value}, error), {"callback_kwargs": value})


@given(some.deliveries("both"), some.json_values, policies)
def test_on_success_gets_its_kwargs_unchanged(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """A success adds no error to the kwargs."""
    settlement = settle(delivery, Returned(result), policy)
    spec = payload_of(delivery).on_success
    assert settlement.follow_up is not None
    assert spec is not None
    assert some.same(settlement.follow_up.payload.kwargs, spec.kwargs)


# The ids of continuations.


def test_continuation_ids_never_change_between_releases() -> None:
    """Workers of different releases may settle the same message, so the derivation is fixed."""
    spec = ContinuationSpec(task_name="c", queue="q")
    payload = TaskPayload(task_name="t", queue="q", on_success=spec, on_error=spec, task_id="dispatch-1")
    ids = _ids(Delivery("1", "q", 1, payload, {}))
    assert ids == ("fb5ad3cd-2aaa-51ee-a9fe-f93592083619", "ff2ef6e7-a67b-5353-ae55-45a8b5481cf9")


@given(some.deliveries("both"), st.integers(1, 9), st.integers(1, 9))
def test_continuation_ids_are_equal_on_every_attempt(delivery: Delivery, one: int, other: int) -> None:
    """A redelivery sends callbacks under the same ids, so that a doubled one can be recognised."""
    assert _ids(attrs.evolve(delivery, attempt=one)) == _ids(attrs.evolve(delivery, attempt=other))


@given(st.lists(some.deliveries("both"), min_size=2, max_size=4, unique_by=parent_of))
def test_continuation_ids_differ_between_kinds_and_parents(found: list[Delivery]) -> None:
    """on_success and on_error of one dispatch, and those of different dispatches, never share an id."""
    ids = [each for delivery in found for each in _ids(delivery)]
    assert len(set(ids)) == 2 * len(found)
    assert not set(ids) & {payload_of(delivery).task_id for delivery in found}


def _kwargs_of_on_error(kwargs: dict[str, Any], error: str) -> dict[str, Any]:
    spec = ContinuationSpec(task_name="e", kwargs=kwargs, queue="c")
    payload = TaskPayload(task_name="t", queue="q", on_error=spec)
    settlement = settle(Delivery("1", "q", 1, payload, {}), Raised(error), RetryPolicy())
    assert settlement.follow_up is not None
    return settlement.follow_up.payload.kwargs


def _ids(delivery: Delivery) -> tuple[str | None, str | None]:
    success = settle(delivery, Returned(None), RetryPolicy()).follow_up
    failure = settle(delivery, Raised("E"), RetryPolicy()).follow_up
    assert success is not None
    assert failure is not None
    return success.payload.task_id, failure.payload.task_id
