"""The file: set up once, then read and written in transactions."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from unstract_core import ConfigurationError

from wire_sqlite.connections import Connections, retry_while_busy
from wire_sqlite.errors import mapped
from wire_sqlite.forks import call_around_forks
from wire_sqlite.notifier import Notifier
from wire_sqlite.statements import schema, statement

_OLDEST = (3, 37, 0)  # for STRICT tables and RETURNING


class Database:
    """A database file.

    Args:
        path: The file.
        timeout: The longest wait for another writer, in seconds.
        poll_interval: The time between two queries of a waiting process, in seconds.
    """

    def __init__(self, path: Path, *, timeout: float, poll_interval: float) -> None:
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigurationError(f"this Python has SQLite {sqlite3.sqlite_version}; 3.37 or newer is needed")
        self.path = path
        self.notifier = Notifier()
        self._connections = Connections(path)
        self._timeout = timeout
        self._poll_interval = poll_interval
        call_around_forks(self)
        self._make_ready()

    @contextlib.contextmanager
    def reading(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Run the block in a read transaction, which waits for no writer."""
        with self._transaction(doing, "BEGIN") as connection:
            self._retry_while_busy(connection.execute, statement("is_ready"))
            yield connection

    @contextlib.contextmanager
    def writing(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Run the block in a write transaction with the lock from its start; it is rolled back if the block raises."""
        with self._transaction(doing, "BEGIN IMMEDIATE") as connection:
            yield connection

    def wait(self, version: int, seconds: float) -> None:
        """Wait for a change in this process, but at most the poll interval, because other processes do not notify."""
        self.notifier.wait(version, min(seconds, self._poll_interval))

    def check_open(self) -> None:
        self._connections.check_open()

    def close(self) -> None:
        self._connections.close()
        self.notifier.notify()

    def before_fork(self) -> None:
        self._connections.before_fork()

    def after_fork(self, *, in_child: bool) -> None:
        self._connections.after_fork(in_child=in_child)
        if in_child:
            self.notifier.reset()

    @contextlib.contextmanager
    def _transaction(self, doing: str, begin: str) -> Iterator[sqlite3.Connection]:
        with mapped(doing), self._connections.borrowed() as connection:
            self._retry_while_busy(connection.execute, begin)
            yield connection
            with mapped(doing, committing=True):
                connection.execute("COMMIT")

    def _make_ready(self) -> None:
        doing = f"open {self.path}"
        with mapped(doing), self._connections.borrowed() as connection:
            (mode,) = self._retry_while_busy(connection.execute, "PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise ConfigurationError(
                    f"{doing}: SQLite cannot use a write-ahead log there (its mode is {mode}); use a local disk"
                )
            if self._retry_while_busy(connection.execute, statement("is_ready")).fetchone() == (0,):
                self._retry_while_busy(connection.executescript, schema())

    def _retry_while_busy(self, execute: Callable[[str], sqlite3.Cursor], sql: str) -> sqlite3.Cursor:
        return retry_while_busy(self._timeout, execute, sql)
