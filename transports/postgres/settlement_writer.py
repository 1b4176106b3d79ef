"""`SettlementWriter`: writes a batch of settlements and notifies the workers and callers that it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from transports.postgres.listener import Listener
from transports.postgres.notifier import Notifier
from transports.postgres.rows import SettledRow
from transports.postgres.statements import Statements
from unstract_core.transport import Settlement, Verdict


class SettlementWriter:
    """Runs the statement `settle` on a subscription's connection."""

    def __init__(self, listener: Listener, statements: Statements, notifier: Notifier) -> None:
        self._listener = listener
        self._statements = statements
        self._notifier = notifier

    def write(self, batch: Sequence[Settlement], parameters: dict[str, Any]) -> list[SettledRow]:
        """Settle a batch in one commit, and return its rows.

        Args:
            batch: the settlements.
            parameters: the same as columns (`rows.settle_parameters`).

        Raises:
            TransportError: the statement failed; `fate_unknown` says whether it may have taken effect.
        """
        return self._notifier.commit(list(_notified_by(batch)), partial(self._execute, parameters))

    def _execute(self, parameters: dict[str, Any], notified: list[str | None]) -> list[SettledRow]:
        channels = self._notifier.channels
        wake = {
            "channel": channels.queues,
            "wake": [queue for queue in notified if queue is not None],
            "reply_channel": channels.replies,
            "wake_callers": None in notified,
        }
        rows = self._listener.execute("settle", self._statements["settle"], {**parameters, **wake})
        return [SettledRow(*row) for row in rows]


def _notified_by(settlements: Iterable[Settlement]) -> Iterator[str | None]:
    """Yield the queues in which messages become ready, and None if a caller may be waiting for a reply."""
    for settlement in settlements:
        if settlement.follow_up is not None and not settlement.follow_up.delay:
            yield settlement.follow_up.queue
        if settlement.verdict is Verdict.RETRY and not settlement.delay:
            yield settlement.delivery.queue
        if settlement.reply is not None:
            yield None
