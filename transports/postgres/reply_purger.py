"""`ReplyPurger`: removes expired replies, a limited number at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from transports.postgres.listener import Listener
from transports.postgres.rows import first_column_in
from transports.postgres.statements import Statements
from unstract_core.errors import TransportError
from unstract_core.observability.log_events import emit
from unstract_core.values import error_text

logger = logging.getLogger("unstract_wire.postgres")

_INTERVAL = 60.0
_LIMIT = 1000
_REST = 4.0
"""After a full batch, the pause before the next one, as a multiple of the statement's duration."""


class ReplyPurger:
    """Runs in a subscription, about once a minute.

    Args:
        listener: the subscription's connection.
        statements: the statements of its schema.
        clock: returns monotonic seconds.
    """

    def __init__(self, listener: Listener, statements: Statements, *, clock: Callable[[], float]) -> None:
        self._listener = listener
        self._statements = statements
        self._clock = clock
        self._due_at = clock() + _INTERVAL
        self._purged_until = -math.inf

    @property
    def is_due(self) -> bool:
        return self._clock() >= self._due_at

    @property
    def due_at(self) -> float:
        """When the next run is due, on the monotonic clock."""
        return self._due_at

    @property
    def next_in(self) -> float:
        """Seconds until the next batch, if more replies have expired; infinite if the last batch was not full."""
        return max(0.0, self._due_at - self._clock()) if self._purged_until > -math.inf else math.inf

    def run(self) -> None:
        """Remove expired replies. A failure is only logged."""
        self._due_at = self._clock() + _INTERVAL
        parameters = {"limit": _LIMIT, "since": self._purged_until}
        self._purged_until = -math.inf
        began = self._clock()
        try:
            rows = self._listener.execute("purge expired replies", self._statements["purge_replies"], parameters)
        except TransportError as exc:
            emit(logger, logging.WARNING, "sweep_failed", error_type=type(exc).__name__, error=error_text(exc))
            return
        if len(rows) == _LIMIT:
            ended = self._clock()
            self._due_at = ended + _REST * (ended - began)
            self._purged_until = max(first_column_in(rows))
