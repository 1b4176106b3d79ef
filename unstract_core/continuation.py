"""The rules: (delivery, outcome) -> settlement, as pure functions without I/O.

Every rule about replies, continuations, retries and dead letters is here, once. The consumer brings the outcome of a
task, and a transport carries the settlement out. Two principles explain the rules:

- A task is awaited if its message has a `reply_key`, `on_success` or `on_error`. An awaited task that raises has
  already cost money, so it is not retried: its sender gets the real error instead.
- Every failure reaches the sender, also that of an unreadable message or an unknown task.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Container, Iterator
from typing import cast

import attrs

from unstract_core.codec import Salvage, check_headers, check_name, salvage, value_to_json
from unstract_core.errors import (
    ContinuationNotAllowed,
    Expired,
    MalformedPayload,
    PayloadError,
    TooManyAttempts,
    UnknownTask,
    WorkerLost,
)
from unstract_core.outcomes import Ignored, Outcome, Raised, Rejected, RetryAsked, RetryPolicy, Returned
from unstract_core.payload import ContinuationSpec, FairnessKey, TaskPayload
from unstract_core.transport import (
    REPLY_TTL,
    STATUS_TTL,
    Delivery,
    Message,
    Reply,
    Settlement,
    Verdict,
)
from unstract_core.values import cut, error_text, normalise_members
from unstract_core.values.limits import JSONValue

CONTINUATION_IDS = uuid.UUID("5b0f1f0e-54f9-5a52-9a34-6a2f0c1e7c55")
"""The namespace of continuation ids: the id is uuid5 of "<dispatch id>/on_success" or "<dispatch id>/on_error"."""


def settle(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> Settlement:
    """Return the settlement of a delivery. Pure, and never raises.

    If a rule fails on a message, the message is dead-lettered with its result and the reason.

    Args:
        delivery: The delivery.
        outcome: The outcome of its task, or the reason why the task did not run.
        policy: The policy of the task.
    """
    try:
        return _by_rule(delivery, outcome, policy)
    except Exception as exc:  # an error in a rule must not lose the message
        result = outcome.result if isinstance(outcome, Returned) else None
        reason = cut(f"no rule could be applied: {error_text(exc)}")
        return Settlement(delivery, Verdict.BURY, reason=reason, result=result, outcome="failure", error_message=reason)


def _by_rule(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> Settlement:
    match outcome:
        case Returned(result):
            return _succeeded(delivery, result, policy)
        case Ignored():
            return Settlement(delivery, Verdict.ACK)
        case RetryAsked(delay=delay) if delivery.attempt < policy.most_attempts:
            return _retried(delivery, outcome, policy.delay(delivery) if delay is None else delay)
        case Raised() | RetryAsked():
            if _awaited(_sender(delivery)):
                return _failed_by(delivery, outcome, Verdict.ACK, policy)
            if delivery.attempt < policy.max_attempts and policy.retry_raised and not policy.never_rerun:
                return _retried(delivery, outcome, policy.delay(delivery))
            return _failed_by(delivery, outcome, Verdict.BURY, policy)
        case Rejected():
            return _failed_by(delivery, outcome, Verdict.BURY, policy)


def rejection(
    delivery: Delivery, known: Container[str], policy: RetryPolicy, now: datetime.datetime
) -> Rejected | None:
    """Return why a delivery must not run; None if its task may start.

    A delivery is rejected if it is unreadable, was delivered too often, has expired, names an unknown task, or names a
    continuation that the policy does not allow.

    Args:
        delivery: The delivery.
        known: The names of the tasks that this worker can run.
        policy: The policy of the task.
        now: The time, with a time zone.
    """
    if delivery.payload is None:
        return Rejected.because(MalformedPayload(delivery.problem or "unreadable"))
    if policy.never_rerun and delivery.attempt > 1:
        lost = "another worker took this task and did not end it; it may have run, and is not run again"
        return Rejected.because(WorkerLost(lost))
    if delivery.attempt > policy.most_attempts:
        times = f"delivered {delivery.attempt} times and never settled; the limit is {policy.most_attempts}"
        return Rejected.because(TooManyAttempts(times))
    name = delivery.payload.task_name
    if name not in known:
        return Rejected.because(UnknownTask(f"no task {name!r} in the worker of queue {delivery.queue!r}"))
    if (unwanted := _not_allowed(delivery, policy)) is not None:
        return Rejected.because(ContinuationNotAllowed(unwanted))
    return expiry(delivery, now)


def _not_allowed(delivery: Delivery, policy: RetryPolicy) -> str | None:
    """Return the error text for the first continuation that this worker may not send; None if it may send all."""
    if policy.allowed_continuations is None:
        return None
    payload = cast(TaskPayload, delivery.payload)
    named = [("on_success", payload.on_success), ("on_error", payload.on_error)]
    found = [(kind, spec.queue, spec.task_name) for kind, spec in named if spec is not None]
    for kind, queue, task_name in (*found, *delivery.further_continuations):
        if not policy.allows(queue, task_name):
            return (
                f"{kind} names task {task_name!r} on queue {queue!r}, which the worker of queue {delivery.queue!r} may "
                f"not send; allow it with --allow-continuation {queue}:{task_name} or Consumer(allow_continuations=...)"
            )
    return None


def expiry(delivery: Delivery, now: datetime.datetime) -> Rejected | None:
    """Return the rejection of a delivery that has expired; None if a task may start.

    Args:
        delivery: The delivery.
        now: The time, with a time zone.
    """
    if delivery.expires is None or now < delivery.expires:
        return None
    return Rejected.because(Expired(f"the message expired at {delivery.expires.isoformat()}; it was not run"))


def with_headers(settlement: Settlement, headers: dict[str, str]) -> Settlement:
    """Return a settlement whose continuation carries `headers` instead of the headers of the delivery."""
    follow_up = settlement.follow_up
    if follow_up is None:
        return settlement
    return attrs.evolve(
        settlement, follow_up=attrs.evolve(follow_up, payload=attrs.evolve(follow_up.payload, headers=headers))
    )


def fallbacks(settlement: Settlement, refusal: str, policy: RetryPolicy | None = None) -> Iterator[Settlement]:
    """Yield the settlements to try, in this order, after a transport refused one for good.

    1. A retry without its delay.
    2. A dead letter whose sender gets the error: by callback and reply together, by the callback alone, by the reply
       alone. The transport may have refused one of the two.
    3. A dead letter alone.

    Each dead letter is tried with the task's result first, and then without it. So the result of a task that ran is
    kept in the dead letters, unless the transport refuses the result itself; then its sender gets the error.

    Args:
        settlement: The refused settlement.
        refusal: The error text of the refusal.
        policy: The policy of the task. None (default): the default policy.
    """
    if settlement.verdict is Verdict.RETRY and settlement.delay:
        yield attrs.evolve(settlement, delay=0.0)
    delivery = settlement.delivery
    refused = f"(settling it failed: {refusal})"
    error = f"{settlement.reason} {refused}" if settlement.reason else f"result delivery failed: {refusal}"
    message = error
    if settlement.error_type:
        message = f"{settlement.error_message} {refused}" if settlement.error_message else refused
    complete = _failed(delivery, cut(error), settlement.error_type, cut(message), Verdict.BURY, policy or RetryPolicy())
    result = _result_of(settlement)
    dead_letters = [complete]
    if complete.follow_up is not None and complete.reply is not None:
        dead_letters += [attrs.evolve(complete, reply=None), attrs.evolve(complete, follow_up=None)]
    if complete.follow_up is not None or complete.reply is not None:
        dead_letters.append(attrs.evolve(complete, follow_up=None, reply=None))
    for dead_letter in dead_letters:
        if result is not None:
            yield attrs.evolve(dead_letter, result=result)
        yield dead_letter


def _result_of(settlement: Settlement) -> JSONValue:
    if settlement.result is not None or settlement.reason:
        return settlement.result
    follow_up = settlement.follow_up
    if follow_up is not None and follow_up.payload.args:
        return follow_up.payload.args[0]
    return settlement.reply.result if settlement.reply is not None else None


def _succeeded(delivery: Delivery, result: JSONValue, policy: RetryPolicy) -> Settlement:
    payload = cast(TaskPayload, delivery.payload)
    if payload.reply_key is not None:
        reply = Reply(payload.reply_key, "completed", result=result, ttl=REPLY_TTL)
        return Settlement(delivery, Verdict.ACK, reply=reply, outcome="success")
    if not payload.has_continuations:
        return Settlement(delivery, Verdict.ACK, outcome="success")
    status = None
    if payload.task_id:
        status = _status(_dispatch_id(delivery, payload), result, policy, carried=payload.on_success is not None)
    follow_up = _follow_up(delivery, payload, payload.on_success, "on_success", result) if payload.on_success else None
    return Settlement(delivery, Verdict.ACK, follow_up=follow_up, reply=status, outcome="success")


def _status(key: str, result: JSONValue, policy: RetryPolicy, *, carried: bool) -> Reply:
    """Return the status of a task that returned.

    Args:
        carried: Whether on_success carries the result.
    """
    if policy.returned_failure == "failed" and (error := _returned_failure(result)) is not None:
        return Reply(key, "failed", error=error, ttl=STATUS_TTL)
    kept = policy.status_payload or ("none" if carried else "result")
    return Reply(key, "completed", result=result if kept == "result" else None, ttl=STATUS_TTL)


def _returned_failure(result: JSONValue) -> str | None:
    """Return the error text of a result with `"success": false`; None for every other result."""
    if not isinstance(result, dict) or result.get("success") is not False:
        return None
    error = result.get("error")
    if not isinstance(error, str):
        error = "" if error is None else value_to_json(error)
    return cut(error) if error.strip() else 'the task returned "success": false without an error text'


def _failed_by(
    delivery: Delivery, outcome: Raised | RetryAsked | Rejected, verdict: Verdict, policy: RetryPolicy
) -> Settlement:
    return _failed(delivery, outcome.error, outcome.error_type, cut(outcome.message), verdict, policy)


def _failed(
    delivery: Delivery, error: str, error_type: str, error_message: str, verdict: Verdict, policy: RetryPolicy
) -> Settlement:
    sender = _sender(delivery)
    reply = None
    if sender.reply_key is not None:
        reply = Reply(sender.reply_key, "failed", error=error, ttl=REPLY_TTL)
    elif sender.task_id is not None or sender.on_error is not None:
        reply = Reply(_dispatch_id(delivery, sender), "failed", error=error, ttl=STATUS_TTL)
    follow_up = None
    if sender.on_error is not None and _may_call(delivery, sender.on_error, policy):
        on_error = attrs.evolve(sender.on_error, kwargs=with_error(sender.on_error.kwargs, error))
        follow_up = _follow_up(delivery, sender, on_error, "on_error", _dispatch_id(delivery, sender))
    return Settlement(
        delivery,
        verdict,
        follow_up=follow_up,
        reply=reply,
        reason=error,
        outcome="failure",
        error_type=error_type,
        error_message=error_message,
    )


def _may_call(delivery: Delivery, on_error: ContinuationSpec, policy: RetryPolicy) -> bool:
    further = [(queue, task_name) for kind, queue, task_name in delivery.further_continuations if kind == "on_error"]
    return all(policy.allows(*named) for named in [(on_error.queue, on_error.task_name), *further])


def _retried(delivery: Delivery, outcome: Raised | RetryAsked, delay: float) -> Settlement:
    return Settlement(
        delivery,
        Verdict.RETRY,
        delay=delay,
        reason=outcome.error,
        error_type=outcome.error_type,
        error_message=cut(outcome.message),
    )


def _sender(delivery: Delivery) -> TaskPayload | Salvage:
    return delivery.payload if delivery.payload is not None else salvage(delivery.raw)


def _awaited(sender: TaskPayload | Salvage) -> bool:
    return sender.reply_key is not None or (isinstance(sender, TaskPayload) and sender.has_continuations)


def _dispatch_id(delivery: Delivery, sender: TaskPayload | Salvage) -> str:
    """Return the dispatch id. A foreign writer's id may hold characters that no text may; `cut` replaces them."""
    return cut(sender.task_id or delivery.id)


