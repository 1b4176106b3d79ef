"""What an operator is told of a transport: the findings of a check-up, and who works on it.

`unstract-wire doctor` prints the one and `unstract-wire top` shows the other. Nobody has to offer either; a transport
that does has the methods of `SupportsDiagnostics` and `SupportsWorkerList`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import attrs

Level: TypeAlias = Literal["ok", "warning", "error", "skipped"]
"""A warning works and should be looked at; an error does not work; what is skipped was not looked at."""

_PHRASES = "result delivery failed|no rule could be applied"
_KIND = re.compile(rf"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|{_PHRASES})(?=:|\Z)", re.ASCII)
_LONGEST_KIND = 80


@attrs.frozen
class Finding:
    """What one check found (`what`), and what to do about it (`remedy`, "" for nothing)."""

    name: str
    level: Level
    what: str
    remedy: str = ""


@attrs.frozen
class WorkerState:
    """A session of somebody who works on the queues, or sends to them.

    `name` is what it calls itself, `address` where it comes from ("" for the same machine), `state` what it is doing,
    for `since` seconds. `state` and `since` are None where the one who asks may not see them, and `address` is then "".
    """

    name: str
    address: str
    pid: int
    state: str | None
    since: float | None


class SupportsDiagnostics(Protocol):
    """A transport that can check what it stands on."""

    def check_up(self) -> Iterator[Finding]:
        """Look at everything, one thing after the other. Raises nothing: a check that cannot be made is a finding."""


class SupportsWorkerList(Protocol):
    """A transport that can tell who is connected."""

    def workers(self) -> Sequence[WorkerState]:
        """The sessions of this package at this moment, by name. Raises TransportUnavailable, TransportRefused."""


def kind_of_reason(reason: str) -> str:
    """Return the error type at the start of a dead letter's reason, and nothing of what a task said in its error."""
    found = _KIND.match(reason)
    return found[0][:_LONGEST_KIND] if found else "other"
