"""`Statement`: a statement's text and how a connection runs it."""

from __future__ import annotations

from typing import cast

import attrs

from transports.postgres.connection import Connection, Parameters, Rows
from transports.postgres.libpq_exec import execute_prepared


@attrs.frozen
class Statement:
    """A statement that psycopg runs with a cursor.

    Attributes:
        text: the SQL, as the bytes by which psycopg recognises a statement that it has prepared.
    """

    text: bytes

    def execute(self, connection: Connection, parameters: Parameters) -> Rows:
        """Run the statement and return its rows. Raises psycopg's errors."""
        return connection.execute(self.text, parameters).fetchall()

    def explained(self) -> Statement:
        """Return a statement that plans this one and does not run it."""
        return Statement(b"EXPLAIN " + self.text)


@attrs.frozen
class PreparedStatement(Statement):
    """A statement with libpq's own parameters (`$1`, `$2`, ...), run without a cursor. All parameters are texts."""

    def execute(self, connection: Connection, parameters: Parameters) -> Rows:
        return execute_prepared(connection, self.text, cast("tuple[str, ...]", parameters))


@attrs.frozen
class UncompiledStatement(Statement):
    """A statement with so expensive a plan that the server would need more time to compile it than to run it."""

    def execute(self, connection: Connection, parameters: Parameters) -> Rows:
        if not connection.jit_enabled:
            return super().execute(connection, parameters)
        with connection.transaction():
            connection.execute(b"SET LOCAL jit = off")
            return super().execute(connection, parameters)
