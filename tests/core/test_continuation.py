"""The rules: the settlement of each outcome, written out whole, over generated messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import strategies as some
from core.settlements import (
    AWAITED,
    NOW,
    errors,
    failed,
    follow_up,
    outcomes,
    payload_of,
    policies,
    results,
    status,
)
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    Delivery,
    ExecutionResult,
    FairnessKey,
    Reply,
    Settlement,
    TaskPayload,
    Verdict,
    to_wire,
)
from unstract_core.continuation import fallbacks, rejection, settle
from unstract_core.outcomes import Outcome, Raised, Rejected, RetryPolicy, Returned
from unstract_core.transport import REPLY_TTL, STATUS_TTL, write_message
from unstract_core.values import cut

# A task that returned.


@given(some.deliveries("reply"), some.json_values, policies)
def test_a_return_answers_a_blocking_call(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """With reply_key: the reply is completed with the result, kept for an hour; the message is acknowledged."""
    reply = Reply(payload_of(delivery).reply_key or "", "completed", result=result, ttl=3600.0)
    assert settle(delivery, Returned(result), policy) == Settlement(
        delivery, Verdict.ACK, reply=reply, outcome="success"
    )


@pytest.mark.parametrize("awaits", ["both", "on_success"])
@given(st.data(), some.json_values, policies)
def test_a_return_sends_on_success(awaits: str, data: st.DataObject, result: Any, policy: RetryPolicy) -> None:
    """on_success gets the result first and its own kwargs unchanged; status completed; acknowledged."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Returned(result), policy) == Settlement(
        delivery,
        Verdict.ACK,
        follow_up=follow_up(delivery, "on_success", result),
        reply=status(delivery, status="completed"),
        outcome="success",
    )


