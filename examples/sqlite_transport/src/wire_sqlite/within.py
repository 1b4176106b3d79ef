"""A caller's own transaction, joined through its cursor.

The messages are inserted on a cursor of our own beside the caller's, whose unread rows stay to be read. The caller's
connection must be to the same file, and in a transaction or about to begin one by itself as sqlite3 does: in plain
autocommit the messages would be committed at once, one by one, and belong to nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unstract_core import ConfigurationError

_LEGACY = -1  # what Connection.autocommit says, from Python 3.12 on, where isolation_level decides


@contextlib.contextmanager
def cursor_beside(cursor: Any, path: Path) -> Iterator[sqlite3.Cursor]:
    """Lend a cursor in the caller's transaction; what fails in the block leaves nothing behind in it.

    Raises ConfigurationError for what is no such cursor.
    """
    if not isinstance(cursor, sqlite3.Cursor):
        raise ConfigurationError(f"within= takes an open cursor of sqlite3, not a {type(cursor).__name__}")
    connection = cursor.connection
    with _beside(connection) as ours:
        if not _is_of(ours, path):
            raise ConfigurationError(f"within= takes a cursor of a connection to {path}; this one's is to another file")
        _begin_as_the_driver_does(connection, ours)
        ours.execute("SAVEPOINT wire_send")
        try:
            yield ours
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite itself may have rolled everything back
                ours.execute("ROLLBACK TO wire_send")
                ours.execute("RELEASE wire_send")
            raise
        ours.execute("RELEASE wire_send")


def _beside(connection: sqlite3.Connection) -> contextlib.closing[sqlite3.Cursor]:
    try:
        ours = sqlite3.Cursor(connection)
        ours.execute("SELECT 1")
    except sqlite3.ProgrammingError as exc:
        raise ConfigurationError(f"within= takes an open cursor, in the thread that it was made in: {exc}") from exc
    ours.row_factory = None
    return contextlib.closing(ours)


def _is_of(cursor: sqlite3.Cursor, path: Path) -> bool:
    file = next(file for _, name, file in cursor.execute("PRAGMA database_list") if os.fsdecode(name) == "main")
    try:
        return bool(file) and os.path.samefile(os.fsdecode(file), path)
    except OSError:
        return False


def _begin_as_the_driver_does(connection: sqlite3.Connection, cursor: sqlite3.Cursor) -> None:
    if connection.in_transaction:
        return
    autocommit = getattr(connection, "autocommit", _LEGACY)
    if autocommit is True or connection.isolation_level is None:
        raise ConfigurationError(
            "within= takes a cursor inside a transaction, and this connection is in autocommit with none open: "
            "execute BEGIN first, or send without within="
        )
    cursor.execute(f"BEGIN {connection.isolation_level}")
