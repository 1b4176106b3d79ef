"""The expected settlements of the rules, and strategies for outcomes and policies."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import strategies as some
from hypothesis import strategies as st

from unstract_core import (
    ContinuationSpec,
    Delivery,
    Message,
    Reply,
    Settlement,
    TaskPayload,
    Verdict,
)
from unstract_core.outcomes import Outcome, Raised, Rejected, RetryAsked, RetryPolicy, Returned
from unstract_core.transport import REPLY_TTL, STATUS_TTL

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
results = some.json_values | st.fixed_dictionaries(
    {"success": st.sampled_from([False, True, None, 0, "false"])},
    optional={
        "error": st.none() | st.sampled_from(["", " ", "Refused: quota"]) | some.json_values,
        "data": some.json_objects,
        "metadata": some.json_objects,
    },
)
"""Results of executions, of every shape that an executor can get wrong."""
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


def with_error(kwargs: dict[str, Any], error: str) -> dict[str, Any]:
    """Return the kwargs of an on_error callback, with the error text where the product's callbacks read it."""
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
        kwargs=spec.kwargs if error is None else with_error(spec.kwargs, error),
        queue=spec.queue,
        fairness=payload.fairness,
        task_id=continuation_id(delivery, kind),
        headers=payload.headers,
    )
    return Message(sent, spec.queue, org_id=delivery.org_id, priority=delivery.priority)


def status(delivery: Delivery, **outcome: Any) -> Reply | None:
    payload = payload_of(delivery)
    has_callback = payload.on_error is not None and outcome["status"] == "failed"
    key = payload.task_id or (delivery.id if has_callback else None)
    return Reply(key, ttl=STATUS_TTL, **outcome) if key is not None else None


def failed(delivery: Delivery, error: str, verdict: Verdict, *, typed: bool = True) -> Settlement:
    """Return the settlement of a failure that reaches its sender; its error text is a type alone, or has no type."""
    payload = payload_of(delivery)
    kind, message = (error, "") if typed else ("", error)
    if payload.reply_key is not None:
        reply = Reply(payload.reply_key, "failed", error=error, ttl=REPLY_TTL)
        return Settlement(
            delivery,
            verdict,
            reply=reply,
            reason=error,
            outcome="failure",
            error_type=kind,
            error_message=message,
        )
    return Settlement(
        delivery,
        verdict,
        follow_up=follow_up(delivery, "on_error", payload.task_id or delivery.id, error=error),
        reply=status(delivery, status="failed", error=error),
        reason=error,
        outcome="failure",
        error_type=kind,
        error_message=message,
    )
