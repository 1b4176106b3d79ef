"""Every error is one of unstract-wire's with sqlite3's as its cause; an invalid set-up fails at start."""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unstract_core import (
    ConfigurationError,
    Message,
    Reply,
    Settlement,
    TaskPayload,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
    load_transport,
)

from wire_sqlite import SqliteTransport
from wire_sqlite.errors import translated

Open = Callable[..., SqliteTransport]
MESSAGE = Message(TaskPayload(task_name="t", queue="q"), "q")


@contextlib.contextmanager
def locked(path: Path) -> Any:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_locked_file_is_unavailable(open_transport: Open, path: Path) -> None:
    """A write waits for `timeout` and raises TransportUnavailable; reads work, and later writes succeed."""
    transport = open_transport(timeout=0.1)
    with locked(path):
        with pytest.raises(TransportUnavailable, match=r"send: .*SQLITE_BUSY.*nothing took effect") as caught:
            transport.send([MESSAGE])
        assert transport.queues(["q"])[0].ready == 0
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert not caught.value.fate_unknown
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # noqa: S301 - pickled a moment ago
    assert len(transport.send([MESSAGE])) == 1


def test_failed_settlement_can_be_repeated(open_transport: Open, path: Path) -> None:
    """The delivery stays in flight, and the first try has changed nothing."""
    transport = open_transport(timeout=0.1)
    transport.send([MESSAGE])
    subscription = transport.subscribe(["q"], lease=60)
    (held,) = subscription.receive(limit=1, wait=0)
    settlement = Settlement(held, Verdict.ACK, reply=Reply("key", "completed", result=1))
    with locked(path), pytest.raises(TransportUnavailable):
        subscription.settle([settlement])
    assert transport.reply("key") is None
    assert subscription.settle([settlement]) == [True]


def test_dropped_tables_are_not_ready(open_transport: Open, path: Path) -> None:
    """TransportNotReady names the missing table."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE wire_message")
    with pytest.raises(TransportNotReady, match="wire_message"):
        transport.send([MESSAGE])


def test_unusable_file_is_not_ready(tmp_path: Path) -> None:
    """An unusable file or directory raises TransportNotReady at start."""
    text = tmp_path / "text.db"
    text.write_text("no database, but some text that is long enough to be taken for its header" * 20)
    for path in (text, tmp_path / "missing" / "tasks.db", tmp_path):
        with pytest.raises(TransportNotReady) as caught:
            SqliteTransport(path)
        assert isinstance(caught.value.__cause__, sqlite3.Error)


def test_row_that_the_table_rejects_is_refused(open_transport: Open, path: Path) -> None:
    """TransportRefused is raised, and no message of the batch is stored."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE UNIQUE INDEX one_each ON wire_message (queue)")
    with pytest.raises(TransportRefused, match="UNIQUE"):
        transport.send([MESSAGE, MESSAGE])
    assert transport.queues(["q"])[0].ready == 0
    with pytest.raises(TransportRefused, match="cannot store"):
        transport.dead.find(queue="\ud800")


def test_only_a_failing_commit_has_unknown_fate() -> None:
    """After every other error SQLite has rolled back."""
    for code, committing, unknown in (
        (sqlite3.SQLITE_IOERR_FSYNC, True, True),
        (sqlite3.SQLITE_IOERR_WRITE, False, False),
        (sqlite3.SQLITE_FULL, True, False),
        (sqlite3.SQLITE_BUSY, True, False),
    ):
        error = sqlite3.OperationalError("x")
        error.sqlite_errorcode = code
        ours = translated(error, "send", committing=committing)
        assert isinstance(ours, TransportUnavailable)
        assert ours.fate_unknown is unknown


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///", "sqlite://host/x.db", "sqlite:///:memory:", "sqlite:///x?a=1", "sqlite:///x?timeout=0"],
)
def test_invalid_url_is_rejected(url: str) -> None:
    """An invalid URL raises ConfigurationError before a file is created."""
    with pytest.raises(ConfigurationError):
        load_transport(url)


def test_url_is_a_relative_or_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escapes in the URL are decoded, and a later change of directory has no effect."""
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///a%20b%3F.db?timeout=1&poll_interval=0.5", f"sqlite:///{tmp_path}/a%20b%3F.db"):
        with contextlib.closing(load_transport(url)) as transport:
            monkeypatch.chdir("/")
            transport.send([MESSAGE])
        monkeypatch.chdir(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a b?.db"]