@given(some.deliveries("on_error"), some.json_values, policies)
def test_a_return_without_on_success_sends_nothing(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """With on_error alone: no callback and no retry; status completed; acknowledged."""
    expected = Settlement(
        delivery, Verdict.ACK, reply=status(delivery, status="completed", result=result), outcome="success"
    )
    assert settle(delivery, Returned(result), policy) == expected


@given(some.deliveries("nothing"), some.json_values, policies)
def test_an_unawaited_return_is_acknowledged(delivery: Delivery, result: Any, policy: RetryPolicy) -> None:
    """Without callbacks and reply_key the message is acknowledged, and nothing is written."""
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


@given(
    some.deliveries(task_id=True),
    results,
    st.sampled_from([None, "none", "result"]),
    st.sampled_from(["completed", "failed"]),
)
def test_the_policy_decides_the_content_of_a_status(
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


# Continuations that a worker may not send.


further = st.lists(st.tuples(st.sampled_from(["on_success", "on_error"]), some.names, some.names), max_size=2).map(
    tuple
)


@given(some.deliveries(attempts=st.just(1)), further, st.data())
def test_a_forbidden_continuation_is_never_sent(
    delivery: Delivery, further: tuple[tuple[str, str, str], ...], data: st.DataObject
) -> None:
    """A message that names one is rejected before it runs, and no settlement or fallback sends it."""
    payload = payload_of(delivery)
    delivery = attrs.evolve(delivery, further_continuations=further)
    named = [(spec.queue, spec.task_name) for spec in (payload.on_success, payload.on_error) if spec is not None]
    everything = [*named, *((queue, task_name) for _, queue, task_name in further)]
    choices = [*everything, *((queue, None) for queue, _ in everything), ("another", None)]
    allowed = frozenset(data.draw(st.lists(st.sampled_from(choices))))
    policy = RetryPolicy(allowed_continuations=allowed)
    all_allowed = all((queue, None) in allowed or (queue, name) in allowed for queue, name in everything)
    rejected = rejection(delivery, {payload.task_name}, policy, NOW)
    assert (rejected is None) == all_allowed
    if rejected is None:
        return
    assert rejected.error.startswith("ContinuationNotAllowed: on_")
    settlement = settle(delivery, rejected, policy)
    assert settlement.verdict is Verdict.BURY
    assert settlement.reason == rejected.error
    if payload.reply_key or payload.task_id:
        assert settlement.reply is not None
        assert (settlement.reply.status, settlement.reply.error) == ("failed", rejected.error)
    own = [("on_error", *named[-1])] if payload.on_error else []
    callbacks = [*own, *(one for one in further if one[0] == "on_error")]
    may_call = bool(own) and all((queue, None) in allowed or (queue, name) in allowed for _, queue, name in callbacks)
    for one in (settlement, *fallbacks(settlement, "refused", policy)):
        assert one.follow_up is None or (may_call and one.follow_up.payload.task_name == named[-1][1])
    assert (settlement.follow_up is not None) == may_call


def test_the_error_names_the_forbidden_continuation() -> None:
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
def test_an_unreadable_message_calls_only_allowed_callbacks(queue: str, task_name: str) -> None:
    """The on_error found in an unreadable message is sent only if the list allows it."""
    raw = {"task_name": 7, "task_id": "i", "on_error": {"task_name": task_name, "kwargs": {}, "queue": queue}}
    delivery = Delivery("1", "q", 1, None, raw, problem="unreadable")
    for allowed, sent in ((frozenset({(queue, None)}), True), (frozenset({("no" + queue, None)}), False)):
        policy = RetryPolicy(allowed_continuations=allowed)
        rejected = rejection(delivery, {}, policy, NOW)
        assert rejected is not None
        settlement = settle(delivery, rejected, policy)
        assert (settlement.follow_up is not None) == sent
        assert settlement.reply == Reply("i", "failed", error=rejected.error, ttl=STATUS_TTL)


# A task that raised.


@pytest.mark.parametrize("awaits", AWAITED)
@given(st.data(), errors, policies)
def test_an_awaited_raise_reaches_its_sender_without_retry(
    awaits: str, data: st.DataObject, error: str, policy: RetryPolicy
) -> None:
    """The reply is failed, or on_error gets the dispatch id first and the status is failed; acknowledged at once."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Raised(error), policy) == failed(delivery, error, Verdict.ACK)


@given(some.deliveries("on_success"), errors, policies)
def test_a_raise_without_on_error_sends_nothing(delivery: Delivery, error: str, policy: RetryPolicy) -> None:
    """With on_success alone: no callback; status failed; acknowledged."""
    settlement = settle(delivery, Raised(error), policy)
    assert settlement.follow_up is None
    assert settlement.verdict is Verdict.ACK
    assert settlement.reply == status(delivery, status="failed", error=error)


@given(some.deliveries("nothing"), errors, policies)
def test_an_unawaited_raise_is_retried_then_dead_lettered(delivery: Delivery, error: str, policy: RetryPolicy) -> None:
    """Retried with back-off below max_attempts; then dead-lettered, and failed under its task_id."""
    settlement = settle(delivery, Raised(error), policy)
    if delivery.attempt < policy.max_attempts:
        assert settlement == Settlement(
            delivery, Verdict.RETRY, delay=policy.delay(delivery), reason=error, error_type=error
        )
    else:
        assert settlement == failed(delivery, error, Verdict.BURY)
        assert settlement.follow_up is None


# A message that must not run.


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(st.data(), errors, policies)
def test_a_rejected_message_reaches_its_sender(
    awaits: str, data: st.DataObject, error: str, policy: RetryPolicy
) -> None:
    """The reply is failed, or on_error gets the reason and the status is failed; dead-lettered with the reason."""
    delivery = data.draw(some.deliveries(awaits))
    assert settle(delivery, Rejected(error), policy) == failed(delivery, error, Verdict.BURY)


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(st.data(), st.text(), policies)
def test_a_failure_has_its_type_and_message(
    awaits: str, data: st.DataObject, message: str, policy: RetryPolicy
) -> None:
    """The settlement of a failure has the type of its error, and the text without it, as the wire can carry it."""
    settlement = settle(data.draw(some.deliveries(awaits)), Rejected("SomeError", message), policy)
    assert (settlement.error_type, settlement.error_message) == ("SomeError", cut(message))
    assert settlement.reason == cut(f"SomeError: {message}" if message else "SomeError")


RAW_FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda wire: wire,
    "text": json.dumps,
    "bytes": lambda wire: json.dumps(wire).encode(),
}


@pytest.mark.parametrize("awaits", some.AWAITS)
@given(data=st.data(), form=st.sampled_from(list(RAW_FORMS)), error=errors, policy=policies)
def test_an_unreadable_message_reaches_its_sender(
    awaits: str, data: st.DataObject, form: str, error: str, policy: RetryPolicy
) -> None:
    """The addresses that can still be read get the error as for a readable message; dead-lettered."""
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
def test_a_dispatch_without_id_uses_the_message_id(delivery: Delivery, error: str, policy: RetryPolicy) -> None:
    """For a foreign message without task_id, the status is kept under the id that on_error gets."""
    raised = settle(delivery, Raised(error), policy)
    assert raised.follow_up is not None
    assert raised.reply is not None
    assert raised.follow_up.payload.args == [raised.reply.key] == [delivery.id]


@pytest.mark.parametrize("org_id", ["\x00", "\ud800", "x" * 256], ids=["NUL", "surrogate", "long"])
@given(some.deliveries("both"), outcomes, policies)
def test_an_invalid_organisation_does_not_stop_callbacks(
    org_id: str, delivery: Delivery, outcome: Outcome, policy: RetryPolicy
) -> None:
    """A foreign org_id that the wire refuses is left out, and the rest of the callback is sent."""
    payload = attrs.evolve(payload_of(delivery), fairness=FairnessKey(org_id=org_id, pipeline_priority=7))
    delivery = attrs.evolve(delivery, payload=payload, org_id=org_id)
    settlement = settle(delivery, outcome, policy)
    if settlement.follow_up is not None:
        write_message(settlement.follow_up)
        assert settlement.follow_up.org_id == ""
        assert settlement.follow_up.payload.fairness is not None
        assert settlement.follow_up.payload.fairness.pipeline_priority == 7


@given(some.deliveries("on_error"), some.names, errors, policies)
def test_an_unreadable_message_reaches_both_addresses(
    readable: Delivery, key: str, error: str, policy: RetryPolicy
) -> None:
    """If it has reply_key and on_error, the caller gets its reply and on_error runs."""
    raw = {**to_wire(payload_of(readable)), "reply_key": key}
    delivery = attrs.evolve(readable, payload=None, raw=raw, problem="two addresses")
    settlement = settle(delivery, Rejected(error), policy)
    assert settlement.reply == Reply(key, "failed", error=error, ttl=REPLY_TTL)
    assert settlement.follow_up == failed(readable, error, Verdict.BURY).follow_up
    assert settlement.verdict is Verdict.BURY


@given(st.text() | st.binary() | some.json_arrays | some.scalars, errors, policies)
def test_an_unrecognisable_message_is_dead_lettered(raw: Any, error: str, policy: RetryPolicy) -> None:
    """It has no sender to notify, and its dead letter has the reason."""
    delivery = Delivery("1", "q", 1, None, raw, "not JSON")
    assert settle(delivery, Rejected(error), policy) == Settlement(
        delivery, Verdict.BURY, reason=error, outcome="failure", error_type=error
    )


@given(some.deliveries(), policies)
def test_a_message_is_rejected_only_after_max_attempts(delivery: Delivery, policy: RetryPolicy) -> None:
    """A readable message of a known task runs up to its last attempt, and is rejected after it with the reason."""
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
