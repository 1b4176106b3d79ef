"""Errors that the content of a single row can cause, and what the server reported about them."""

from __future__ import annotations

import psycopg

from unstract_core.errors import TransportError

MAY_PASS = ("53200", "57014")
"""SQLSTATEs of a read that takes too much memory or time: it may succeed later."""
QUERY_CANCELED = "57014"
_NOT_THE_CONTENT = ("08", "25", "28", "40", "42", "530", "531", "533", "534", "55", "57", "58")
"""SQLSTATEs that do not depend on the returned rows: connections, rights, locks, shutdowns."""


def may_be_the_content(exc: TransportError) -> bool:
    """Whether one row that the statement returns can have caused the failure."""
    state = state_of(exc)
    return state in MAY_PASS or (state is not None and not state.startswith(_NOT_THE_CONTENT))


def was_cancelled(exc: TransportError) -> bool:
    """Whether the server cancelled the statement, because it took too long."""
    return isinstance(exc.__cause__, psycopg.errors.QueryCanceled)


def state_of(exc: TransportError) -> str | None:
    return exc.__cause__.sqlstate if isinstance(exc.__cause__, psycopg.Error) else None


def cause_of(exc: TransportError) -> str:
    """Return the server's message without its detail, which can quote content."""
    cause = exc.__cause__
    primary = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
    return f"{primary} (SQLSTATE {state_of(exc)})"
