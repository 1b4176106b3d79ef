"""A pool of connections to the file; one thread at a time uses a connection.

After an error a connection is closed, which rolls back its transaction. No thread owns a connection, so none is left
when a thread ends, and a waiting thread has none.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from unstract_core import TransportClosed

_LONGEST_WAIT = 5.0
"""The longest wait of a fork for running calls, in seconds."""

_PAUSE = 0.001
_BUSY_TIMEOUT = 0.01
"""SQLite's own wait for a lock, in seconds. It tries at growing intervals, and would starve beside busy writers."""


class Connections:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self.closed = False
        self._reset()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection in autocommit mode for the block, which begins and commits its own transactions."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self.check_open()
            connection = self._idle.pop() if self._idle else None
            self._borrowed += 1
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
            self._return(connection)

    def check_open(self) -> None:
        if self.closed:
            raise TransportClosed("this SQLite transport was closed")

    def close(self) -> None:
        """Close each idle connection now, and each borrowed one when it is returned."""
        with self._changed:
            self.closed = True
            self._close_idle()

    def before_fork(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._borrowed, _LONGEST_WAIT)
            self._close_idle()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            self._reset()
            return
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._borrowed = 0
        self._forking = 0

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            # Less than FULL can lose commits with WAL. This reads the file, which another process may be creating.
            retry_while_busy(_LONGEST_WAIT, connection.execute, "PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _return(self, connection: sqlite3.Connection | None) -> None:
        with self._changed:
            self._borrowed -= 1
            if connection is not None:
                self._idle.append(connection)
            if self.closed:
                self._close_idle()
            self._changed.notify_all()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


def retry_while_busy(timeout: float, execute: Callable[[str], sqlite3.Cursor], sql: str) -> sqlite3.Cursor:
    """Execute a statement, and retry for `timeout` seconds while another connection locks the file."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return execute(sql)
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)
