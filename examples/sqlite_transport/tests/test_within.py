"""`send(within=cursor)` with sqlite3's ways to begin a transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from unstract_core import ConfigurationError, Message, TaskPayload, TransportRefused, TransportUnavailable

from wire_sqlite import SqliteTransport

Open = Callable[..., SqliteTransport]
CALLERS: dict[str, Callable[[Path], sqlite3.Connection]] = {
    "sqlite3's default": sqlite3.connect,
    "IMMEDIATE": lambda path: sqlite3.connect(path, isolation_level="IMMEDIATE"),
    "EXCLUSIVE": lambda path: sqlite3.connect(path, isolation_level="EXCLUSIVE"),
    "own BEGIN": lambda path: begun(sqlite3.connect(path, isolation_level=None)),
    "dict rows": lambda path: with_rows_as_dicts(sqlite3.connect(path)),
}
if sys.version_info >= (3, 12):
    CALLERS["autocommit=False"] = lambda path: sqlite3.connect(path, autocommit=False)


def begun(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.execute("BEGIN")
    return connection


def with_rows_as_dicts(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.row_factory = lambda cursor, row: {column[0]: value for column, value in zip(cursor.description, row)}  # noqa: B905
    connection.text_factory = bytes
    return connection


def messages(*org_ids: str) -> list[Message]:
    return [Message(TaskPayload(task_name="t", queue="q"), "q", org_id=org_id) for org_id in org_ids]


def count(transport: SqliteTransport) -> int:
    return transport.queues(["q"])[0].ready


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("caller", CALLERS.values(), ids=list(CALLERS))
def test_messages_follow_the_transaction_of_the_caller(
    open_transport: Open, path: Path, caller: Callable[[Path], sqlite3.Connection], commit: bool
) -> None:
    """A message is visible only after the caller's commit, and is gone after a rollback."""
    transport = open_transport()
    with contextlib.closing(caller(path)) as connection:
        assert len(transport.send(messages("a", "b"), within=connection.cursor())) == 2
        assert connection.in_transaction
        assert count(transport) == 0
        connection.commit() if commit else connection.rollback()
    assert count(transport) == (2 if commit else 0)


def test_unread_rows_of_the_caller_are_kept(open_transport: Open, path: Path) -> None:
    """The caller's cursor is not changed."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        transport.send(messages("a"), within=cursor)
        assert cursor.fetchall() == [(1,), (2,)]


def test_rejected_batch_leaves_nothing_behind(open_transport: Open, path: Path) -> None:
    """All messages or none are stored, and the caller's transaction continues."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TRIGGER no BEFORE INSERT ON wire_message WHEN NEW.org_id = 'no' BEGIN SELECT RAISE(FAIL, 'no'); END"
        )
        transport.send(messages("before"), within=connection.cursor())
        with pytest.raises(TransportRefused):
            transport.send(messages("a", "b", "no"), within=connection.cursor())
        connection.commit()
    assert count(transport) == 1


def test_cursor_without_transaction_of_the_file_is_rejected(open_transport: Open, path: Path, tmp_path: Path) -> None:
    """Autocommit, another file, a closed connection, another thread's cursor and other objects are rejected."""
    transport = open_transport()
    closed = sqlite3.connect(path).cursor()
    closed.connection.close()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        others: list[Any] = [
            stack.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None))).cursor(),
            stack.enter_context(contextlib.closing(sqlite3.connect(tmp_path / "other.db"))).cursor(),
            stack.enter_context(contextlib.closing(sqlite3.connect(":memory:"))).cursor(),
            closed,
            object(),
        ]
        for cursor in others:
            with pytest.raises(ConfigurationError, match=r"^within= takes"):
                transport.send(messages("a"), within=cursor)
        mine = stack.enter_context(contextlib.closing(sqlite3.connect(path))).cursor()
        with pytest.raises(ConfigurationError, match="thread"):
            thread.submit(lambda: transport.send(messages("a"), within=mine)).result()
    assert count(transport) == 0


def test_blocked_caller_gets_unavailable(open_transport: Open, path: Path) -> None:
    """Nothing was sent, and the caller's transaction may be tried again."""
    transport = open_transport()
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level="IMMEDIATE")) as writer,
        contextlib.closing(sqlite3.connect(path, timeout=0.05)) as connection,
    ):
        transport.send(messages("a"), within=writer.cursor())
        with pytest.raises(TransportUnavailable, match="nothing took effect") as caught:
            transport.send(messages("b"), within=connection.cursor())
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert not caught.value.fate_unknown
        writer.commit()
    assert count(transport) == 1
