"""Hypothesis strategies for values of the wire's domain, and for payloads of every shape.

`texts` excludes NUL, which `st.text()` generates and the wire refuses.
"""

from __future__ import annotations

import string
from typing import Any

from hypothesis import strategies as st

from unstract_core import ContinuationSpec, FairnessKey, TaskPayload
from unstract_core.values.limits import ENVELOPE

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(-1e16, 1e16, exclude_min=True, exclude_max=True).map(lambda number: number or 0.0)
edges = st.sampled_from(
    [
        2**63 - 1,
        -(2**63),
        2**53 + 1,
        1e16 - 2,
        5e-324,
        0.1 + 0.2,
        1e15,
        3.0,
        "\U0001f4dd",
        "\ufeff",
        "\x7f\x01",
    ]
)
"""Values that some stores are known to change."""
scalars = st.none() | st.booleans() | integers | floats | texts | edges
keys = texts | st.text(string.ascii_letters + "_", min_size=1, max_size=6)


def objects(members: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for dicts with these values, except kombu's envelope."""
    return st.dictionaries(keys, members, max_size=4).filter(lambda found: found.keys() != ENVELOPE)


json_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | objects(inner), max_leaves=12)
json_objects = objects(json_values)
json_arrays = st.lists(json_values, max_size=4)

_small_values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | objects(inner), max_leaves=3
)
_members = st.dictionaries(keys, _small_values, max_size=2)
_arguments = st.lists(_small_values, max_size=2)

names = st.text(string.ascii_letters + string.digits + "_-.é", min_size=1, max_size=12)
fairness_keys = st.builds(
    FairnessKey,
    org_id=st.none() | names,
    workload_type=st.sampled_from(["api", "non_api"]),
    pipeline_priority=st.integers(1, 10),
)
continuations = st.builds(
    ContinuationSpec,
    task_name=names,
    kwargs=_members | st.fixed_dictionaries({"callback_kwargs": _members}),
    queue=names,
)

headers = st.dictionaries(names | st.sampled_from(["traceparent", "tracestate", "task", "id"]), texts, max_size=3)
"""Includes names that have a meaning of their own on Celery's wire."""

AWAITS = ("reply", "both", "on_success", "on_error", "nothing")
_ways = st.sampled_from(AWAITS)
_flags = st.booleans()
_fairness = st.none() | fairness_keys
_headers = st.none() | headers


@st.composite
def payloads(
    draw: st.DrawFn, awaits: str | None = None, task_id: bool | None = None, queue: str | None = None
) -> TaskPayload:
    """Generate a payload.

    Args:
        awaits: How the sender waits for the outcome, one of `AWAITS`; None for any.
        task_id: Whether the payload has a task id; None for either.
        queue: The payload's queue; None for any name.
    """
    way = awaits or draw(_ways)
    has_id = draw(_flags) if task_id is None else task_id
    return TaskPayload(
        task_name=draw(names),
        args=draw(_arguments),
        kwargs=draw(_members),
        queue=draw(names) if queue is None else queue,
        fairness=draw(_fairness),
        reply_key=draw(names) if way == "reply" else None,
        on_success=draw(continuations) if way in ("both", "on_success") else None,
        on_error=draw(continuations) if way in ("both", "on_error") else None,
        task_id=draw(names) if has_id else None,
        headers=draw(_headers),
    )
