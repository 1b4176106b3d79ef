"""What a run has left behind, for the ledger: the faults, the journals, the rows, and what is still in the queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import attrs

from chaos.history import History


@attrs.frozen
class InjectedFault:
    """A fault as it happened, `began` and `ended` on the monotonic clock.

    `victims` are the processes that it hit, None for all of them; `touched` the dispatches that it had in its hands.
    The clock of its recovery starts at `recovers_from`, and stops when all that are `awaited` were called back, and all
    that are to be called `again`. `excuses` is its kind's.
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
    """How many rows were committed for each dispatch, as a trigger in the database has counted them."""

    sent: Counter[str]
    follow_ups: Counter[str]


@attrs.frozen
class Evidence:
    """`rows` is None over a broker, where there are none; `left` are the messages still in each queue."""

    history: History
    faults: Sequence[InjectedFault]
    rows: Rows | None
    remaining: Mapping[str, int]
    problems: Sequence[str]
