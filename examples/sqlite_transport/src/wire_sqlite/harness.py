"""The conformance kit's access to this transport and to its file."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from contract_tests.harness import Harness

from wire_sqlite.transport import SqliteTransport, from_url


class SqliteHarness(Harness):
    """Works on the file of a URL, or on a file in a temporary directory that is removed after the run."""

    name = "sqlite"
    capabilities = SqliteTransport.capabilities

    def __init__(self, url: str | None = None) -> None:
        self._url = url
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._url is None:
            directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wire-sqlite-"))
            self._url = f"sqlite:///{quote(directory)}/tasks.db"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def transport(self) -> Iterator[SqliteTransport]:
        if self._url is None:
            raise RuntimeError("enter the harness first")
        with contextlib.closing(from_url(self._url)) as transport:
            yield transport

    def inject(self, transport: SqliteTransport, queue: str, text: str) -> None:
        sql = "INSERT INTO wire_message (queue, body, enqueued_at) VALUES (?, ?, ?)"
        self._execute(transport, sql, queue, text, time.time())

    def expire(self, transport: SqliteTransport, queue: str) -> None:
        self._execute(transport, "UPDATE wire_message SET due = 0 WHERE queue = ? AND state <> 'ready'", queue)

    def reissue(self, transport: SqliteTransport, id: str, as_id: str) -> bool:
        self._execute(transport, "DELETE FROM wire_message WHERE id = ?", int(as_id))
        self._execute(transport, "UPDATE wire_message SET id = ? WHERE id = ?", int(as_id), int(id))
        return True

    def stored(self, transport: SqliteTransport, queue: str) -> Sequence[str]:
        return [
            body
            for (body,) in self._execute(transport, "SELECT body FROM wire_message WHERE queue = ? ORDER BY id", queue)
        ]

    @contextlib.contextmanager
    def caller(self, transport: SqliteTransport) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(transport.path)) as connection:
            yield connection

    def _execute(self, transport: SqliteTransport, sql: str, *parameters: Any) -> list[Any]:
        with self.caller(transport) as connection, connection:
            return connection.execute(sql, parameters).fetchall()
