"""`Probe`: the connection of the checks, with the limits above which a finding is a warning."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from transports.postgres.connection import Connection, Parameters, Rows
from transports.postgres.connector import Connector
from transports.postgres.execution import run
from transports.postgres.statement import Statement
from transports.postgres.statements import Statements, definitions, load_statements
from unstract_core.errors import TransportNotReady

_ANSWER = 30.0
_SHOWN = 5
MIGRATE = "run `unstract-wire migrate`"
COMPARE = "compare the table with transports/postgres/sql/schema.sql"


@attrs.frozen
class DiagnosticLimits:
    """The limits above which a finding is a warning. Times are seconds."""

    transaction: float = 60.0
    """The age of a transaction."""
    transactions: int = 1_000_000
    """The age of a snapshot in transactions, if the role cannot see the time of its session."""
    overdue: float = 60.0
    """The time since a lease or delay ended. A worker requeues such a message within a second."""
    waiting: float = 300.0
    """The time for which the first ready message of a queue has waited."""
    unpurged: float = 3600.0
    """The time since a reply expired that still exists."""
    unvacuumed: float = 600.0
    """The time since a table with many dead rows was vacuumed."""
    dead_rows: int = 10_000
    """The number of dead rows that counts as many."""
    clock: float = 300.0
    """The difference between the clocks of the database and of this machine."""
    notification: float = 5.0
    """The time that a notification may take."""
    notification_queue: float = 0.1
    """The used part of the server's notification queue, from 0 to 1."""
    room: int = 5
    """The number of further connections that must be possible; fewer are a warning."""


def diagnostic_statements(statements: Statements) -> Mapping[str, Statement]:
    """Return the statements of diagnostics.sql, by name, for the tables of one schema."""
    tables = {name: statements.table(name).replace("%", "%%") for name in ("messages", "results", "dead")}
    return {
        name: Statement(text.format(**tables).encode()) for name, text in load_statements("diagnostics.sql").items()
    }


class Probe:
    """Runs the statements of the checks on a connection, which is made again after it broke.

    All methods raise TransportError.

    Args:
        connector: makes the connection.
        statements: the statements of the schema.
        listens: whether the transport is configured to listen.
        limits: the limits above which a finding is a warning.
    """

    def __init__(
        self, connector: Connector, statements: Statements, *, listens: bool, limits: DiagnosticLimits
    ) -> None:
        self.connector = connector
        self.statements = statements
        self.listens = listens
        self.limits = limits
        self._statements = diagnostic_statements(statements)
        self.definitions = definitions(statements.schema)
        self.tables = [name for name, text in self.definitions.items() if text.startswith("CREATE TABLE")]
        self._connection: Connection | None = None

    def ask(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement of diagnostics.sql and return its rows."""
        return self.run(f"check {name}", self._statements[name], parameters)

    def ask_of_tables(self, name: str) -> list[tuple[Any, ...]]:
        """Run a statement about the catalog entries of this schema's tables."""
        return self.ask(name, schema=self.statements.schema, tables=self.tables)

    def run(self, operation: str, statement: Statement, parameters: Parameters) -> Rows:
        connection = self.connected()
        try:
            return run(connection, operation, statement, parameters)
        finally:
            if not connection.usable:
                self.close()

    def connected(self) -> Connection:
        self._connection = self._connection or self.connect()
        return self._connection

    def connect(self) -> Connection:
        return self.connector.connect(limit=_ANSWER)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def join_first(parts: Sequence[str], of: str) -> str:
    """Join the first few of many parts, and add the number of the others."""
    more = len(parts) - _SHOWN
    return ", ".join(parts[:_SHOWN]) + (f" and {more} more {of}" if more > 0 else "")


def queue_options(queues: Iterable[str]) -> str:
    """Return queues as options of the command, quoted for a shell."""
    return " ".join(f"--queue {shlex.quote(queue)}" for queue in list(queues)[:_SHOWN])


def split_remedy(exc: Exception) -> tuple[str, str]:
    """Return the problem and the remedy of an error."""
    return (exc.problem, exc.remedy) if isinstance(exc, TransportNotReady) else (str(exc), "")
