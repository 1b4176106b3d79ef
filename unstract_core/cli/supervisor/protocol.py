"""The protocol between a supervisor and its children: the orders, the reports, and the role that a child starts with.

Two pipes connect them. The child reads one byte for each order from the first. Only the supervisor has its write end,
so the end of this pipe means that the supervisor has died. The child writes one byte for each report to the second.
"""

from __future__ import annotations

import enum

import attrs

VARIABLE = "UNSTRACT_WIRE_CHILD"
"""The environment variable with a child's pipe ends and its `Role`. The child removes it before anything else."""


class Order(enum.Enum):
    """An order of the supervisor to its child."""

    STOP = b"q"
    TAKE_OVER = b"g"
    """Subscribe instead of another child."""


@attrs.frozen
class Role:
    """The role of a child among the children of its supervisor.

    Args:
        first: Whether no child has started yet. An error that no restart can fix then ends the supervisor.
        silent: Whether another child reports such an error, so that this child must not report it too.
        spare: Whether the child waits for `Order.TAKE_OVER` before it subscribes.
        share: From 0 to 1: how much earlier the child reaches its task limit, so that children end at different times.
    """

    first: bool
    silent: bool = False
    spare: bool = False
    share: float = 0.0

    def __str__(self) -> str:
        return f"{int(self.first)},{int(self.silent)},{int(self.spare)},{self.share}"

    @classmethod
    def of(cls, text: str) -> Role:
        """Read the text that `str()` of a role returns."""
        first, silent, spare, share = text.split(",")
        return cls(first == "1", silent == "1", spare == "1", float(share))


class ChildReport(enum.Enum):
    """A report of a child to its supervisor."""

    STARTED = b"s"
    """The child has subscribed."""
    ALIVE = b"a"
    UNAVAILABLE = b"w"
    """The child is alive, and its transport is unavailable."""

    READY = b"r"
    """A spare child has prepared."""
    LIMIT_NEAR = b"n"
    """The child is near a limit: a spare child must prepare."""
    SPARE_UNNEEDED = b"u"
    """The child is no longer near a limit: the spare child can end."""

    MAX_TASKS = b"t"
    MAX_MEMORY = b"m"
    OVERDUE = b"o"
    """A task exceeded its deadline, and its thread still runs."""

    @property
    def ends_child(self) -> bool:
        """Whether the child ends and needs a replacement."""
        return self in (ChildReport.MAX_TASKS, ChildReport.MAX_MEMORY, ChildReport.OVERDUE)
