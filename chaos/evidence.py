"""The evidence of a run, for the ledger: faults, journals, rows, and the messages still in the queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import attrs

from chaos.history import History


@attrs.frozen
class InjectedFault:
    """A fault that was injected. Times are of the monotonic clock.

    Attributes:
        number: Its place in the schedule, from 1.
        name: The name of its kind.
        began: When it began.
        ended: When it ended.
        recovers_from: When its recovery time starts.
        victims: The processes that it hit; None for all.
        touched: The dispatches that it may have affected.
        awaited: The dispatches whose callbacks end the recovery.
        again: The dispatches that must be called back again before the recovery ends.
        excuses: Whether a task or callback may run again because of it.
    """

    number: int
    name: str
    began: float
    ended: float
    recovers_from: float
    victims: frozenset[str] | None = None
    touched: frozenset[str] = frozenset()
    awaited: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()
    excuses: bool = True

    def __str__(self) -> str:
        return f"{self.name} (fault {self.number})"


@attrs.frozen
class Rows:
    """The number of committed rows for each dispatch, counted by a trigger in the database."""

    sent: Counter[str]
    follow_ups: Counter[str]


@attrs.frozen
class Evidence:
    """Everything that the ledger examines.

    Attributes:
        history: The lines of all journals.
        faults: The injected faults.
        rows: The committed rows; None over a broker.
        remaining: The number of messages still in each queue.
        problems: Problems of the run itself.
    """

    history: History
    faults: Sequence[InjectedFault]
    rows: Rows | None
    remaining: Mapping[str, int]
    problems: Sequence[str]
