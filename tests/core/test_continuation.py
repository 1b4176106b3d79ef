"""What follows from the end of a task: every cell of the table in the design, over generated messages.

The expected settlement is written out whole in each test, so nothing can follow that is not named there.
"""

from __future__ import annotations

import copy
import datetime
import json
import uuid
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import strategies as some
from hypothesis import assume, given
from hypothesis import strategies as st

from unstract_core import (
    ConfigurationError,
    ContinuationSpec,
    Delivery,
    ExecutionResult,
    FairnessKey,
    Message,
    Reply,
    RetryLater,
    Settlement,
    TaskPayload,
    Verdict,
    to_wire,
)
from unstract_core.codec import to_json, value_to_json
from unstract_core.continuation import fallbacks, rejection, settle
from unstract_core.outcomes import Outcome, Raised, Rejected, RetryAsked, RetryPolicy, Returned, outcome_of
from unstract_core.transport import REPLY_TTL, STATUS_TTL, check_delay, write_message

errors = st.sampled_from(["ValueError: no", "KeyError", "OSError: gone"]) | some.texts.filter(bool)
policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 9),
    backoff=st.floats(0, 100),
    backoff_max=st.floats(0, 1000),
    retry_raised=st.just(True),
)
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(Returned, some.json_values),
    st.builds(Raised, errors),
    st.builds(RetryAsked, errors, delay=st.none() | st.floats(0, 1e6)),
    st.builds(Rejected, errors),
)
NOW = datetime.datetime.now(datetime.UTC)
AWAITED = ("reply", "both", "on_success", "on_error")


def payload_of(delivery: Delivery) -> TaskPayload:
    assert delivery.payload is not None
    return delivery.payload


def parent_of(delivery: Delivery) -> str:
    payload = payload_of(delivery)
    return payload.task_id or f"{delivery.queue}/{delivery.id}"


def continuation_id(delivery: Delivery, kind: str) -> str:
    return str(uuid.uuid5(uuid.UUID("5b0f1f0e-54f9-5a52-9a34-6a2f0c1e7c55"), f"{parent_of(delivery)}/{kind}"))


def told(kwargs: dict[str, Any], error: str) -> dict[str, Any]:
    """The kwargs of an on_error callback, with the error text where the product's callbacks look for it."""
    mapping = kwargs.get("callback_kwargs")
    if type(mapping) is not dict or mapping.get("error", None) is not None:
        return kwargs
    return kwargs | {"callback_kwargs": mapping | {"error": error}}


def follow_up(delivery: Delivery, kind: str, first: Any, *, error: str | None = None) -> Message | None:
    payload = payload_of(delivery)
    spec: ContinuationSpec | None = getattr(payload, kind)
    if spec is None:
        return None
    sent = TaskPayload(
        task_name=spec.task_name,
        args=[first],
        kwargs=spec.kwargs if error is None else told(spec.kwargs, error),
        queue=spec.queue,
        fairness=payload.fairness,
        task_id=continuation_id(delivery, kind),
        headers=payload.headers,
    )
    return Message(sent, spec.queue, org_id=delivery.org_id, priority=delivery.priority)


def status(delivery: Delivery, **outcome: Any) -> Reply | None:
    payload = payload_of(delivery)
    told = payload.on_error is not None and outcome["status"] == "failed"
    key = payload.task_id or (delivery.id if told else None)
    return Reply(key, ttl=STATUS_TTL, **outcome) if key is not None else None


def failed(delivery: Delivery, error: str, verdict: Verdict, error_type: str | None = None) -> Settlement:
    """What the table says of a failure that its sender hears of."""
    payload = payload_of(delivery)
    kind = error if error_type is None else error_type
    if payload.reply_key is not None:
        reply = Reply(payload.reply_key, "failed", error=error, ttl=REPLY_TTL)
        return Settlement(delivery, verdict, reply=reply, reason=error, outcome="failure", error_type=kind)
    return Settlement(
        delivery,
        verdict,
        follow_up=follow_up(delivery, "on_error", payload.task_id or delivery.id, error=error),
        reply=status(delivery, status="failed", error=error),
        reason=error,
        outcome="failure",
        error_type=kind,
    )


# The row "returned".