def with_error(kwargs: dict[str, JSONValue], error: str) -> dict[str, JSONValue]:
    """Return `kwargs` with the error text as `callback_kwargs["error"]`, where the product's callbacks read it.

    They are unchanged if they have no mapping `callback_kwargs`, or if it has an error already.
    """
    wanted = kwargs.get("callback_kwargs")
    if isinstance(wanted, dict) and wanted.get("error") is None:
        return {**kwargs, "callback_kwargs": {**wanted, "error": error}}
    return kwargs


def _follow_up(
    delivery: Delivery, sender: TaskPayload | Salvage, spec: ContinuationSpec, kind: str, first: JSONValue
) -> Message:
    parent = cut(sender.task_id or f"{delivery.queue}/{delivery.id}")
    payload = TaskPayload(
        task_name=spec.task_name,
        args=[first],
        kwargs=normalise_members(spec.kwargs, lenient=True),
        queue=spec.queue,
        fairness=_fit_fairness(sender.fairness),
        task_id=str(uuid.uuid5(CONTINUATION_IDS, f"{parent}/{kind}")),
        headers=_fit_headers(sender.headers),
    )
    return Message(payload, spec.queue, org_id=_fit_owner(delivery.org_id) or "", priority=delivery.priority)


def _fit_fairness(fairness: FairnessKey | None) -> FairnessKey | None:
    return attrs.evolve(fairness, org_id=_fit_owner(fairness.org_id)) if fairness is not None else None


def _fit_headers(headers: dict[str, str] | None) -> dict[str, str] | None:
    try:
        return None if headers is None else check_headers(headers, "$.headers")
    except PayloadError:
        return None


def _fit_owner(org_id: str | None) -> str | None:
    """Return None for an id of a foreign writer that the wire refuses, so that the sender still gets its callback."""
    try:
        if org_id:
            check_name(org_id, "$.org_id")
    except PayloadError:
        return None
    return org_id
