"""What every check of the check-up works with: questions to the server, and from where on an answer is a warning."""

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
    """From where on something is worth a warning. Times are seconds."""

    transaction: float = 60.0
    """For how long a transaction is open."""
    transactions: int = 1_000_000
    """How many transactions old a snapshot is, where the age of its session is not to be seen."""
    overdue: float = 60.0
    """How long ago a lease or delay ended. A worker brings back what has ended within a second."""
    waiting: float = 300.0
    """How long the first ready message of a queue has waited."""
    unpurged: float = 3600.0
    """How long ago a reply expired that is still there."""
    unvacuumed: float = 600.0
    """How long ago a table with many dead rows was vacuumed."""
    dead_rows: int = 10_000
    """How many dead rows are many."""
    clock: float = 300.0
    """How far the database's clock is from this machine's."""
    notification: float = 5.0
    """How long a notification takes."""
    notification_queue: float = 0.1
    """Which part of the server's notification queue is in use."""
    room: int = 5
    """For how many more connections there is room."""


def diagnostic_statements(statements: Statements) -> Mapping[str, Statement]:
    """Return the statements of diagnostics.sql, by name, on the tables of one schema."""
    tables = {name: statements.table(name).replace("%", "%%") for name in ("messages", "results", "dead")}
    return {
        name: Statement(text.format(**tables).encode()) for name, text in load_statements("diagnostics.sql").items()
    }


class Probe:
    """A connection to look through, made anew where it broke; it prepares nothing that outlives it.

    `listens` is what the transport was told. Every method raises errors of ours.
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
        """Run a statement of diagnostics.sql, and return its rows."""
        return self.run(f"check {name}", self._statements[name], parameters)

    def ask_of_tables(self, name: str) -> list[tuple[Any, ...]]:
        """Run one that is asked of the catalog, about the tables of this schema."""
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
    """Join the first few of many."""
    more = len(parts) - _SHOWN
    return ", ".join(parts[:_SHOWN]) + (f" and {more} more {of}" if more > 0 else "")


def queue_options(queues: Iterable[str]) -> str:
    """Write queues as options of the command, as they are to be typed."""
    return " ".join(f"--queue {shlex.quote(queue)}" for queue in list(queues)[:_SHOWN])


def split_remedy(exc: Exception) -> tuple[str, str]:
    """Split an error of ours into what is wrong and what to do."""
    return (exc.problem, exc.remedy) if isinstance(exc, TransportNotReady) else (str(exc), "")