@given(some.deliveries("reply"), some.json_values, policies)
def test_a_return_answers_a_blocked_caller(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """returned, reply_key: the reply is completed with the result, kept for an hour; acknowledged."""
    reply = Reply(payload_of(delivery).reply_key or "", "completed", result=result, ttl=3600.0)
    assert settle(delivery, Returned(result), policy) == Settlement(
        delivery, Verdict.ACK, reply=reply, outcome="success"
    )


@pytest.mark.parametrize("awaits", ["both", "on_success"])
@given(st.data(), some.json_values, policies)
def test_a_return_is_continued_with_on_success(
    awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy
) -> None:
    """returned, on_success: it gets the result first and its own kwargs unchanged; status completed; acknowledged."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Returned(result), policy) == Settlement(
        delivery,
        Verdict.ACK,
        follow_up=follow_up(delivery, "on_success", result),
        reply=status(delivery, status="completed"),
        outcome="success",
    )


@given(some.deliveries("on_error"), some.json_values, policies)
def test_a_return_without_on_success_chains_nothing(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """returned, only on_error: nothing is chained and nothing re-run; status completed; acknowledged."""
    expected = Settlement(
        delivery, Verdict.ACK, reply=status(delivery, status="completed", result=result), outcome="success"
    )
    assert settle(delivery, Returned(result), policy) == expected


@given(some.deliveries("nothing"), some.json_values, policies)
def test_a_return_that_nobody_awaits_is_acknowledged(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """returned, neither: acknowledged, without a trace."""
    assert settle(delivery, Returned(result), policy) == Settlement(delivery, Verdict.ACK, outcome="success")


@given(some.deliveries("both"), some.json_objects, errors, policies)
def test_on_success_receives_a_returned_failure(
    delivery: Delivery, data: dict[str, Any], error: str, policy: RetryPolicy
) -> None:
    """A returned ExecutionResult(success=False) goes to on_success, as Celery's link would get it."""
    returned = Returned.of(ExecutionResult(success=False, data=data, error=error))
    settlement = settle(delivery, returned, policy)
    expected = {"success": False, "data": data, "metadata": {}, "error": error}
    assert settlement.follow_up == follow_up(delivery, "on_success", expected)
    assert settlement.follow_up is not None
    assert some.same(settlement.follow_up.payload.args, [expected])


results = some.json_values | st.fixed_dictionaries(
    {"success": st.sampled_from([False, True, None, 0, "false"])},
    optional={
        "error": st.none() | st.sampled_from(["", " ", "Refused: quota"]) | some.json_values,
        "data": some.json_objects,
        "metadata": some.json_objects,
    },
)
"""Results of executions, of every shape that an executor can get wrong."""


@given(
    some.deliveries(task_id=True),
    results,
    st.sampled_from([None, "none", "result"]),
    st.sampled_from(["completed", "failed"]),
)
def test_a_status_keeps_a_result_where_the_policy_says(
    delivery: Delivery, result: Any, kept: Any, returned_failure: Any
) -> None:
    """Status, error and result of a status follow the policy; reply and on_success always get the whole result."""
    payload = payload_of(delivery)
    policy = RetryPolicy(status_payload=kept, returned_failure=returned_failure)
    settlement = settle(delivery, Returned(result), policy)
    reply = settlement.reply
    assert settlement.verdict is Verdict.ACK
    assert settlement.follow_up == (follow_up(delivery, "on_success", result) if payload.on_success else None)
    if payload.reply_key is not None:
        assert reply == Reply(payload.reply_key, "completed", result=result, ttl=REPLY_TTL)
    elif not payload.has_continuations:
        assert reply is None
    elif returned_failure == "failed" and isinstance(result, dict) and result.get("success") is False:
        assert reply is not None
        assert (reply.status, reply.result) == ("failed", None)
        assert reply.error.strip()
        if isinstance(error := result.get("error"), str) and error.strip():
            assert reply.error == error
    else:
        keeps = kept == "result" or (kept is None and payload.on_success is None)
        assert reply == status(delivery, status="completed", result=result if keeps else None)


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


# Continuations that a worker may not send.

further = st.lists(st.tuples(st.sampled_from(["on_success", "on_error"]), some.names, some.names), max_size=2).map(
    tuple
)


@given(some.deliveries(attempts=st.just(1)), further, st.data())
def test_a_continuation_outside_of_the_list_is_never_sent(
    delivery: Delivery, further: tuple[tuple[str, str, str], ...], data: st.DataObject
) -> None:
    """A message that names one is rejected before it runs, and no settlement or fallback of it sends one."""
    payload = payload_of(delivery)
    delivery = attrs.evolve(delivery, further_continuations=further)
    named = [(spec.queue, spec.task_name) for spec in (payload.on_success, payload.on_error) if spec is not None]
    everything = [*named, *((queue, task_name) for _, queue, task_name in further)]
    choices = [*everything, *((queue, None) for queue, _ in everything), ("another", None)]
    allowed = frozenset(data.draw(st.lists(st.sampled_from(choices))))
    policy = RetryPolicy(allowed_continuations=allowed)
    fine = all((queue, None) in allowed or (queue, name) in allowed for queue, name in everything)
    rejected = rejection(delivery, {payload.task_name}, policy, NOW)
    assert (rejected is None) == fine
    if rejected is None:
        return
    assert rejected.error.startswith("ContinuationNotAllowed: on_")
    settlement = settle(delivery, rejected, policy)
    assert settlement.verdict is Verdict.BURY
    assert settlement.reason == rejected.error
    if payload.reply_key or payload.task_id:
        assert settlement.reply is not None
        assert (settlement.reply.status, settlement.reply.error) == ("failed", rejected.error)
    telling = [("on_error", *named[-1])] if payload.on_error else []
    told = [*telling, *(one for one in further if one[0] == "on_error")]
    may_tell = bool(telling) and all((queue, None) in allowed or (queue, name) in allowed for _, queue, name in told)
    for one in (settlement, *fallbacks(settlement, "refused", policy)):
        assert one.follow_up is None or (may_tell and one.follow_up.payload.task_name == named[-1][1])
    assert (settlement.follow_up is not None) == may_tell


def test_a_refused_continuation_is_named_with_the_remedy() -> None:
    """The error names the callback, its task, its queue and the option that allows it."""
    spec = ContinuationSpec(task_name="wipe", queue="admin")
    delivery = Delivery("1", "q", 1, TaskPayload(task_name="t", queue="q", on_success=spec), {})
    rejected = rejection(delivery, {"t"}, RetryPolicy(allowed_continuations=frozenset({("callbacks", None)})), NOW)
    assert rejected is not None
    assert rejected.error == (
        "ContinuationNotAllowed: on_success names task 'wipe' on queue 'admin', which the worker of queue 'q' may not "
        "send; allow it with --allow-continuation admin:wipe or Consumer(allow_continuations=...)"
    )


@given(some.names, some.names)
def test_an_unreadable_message_tells_only_an_allowed_callback(queue: str, task_name: str) -> None:
    """The on_error that is found in a message that cannot be read is sent where the list allows it."""
    raw = {"task_name": 7, "task_id": "i", "on_error": {"task_name": task_name, "kwargs": {}, "queue": queue}}
    delivery = Delivery("1", "q", 1, None, raw, problem="unreadable")
    for allowed, sent in ((frozenset({(queue, None)}), True), (frozenset({("no" + queue, None)}), False)):
        policy = RetryPolicy(allowed_continuations=allowed)
        rejected = rejection(delivery, {}, policy, NOW)
        assert rejected is not None
        settlement = settle(delivery, rejected, policy)
        assert (settlement.follow_up is not None) == sent
        assert settlement.reply == Reply("i", "failed", error=rejected.error, ttl=STATUS_TTL)


# The row "raised".


@pytest.mark.parametrize("awaits", AWAITED)
@given(st.data(), errors, policies)
def test_a_raise_tells_whoever_awaits_it_and_is_never_re_run(
    awaits: str, data: st.DataObject, error: str, policy: RetryPolicy
) -> None:
    """raised: the reply failed, or on_error with the dispatch id first and status failed; acknowledged at once."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Raised(error), policy) == failed(delivery, error, Verdict.ACK)


@given(some.deliveries("on_success"), errors, policies)
def test_a_raise_without_on_error_chains_nothing(delivery: Delivery, error: str, policy: RetryPolicy) -> None:
    """raised, only on_success: nothing is chained; status failed; acknowledged."""
    settlement = settle(delivery, Raised(error), policy)
    assert settlement.follow_up is None
    assert settlement.verdict is Verdict.ACK
    assert settlement.reply == status(delivery, status="failed", error=error)


@given(some.deliveries("nothing"), errors, policies)
def test_a_raise_that_nobody_awaits_is_retried_and_in_the_end_buried(
    delivery: Delivery, error: str, policy: RetryPolicy
) -> None:
    """raised, neither: again with backoff below max_attempts; at it buried, and failed under its task_id."""
    settlement = settle(delivery, Raised(error), policy)
    if delivery.attempt < policy.max_attempts:
        assert settlement == Settlement(delivery, Verdict.RETRY, delay=policy.delay(delivery), reason=error)
    else:
        assert settlement == failed(delivery, error, Verdict.BURY)
        assert settlement.follow_up is None


# The row "asked to retry".


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


# The row "malformed / unknown task / too many attempts".


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(st.data(), errors, policies)
def test_a_rejected_message_tells_its_sender_and_is_buried(
    awaits: str, data: st.DataObject, error: str, policy: RetryPolicy
) -> None:
    """rejected: the reply failed, or on_error with the reason and status failed; buried with the reason."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Rejected(error), policy) == failed(delivery, error, Verdict.BURY)


RAW_FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda wire: wire,
    "text": json.dumps,
    "bytes": lambda wire: json.dumps(wire).encode(),
}


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(data=st.data(), form=st.sampled_from(list(RAW_FORMS)), error=errors, policy=policies)
def test_an_unreadable_message_tells_its_sender_too(
    awaits: str, data: st.DataObject, form: str, error: str, policy: RetryPolicy
) -> None:
    """malformed: what can still be found of its sender hears of it, as if the message could be read; buried."""
    readable = data.draw(some.deliveries(awaits))
    wire = {
        **to_wire(payload_of(readable)),
        **data.draw(st.sampled_from([{"kwargs": None}, {"args": 7}, {"queue": ""}])),
    }
    delivery = attrs.evolve(readable, payload=None, raw=RAW_FORMS[form](wire), problem="broken")
    rejected = rejection(delivery, {payload_of(readable).task_name}, policy, NOW)
    assert rejected == Rejected("MalformedPayload", "broken")
    expected = failed(readable, error, Verdict.BURY)
    assert settle(delivery, Rejected(error), policy) == attrs.evolve(expected, delivery=delivery)


