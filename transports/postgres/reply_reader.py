"""`ReplyReader`: reads one reply for a caller, and waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import attrs

from transports.postgres.pool import Pool
from transports.postgres.reply_waiter import ReplyWaiter
from transports.postgres.rows import reply_in
from transports.postgres.statements import Statements
from unstract_core.errors import TransportError, TransportUnavailable
from unstract_core.observability.log_events import emit
from unstract_core.transport import Reply
from unstract_core.values import error_text

logger = logging.getLogger("unstract_wire.postgres")

_PAUSE = 0.25
_SHORTEST_READ = 0.5
_LONGEST_READ = 5.0


class ReplyReader:
    """Reads replies through a pool. Thread-safe.

    Args:
        pool: runs the statements.
        statements: the statements of the schema.
        waiter: wakes a caller when its reply is there.
    """

    def __init__(self, pool: Pool, statements: Statements, waiter: ReplyWaiter) -> None:
        self._pool = pool
        self._statements = statements
        self._waiter = waiter

    def read(self, key: str, *, timeout: float, consume: bool, check_open: Callable[[], None]) -> Reply | None:
        """Return the reply under `key`; see `PostgresTransport.reply`.

        Args:
            key: the key of the reply.
            timeout: seconds to wait for it.
            consume: whether to clear its result and error.
            check_open: raises TransportClosed once the transport is closed.
        """
        deadline = time.monotonic() + timeout
        waits = timeout > 0
        while True:
            check_open()
            reply = self._read(key, deadline, waits)
            if reply is not None:
                return self._consume(reply, deadline if waits else None) if consume else reply
            if time.monotonic() >= deadline:
                return None
            self._waiter.wait(key, deadline)

    def _read(self, key: str, deadline: float, waits: bool) -> Reply | None:
        statement = self._statements["read_reply"]
        while True:
            timeout = _time_for_read(deadline) if waits else None
            try:
                rows = self._pool.execute("read a reply", statement, {"key": key}, idempotent=True, timeout=timeout)
                return reply_in(key, rows[0]) if rows else None
            except TransportUnavailable:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._pool.has_worked:
                    raise
                time.sleep(min(_PAUSE, remaining))

    def _consume(self, reply: Reply, deadline: float | None) -> Reply:
        """Clear a reply that was read, and return it; only its status if another reader has cleared it before.

        A reply that cannot be cleared is still returned; it is removed when it expires.
        """
        try:
            timeout = None if deadline is None else _time_for_read(deadline)
            statement = self._statements["clear_reply"]
            cleared = self._pool.execute("clear a reply", statement, {"key": reply.key}, timeout=timeout)
        except TransportError as exc:
            emit(logger, logging.WARNING, "reply_not_cleared", error_type=type(exc).__name__, error=error_text(exc))
            return reply
        return attrs.evolve(reply, result=None, error="") if cleared == [(False,)] else reply


def _time_for_read(deadline: float) -> float:
    """Return the time limit in seconds for one read of a caller that waits.

    If a connection does not answer, the caller loses only this part of its wait. The last read gets a short time even
    after the caller's timeout.
    """
    return min(_LONGEST_READ, max(_SHORTEST_READ, deadline - time.monotonic()))
