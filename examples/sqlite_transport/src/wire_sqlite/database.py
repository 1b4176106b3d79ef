"""The file: made ready once, then read and written in transactions, and watched by whoever waits."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from unstract_core import ConfigurationError

from wire_sqlite.bell import Bell
from wire_sqlite.connections import Connections, patiently
from wire_sqlite.errors import mapped
from wire_sqlite.forks import look_after
from wire_sqlite.statements import schema, statement

_OLDEST = (3, 37, 0)  # STRICT tables; RETURNING is older


class Database:
    """`timeout` is how many seconds a writer waits for another, `poll_interval` how many lie between two looks."""

    def __init__(self, path: Path, *, timeout: float, poll_interval: float) -> None:
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigurationError(f"this Python has SQLite {sqlite3.sqlite_version}; 3.37 or newer is needed")
        self.path = path
        self.bell = Bell()
        self._connections = Connections(path)
        self._timeout = timeout
        self._poll_interval = poll_interval
        look_after(self)
        self._make_ready()

    @contextlib.contextmanager
    def reading(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One state of the file; waits for no writer."""
        with self._transaction(doing, "BEGIN") as connection:
            self._patiently(connection.execute, statement("is_ready"))
            yield connection

    @contextlib.contextmanager
    def writing(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One commit, or none if the block raises. The lock is taken at once: what was read stays true."""
        with self._transaction(doing, "BEGIN IMMEDIATE") as connection:
            yield connection

    def wait(self, rung: int, seconds: float) -> None:
        """Wait until the bell has rung since, or it is time to look what other processes did."""
        self.bell.wait(rung, min(seconds, self._poll_interval))

    def check_open(self) -> None:
        self._connections.check_open()

    def close(self) -> None:
        self._connections.close()
        self.bell.ring()

    def before_fork(self) -> None:
        self._connections.before_fork()

    def after_fork(self, *, in_child: bool) -> None:
        self._connections.after_fork(in_child=in_child)
        if in_child:
            self.bell.start_anew()

    @contextlib.contextmanager
    def _transaction(self, doing: str, begin: str) -> Iterator[sqlite3.Connection]:
        with mapped(doing), self._connections.lent() as connection:
            self._patiently(connection.execute, begin)
            yield connection
            with mapped(doing, committing=True):
                connection.execute("COMMIT")

    def _make_ready(self) -> None:
        doing = f"open {self.path}"
        with mapped(doing), self._connections.lent() as connection:
            (mode,) = self._patiently(connection.execute, "PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise ConfigurationError(f"{doing}: SQLite cannot keep a write-ahead log there (its mode is {mode})")
            if self._patiently(connection.execute, statement("is_ready")).fetchone() == (0,):
                self._patiently(connection.executescript, schema())

    def _patiently(self, execute: Callable[[str], sqlite3.Cursor], sql: str) -> sqlite3.Cursor:
        return patiently(self._timeout, execute, sql)