@given(some.deliveries("both", task_id=False), errors, policies)
def test_a_dispatch_without_an_id_leaves_its_error_under_the_id_that_its_callback_gets(
    delivery: Delivery, error: str, policy: RetryPolicy
) -> None:
    """A foreign message with on_error and no task_id: the real error stands under the id that on_error is given."""
    raised = settle(delivery, Raised(error), policy)
    assert raised.follow_up is not None
    assert raised.reply is not None
    assert raised.follow_up.payload.args == [raised.reply.key] == [delivery.id]


@pytest.mark.parametrize("org_id", ["\x00", "\ud800", "x" * 256], ids=["NUL", "surrogate", "long"])
@given(some.deliveries("both"), outcomes, policies)
def test_an_unfit_organisation_does_not_keep_the_sender_from_being_told(
    org_id: str, delivery: Delivery, outcome: Outcome, policy: RetryPolicy
) -> None:
    """What a foreign writer put into fairness or org_id that no writer of ours may send is left out, and no more."""
    payload = attrs.evolve(payload_of(delivery), fairness=FairnessKey(org_id=org_id, pipeline_priority=7))
    delivery = attrs.evolve(delivery, payload=payload, org_id=org_id)
    settlement = settle(delivery, outcome, policy)
    if settlement.follow_up is not None:
        write_message(settlement.follow_up)
        assert settlement.follow_up.org_id == ""
        assert settlement.follow_up.payload.fairness is not None
        assert settlement.follow_up.payload.fairness.pipeline_priority == 7


