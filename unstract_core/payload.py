"""What a task is: the types of the wire, and nothing that depends on how it is written or carried.

The shape is the product's, so that messages written today stay readable (docs/wire.md). The types hold what they
are given; the codec checks and copies when a message is written, with the path of what does not fit. One rule is
kept by the type itself, because a message that breaks it can be read in two ways.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from unstract_core.errors import PayloadError
from unstract_core.values.limits import JSONValue

WorkloadType: TypeAlias = Literal["api", "non_api"]

LOWEST_PRIORITY, DEFAULT_PRIORITY, HIGHEST_PRIORITY = 1, 5, 10


@attrs.frozen
class FairnessKey:
    """Whose work this is, and how urgent among that owner's: `pipeline_priority` 1..10, higher first."""

    org_id: str | None = None
    workload_type: WorkloadType = "non_api"
    pipeline_priority: int = DEFAULT_PRIORITY


@attrs.frozen(kw_only=True)
class ContinuationSpec:
    """A task to be sent when another one has ended. Its first positional argument is supplied then."""

    task_name: str
    kwargs: dict[str, JSONValue] = attrs.field(factory=dict)
    queue: str


@attrs.frozen(kw_only=True)
class TaskPayload:
    """One task as it stands on the wire, in the key order of the wire.

    `reply_key` asks for an answer to a blocked caller; `on_success` and `on_error` ask for a continuation; `task_id`
    is the id of the dispatch, under which its status is kept. `headers` are texts about the dispatch that are no part
    of the task: what observes it puts a trace's context there, and a continuation carries it on.

    Raises PayloadError when `reply_key` meets a continuation: the answer would have two addresses.
    """

    task_name: str
    args: list[JSONValue] = attrs.field(factory=list)
    kwargs: dict[str, JSONValue] = attrs.field(factory=dict)
    queue: str
    fairness: FairnessKey | None = None
    reply_key: str | None = None
    on_success: ContinuationSpec | None = None
    on_error: ContinuationSpec | None = None
    task_id: str | None = None
    headers: dict[str, str] | None = None

    def __attrs_post_init__(self) -> None:
        if self.reply_key is not None and self.has_continuations:
            raise PayloadError(
                "reply_key cannot stand beside on_success or on_error; use one or the other", path="$.reply_key"
            )

    @property
    def has_continuations(self) -> bool:
        """Whether something is to be sent when the task has ended."""
        return self.on_success is not None or self.on_error is not None
