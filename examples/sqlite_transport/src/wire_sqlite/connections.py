"""Connections to the file, each lent to one thread at a time and to nobody else meanwhile.

A connection on which something failed is closed, which rolls back whatever was open, and never lent again. Threads own
none, so none is left behind when a thread ends; a waiting thread holds none.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from unstract_core import TransportClosed

_LONGEST_PAUSE = 5.0
"""Seconds that a fork waits for the calls that are going on."""

_PAUSE = 0.001
_SQLITES_PATIENCE = 0.01
"""Seconds that SQLite itself waits for a lock. It looks ever more seldom, and busy writers would never let it in."""


class Connections:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self.closed = False
        self._start_anew()

    @contextlib.contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection in autocommit, on which statements of our own begin and commit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self.check_open()
            connection = self._idle.pop() if self._idle else None
            self._lent += 1
        try:
            if connection is None:
                connection = self._connect()
            yield connection
        except BaseException:
            if connection is not None:
                connection.close()
                connection = None
            raise
        finally:
            self._take_back(connection)

    def check_open(self) -> None:
        if self.closed:
            raise TransportClosed("this SQLite transport was closed")

    def close(self) -> None:
        """Close what is idle at once, and what is lent as soon as it comes back."""
        with self._changed:
            self.closed = True
            self._close_idle()

    def before_fork(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._lent, _LONGEST_PAUSE)
            self._close_idle()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            self._start_anew()
            return
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()

    def _start_anew(self) -> None:
        self._changed = threading.Condition()
        self._lent = 0
        self._forking = 0

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_SQLITES_PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            # With WAL anything less can lose the last commits. It reads the file, which another may be making just now.
            patiently(_LONGEST_PAUSE, connection.execute, "PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_back(self, connection: sqlite3.Connection | None) -> None:
        with self._changed:
            self._lent -= 1
            if connection is not None:
                self._idle.append(connection)
            if self.closed:
                self._close_idle()
            self._changed.notify_all()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


def patiently(timeout: float, execute: Callable[[str], sqlite3.Cursor], sql: str) -> sqlite3.Cursor:
    """Execute what others may keep waiting, for `timeout` seconds, by writing or by making the same file."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return execute(sql)
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)
