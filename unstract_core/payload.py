"""The types of a task on the wire, independent of how a message is encoded and carried.

The format is that of the product, so that its messages remain readable (docs/wire.md). The types do not check their
values: the codec checks and copies them when it writes a message, and names the path of an invalid value. One rule is
checked here, because a message that breaks it is ambiguous: a reply key excludes continuations.
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
    """The organisation that a task belongs to, and the task's priority within that organisation."""

    #: The organisation; None for none.
    org_id: str | None = None
    #: The kind of work: "api" or "non_api".
    workload_type: WorkloadType = "non_api"
    #: 1 to 10; a higher priority is delivered first.
    pipeline_priority: int = DEFAULT_PRIORITY


@attrs.frozen(kw_only=True)
class ContinuationSpec:
    """A continuation: a task that is sent after the end of another task."""

    #: The name of the task. Its first positional argument is the result, or the id of the failed dispatch.
    task_name: str
    #: The keyword arguments of the task.
    kwargs: dict[str, JSONValue] = attrs.field(factory=dict)
    #: The queue to which the task is sent.
    queue: str


@attrs.frozen(kw_only=True)
class TaskPayload:
    """One task as it is written on the wire; the attributes are in the key order of the wire.

    Raises:
        PayloadError: `reply_key` is given together with `on_success` or `on_error`.
    """

    #: The name of the task.
    task_name: str
    #: The positional arguments.
    args: list[JSONValue] = attrs.field(factory=list)
    #: The keyword arguments.
    kwargs: dict[str, JSONValue] = attrs.field(factory=dict)
    #: The queue of the message.
    queue: str
    #: The organisation and the priority; None for the defaults.
    fairness: FairnessKey | None = None
    #: The key under which a blocked caller waits for the reply; None if no caller waits.
    reply_key: str | None = None
    #: The task that is sent after a success; None for none.
    on_success: ContinuationSpec | None = None
    #: The task that is sent after a failure; None for none.
    on_error: ContinuationSpec | None = None
    #: The id of the dispatch, under which its status is stored; None if no status is stored.
    task_id: str | None = None
    #: Texts about the dispatch, such as the context of a trace; the continuation gets them too. None for none.
    headers: dict[str, str] | None = None

    def __attrs_post_init__(self) -> None:
        if self.reply_key is not None and self.has_continuations:
            raise PayloadError(
                "reply_key excludes on_success and on_error: use a blocking call or callbacks",
                path="$.reply_key",
            )

    @property
    def has_continuations(self) -> bool:
        """Whether the task has a callback for one of its outcomes."""
        return self.on_success is not None or self.on_error is not None