@given(some.deliveries("on_error"), some.names, errors, policies)
def test_an_unreadable_message_with_two_addresses_tells_both(
    readable: Delivery, key: str, error: str, policy: RetryPolicy
) -> None:
    """malformed because it has reply_key and on_error: the caller gets its reply and on_error runs."""
    raw = {**to_wire(payload_of(readable)), "reply_key": key}
    delivery = attrs.evolve(readable, payload=None, raw=raw, problem="two addresses")
    settlement = settle(delivery, Rejected(error), policy)
    assert settlement.reply == Reply(key, "failed", error=error, ttl=REPLY_TTL)
    assert settlement.follow_up == failed(readable, error, Verdict.BURY).follow_up
    assert settlement.verdict is Verdict.BURY


@given(st.text() | st.binary() | some.json_arrays | some.scalars, errors, policies)
def test_rubbish_is_buried(raw: Any, error: str, policy: RetryPolicy) -> None:
    """malformed beyond recognition: buried with its reason, and nobody is told because nobody is known."""
    delivery = Delivery("1", "q", 1, None, raw, "not JSON")
    assert settle(delivery, Rejected(error), policy) == Settlement(
        delivery, Verdict.BURY, reason=error, outcome="failure", error_type=error
    )


@given(some.deliveries(), policies)
def test_what_can_be_run_is_not_rejected(delivery: Delivery, policy: RetryPolicy) -> None:
    """A readable message of a known task is run up to its last attempt, and rejected after it with the reason."""
    rejected = rejection(delivery, {payload_of(delivery).task_name}, policy, NOW)
    if delivery.attempt <= policy.max_attempts:
        assert rejected is None
    else:
        assert rejected is not None
        assert rejected.error.startswith(f"TooManyAttempts: delivered {delivery.attempt} times")


