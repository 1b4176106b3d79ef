"""Optional protocols of a transport for operators: diagnostics, and the list of connected workers.

`unstract-wire doctor` prints the findings of `SupportsDiagnostics`. `unstract-wire top` shows the workers of
`SupportsWorkerList`. A transport may implement both, one or neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import attrs

Level: TypeAlias = Literal["ok", "warning", "error", "skipped"]
"""ok; warning: works, but needs attention; error: does not work; skipped: could not be checked."""

_PHRASES = "result delivery failed|no rule could be applied"
_KIND = re.compile(rf"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|{_PHRASES})(?=:|\Z)", re.ASCII)
_LONGEST_KIND = 80


@attrs.frozen
class Finding:
    """The result of one check."""

    #: The name of the check, such as "durability".
    name: str
    #: How serious the result is.
    level: Level
    #: The result in words.
    what: str
    #: The action for an operator; "" for none.
    remedy: str = ""


@attrs.frozen
class WorkerState:
    """A session of a worker or a producer."""

    #: The application name of the session.
    name: str
    #: The client's address; "" for the same machine, or if this role may not see it.
    address: str
    #: The process id of the session's server process.
    pid: int
    #: The activity of the session; None if this role may not see it.
    state: str | None
    #: For how many seconds the session has been in that state; None if this role may not see it.
    since: float | None


class SupportsDiagnostics(Protocol):
    """A transport that can check its database or broker."""

    def check_up(self) -> Iterator[Finding]:
        """Run every check and yield its finding. Never raises: a check that fails is a finding."""


class SupportsWorkerList(Protocol):
    """A transport that can list the connected workers."""

    def workers(self) -> Sequence[WorkerState]:
        """Return the current sessions of this package, sorted by name.

        Raises:
            TransportUnavailable: The database or broker cannot be reached now.
            TransportRefused: It rejected the query.
        """


def kind_of_reason(reason: str) -> str:
    """Return the error type at the start of a dead letter's reason, without the task's own error text.

    Args:
        reason: The reason of a dead letter.

    Returns:
        The name of the error type, or a phrase of this package; "other" for any other text.
    """
    match = _KIND.match(reason)
    return match[0][:_LONGEST_KIND] if match else "other"
