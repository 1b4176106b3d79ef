"""Sends within a caller's transaction.

The messages are inserted through a second cursor, so that unread rows of the caller's cursor are kept. The caller's
connection must be to the same file. It must have an open transaction, or begin one by itself as sqlite3 does; in
autocommit mode each message would be committed on its own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unstract_core import ConfigurationError

_LEGACY = -1  # Connection.autocommit (Python 3.12 and later) if isolation_level decides


@contextlib.contextmanager
def cursor_beside(cursor: Any, path: Path) -> Iterator[sqlite3.Cursor]:
    """Lend a second cursor in the caller's transaction; an error in the block undoes only the block.

    Raises:
        ConfigurationError: The cursor cannot be used.
    """
    if not isinstance(cursor, sqlite3.Cursor):
        raise ConfigurationError(f"within= takes an open cursor of sqlite3, not a {type(cursor).__name__}")
    connection = cursor.connection
    with _beside(connection) as ours:
        if not _is_connected_to(ours, path):
            raise ConfigurationError(f"within= takes a cursor of a connection to {path}, not to another file")
        _begin_like_the_driver(connection, ours)
        ours.execute("SAVEPOINT wire_send")
        try:
            yield ours
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back the whole transaction
                ours.execute("ROLLBACK TO wire_send")
                ours.execute("RELEASE wire_send")
            raise
        ours.execute("RELEASE wire_send")


def _beside(connection: sqlite3.Connection) -> contextlib.closing[sqlite3.Cursor]:
    try:
        ours = sqlite3.Cursor(connection)
        ours.execute("SELECT 1")
    except sqlite3.ProgrammingError as exc:
        raise ConfigurationError(f"within= takes an open cursor, in the thread that created it: {exc}") from exc
    ours.row_factory = None
    return contextlib.closing(ours)


def _is_connected_to(cursor: sqlite3.Cursor, path: Path) -> bool:
    file = next(file for _, name, file in cursor.execute("PRAGMA database_list") if os.fsdecode(name) == "main")
    try:
        return bool(file) and os.path.samefile(os.fsdecode(file), path)
    except OSError:
        return False


def _begin_like_the_driver(connection: sqlite3.Connection, cursor: sqlite3.Cursor) -> None:
    if connection.in_transaction:
        return
    autocommit = getattr(connection, "autocommit", _LEGACY)
    if autocommit is True or connection.isolation_level is None:
        raise ConfigurationError(
            "within= takes a cursor inside a transaction, and this connection is in autocommit mode: "
            "execute BEGIN first, or send without within="
        )
    cursor.execute(f"BEGIN {connection.isolation_level}")