@given(some.deliveries(attempts=st.just(1)), policies)
def test_an_unknown_task_is_rejected_by_name(delivery: Delivery, policy: RetryPolicy) -> None:
    """A task that is not registered here is rejected with its name and queue."""
    rejected = rejection(delivery, {payload_of(delivery).task_name + "x"}, policy, NOW)
    assert rejected is not None
    assert rejected.error.startswith("UnknownTask: ")
    assert repr(payload_of(delivery).task_name) in rejected.error
    assert repr(delivery.queue) in rejected.error


# What holds in every cell.


@given(some.deliveries(), outcomes, policies)
def test_settling_is_pure(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> None:
    """The same inputs give the same settlement, and nothing of them is changed."""
    before = copy.deepcopy((delivery, outcome, policy))
    first = settle(delivery, outcome, policy)
    assert settle(delivery, outcome, policy) == first
    assert (delivery, outcome, policy) == before
    assert first.delivery is delivery


@given(some.deliveries(), outcomes, policies)
def test_every_settlement_can_be_written(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> None:
    """Whatever follows from a message that could be read is accepted by the strict writer."""
    settlement = settle(delivery, outcome, policy)
    check_delay(settlement.delay)
    if settlement.follow_up is not None:
        write_message(settlement.follow_up)
    if settlement.reply is not None:
        value_to_json(settlement.reply.result)


@pytest.mark.parametrize("kind", ["text", "list", "nested"])
def test_a_result_as_large_as_results_may_be_can_be_handed_on(kind: str) -> None:
    """What lenient normalisation lets through is not refused when it becomes an argument or a reply."""
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
def test_any_return_value_reaches_its_callback(delivery: Delivery, value: Any, policy: RetryPolicy) -> None:
    """Whatever a task returns, the callback's message can be written: a strange value never loses the callback."""
    settlement = settle(delivery, Returned.of(value), policy)
    assert settlement.follow_up is not None
    assert some.outside(settlement.follow_up.payload.args[0]) is None
    to_json(settlement.follow_up.payload)


@given(some.anything)
def test_a_returned_value_is_made_to_fit_and_its_losses_are_listed(value: Any) -> None:
    """Returned.of keeps the paths of what was replaced, for the one warning."""
    returned = Returned.of(value)
    assert some.outside(returned.result) is None
    assert all(path.startswith("$") for path in returned.replaced)


@pytest.mark.parametrize("depth", [1, 62, 63, 64])
@pytest.mark.parametrize("outcome", [Returned(1), Raised("E: x")], ids=["returned", "raised"])
def test_the_kwargs_of_a_continuation_arrive_as_they_were_sent(depth: int, outcome: Outcome) -> None:
    """kwargs that the wire carried once are carried on unchanged, up to its greatest depth."""
    spec = ContinuationSpec(task_name="c", kwargs={"x": some.nest(depth, "leaf"), "y": 1}, queue="q")
    payload = TaskPayload(task_name="t", queue="q", on_success=spec, on_error=spec, task_id="id")
    settlement = settle(Delivery("1", "q", 1, payload, to_wire(payload)), outcome, RetryPolicy())
    assert settlement.follow_up is not None
    assert settlement.follow_up.payload.kwargs == spec.kwargs


# The error text in callback_kwargs.


@given(some.json_objects.filter(lambda found: found.get("error") is None), errors)
def test_the_error_is_put_where_the_products_callbacks_look(wanted: dict[str, Any], error: str) -> None:
    """A callback_kwargs mapping without an error, or with null, gets the text; all else in it stays."""
    for mapping in (wanted, {**wanted, "error": None}):
        assert _told_kwargs({"callback_kwargs": mapping}, error) == {"callback_kwargs": {**wanted, "error": error}}


@given(some.json_objects, some.json_values.filter(lambda value: value is not None), errors)
def test_an_error_that_is_there_already_stays(wanted: dict[str, Any], present: Any, error: str) -> None:
    """What the sender put into callback_kwargs["error"] is not overwritten, not even an empty one."""
    kwargs = {"callback_kwargs": {**wanted, "error": present}}
    assert some.same(_told_kwargs(kwargs, error), kwargs)


@given(some.json_objects.filter(lambda found: not isinstance(found.get("callback_kwargs"), dict)), errors)
def test_a_callback_that_takes_only_the_id_gets_nothing_it_did_not_ask_for(kwargs: dict[str, Any], error: str) -> None:
    """Without a callback_kwargs mapping the kwargs stay exactly as they are."""
    assert some.same(_told_kwargs(kwargs, error), kwargs)


@given(some.scalars | some.json_arrays, errors)
def test_callback_kwargs_that_are_no_mapping_are_left_alone(value: Any, error: str) -> None:
    """callback_kwargs of another type are the callback's own business."""
    assert some.same(_told_kwargs({"callback_kwargs": value}, error), {"callback_kwargs": value})


@given(some.deliveries("both"), some.json_values, policies)
def test_a_success_puts_no_error_anywhere(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """on_success gets its kwargs as they are."""
    settlement = settle(delivery, Returned(result), policy)
    spec = payload_of(delivery).on_success
    assert settlement.follow_up is not None
    assert spec is not None
    assert some.same(settlement.follow_up.payload.kwargs, spec.kwargs)


# The ids of continuations.


def test_the_id_of_a_continuation_is_a_fixed_function_of_its_parents() -> None:
    """Workers of different releases may settle the same message: the derivation never changes."""
    spec = ContinuationSpec(task_name="c", queue="q")
    payload = TaskPayload(task_name="t", queue="q", on_success=spec, on_error=spec, task_id="dispatch-1")
    ids = _ids(Delivery("1", "q", 1, payload, {}))
    assert ids == ("fb5ad3cd-2aaa-51ee-a9fe-f93592083619", "ff2ef6e7-a67b-5353-ae55-45a8b5481cf9")


@given(some.deliveries("both"), st.integers(1, 9), st.integers(1, 9))
def test_the_id_of_a_continuation_is_the_same_on_every_attempt(delivery: Delivery, one: int, other: int) -> None:
    """A redelivery continues under the same ids, so that a doubled callback can be recognised."""
    assert _ids(attrs.evolve(delivery, attempt=one)) == _ids(attrs.evolve(delivery, attempt=other))


@given(st.lists(some.deliveries("both"), min_size=2, max_size=4, unique_by=parent_of))
def test_the_ids_of_continuations_differ_between_kinds_and_parents(found: list[Delivery]) -> None:
    """on_success and on_error of one dispatch, and those of different dispatches, never share an id."""
    ids = [each for delivery in found for each in _ids(delivery)]
    assert len(set(ids)) == 2 * len(found)
    assert not set(ids) & {payload_of(delivery).task_id for delivery in found}


# Backoff.


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


# The fallbacks of a settlement that was refused for good.


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


def _told_kwargs(kwargs: dict[str, Any], error: str) -> dict[str, Any]:
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


def _plain(**fields: Any) -> Delivery:
    payload = TaskPayload(task_name="t", queue="q")
    return attrs.evolve(Delivery("1", "q", 1, payload, {}), **fields)
