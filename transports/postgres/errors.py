"""Kinds of TransportUnavailable that this transport distinguishes, because it recovers from each in another way."""

from __future__ import annotations

from unstract_core.errors import TransportUnavailable


class PlanOutdated(TransportUnavailable):
    """A prepared statement's plan no longer fits its tables; the statement succeeds on a new connection."""


class PreparedStatementLost(PlanOutdated):
    """A prepared statement is missing, or its name belongs to another one, as behind a pooler in transaction mode."""


class ReadOnly(TransportUnavailable):
    """The server accepts no writes, as after a failover; the next connection may reach another server."""


class SessionTimedOut(TransportUnavailable):
    """The server closed an idle connection (`idle_session_timeout`) just before the statement arrived."""


class NotifyQueueFull(TransportUnavailable):
    """The server's queue of notifications is full, because a session listens and never reads."""


class DuplicateId(TransportUnavailable):
    """The sequence returned an id that exists, as after a restore. The next attempt gets the next id.

    Attributes:
        table: the quoted name of the table, with its schema.
        column: the column of the id.
    """

    table: str = ""
    column: str = ""
