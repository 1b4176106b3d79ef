"""Every error is one of unstract-wire's, with sqlite3's own as its cause; what cannot work is refused at the start."""

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


def test_a_file_that_somebody_keeps_locked_is_away_for_now(open_transport: Open, path: Path) -> None:
    """Writing waits for `timeout` and raises TransportUnavailable; reading goes on, and afterwards all does."""
    transport = open_transport(timeout=0.1)
    with locked(path):
        with pytest.raises(TransportUnavailable, match=r"send: .*SQLITE_BUSY.*nothing took effect") as caught:
            transport.send([MESSAGE])
        assert transport.queues(["q"])[0].ready == 0
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert not caught.value.fate_unknown
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # noqa: S301 - pickled a moment ago
    assert len(transport.send([MESSAGE])) == 1


def test_a_settlement_that_could_not_be_written_can_be_made_again(open_transport: Open, path: Path) -> None:
    """The delivery is still held; nothing of the first try has taken effect."""
    transport = open_transport(timeout=0.1)
    transport.send([MESSAGE])
    subscription = transport.subscribe(["q"], lease=60)
    (held,) = subscription.receive(limit=1, wait=0)
    settlement = Settlement(held, Verdict.ACK, reply=Reply("key", "completed", result=1))
    with locked(path), pytest.raises(TransportUnavailable):
        subscription.settle([settlement])
    assert transport.reply("key") is None
    assert subscription.settle([settlement]) == [True]


def test_tables_that_were_dropped_are_not_ready(open_transport: Open, path: Path) -> None:
    """TransportNotReady names what is missing."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE wire_message")
    with pytest.raises(TransportNotReady, match="wire_message"):
        transport.send([MESSAGE])


def test_a_file_or_directory_that_cannot_be_used_is_not_ready(tmp_path: Path) -> None:
    """At the start, not at the first message."""
    text = tmp_path / "text.db"
    text.write_text("no database, but some text that is long enough to be taken for its header" * 20)
    for path in (text, tmp_path / "missing" / "tasks.db", tmp_path):
        with pytest.raises(TransportNotReady) as caught:
            SqliteTransport(path)
        assert isinstance(caught.value.__cause__, sqlite3.Error)


def test_what_the_table_refuses_is_refused_for_good(open_transport: Open, path: Path) -> None:
    """TransportRefused, and nothing of the batch is there."""
    transport = open_transport()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE UNIQUE INDEX one_each ON wire_message (queue)")
    with pytest.raises(TransportRefused, match="UNIQUE"):
        transport.send([MESSAGE, MESSAGE])
    assert transport.queues(["q"])[0].ready == 0
    with pytest.raises(TransportRefused, match="cannot store"):
        transport.dead.find(queue="\ud800")


def test_only_a_disk_that_fails_at_the_commit_leaves_a_fate_unknown() -> None:
    """Everywhere else SQLite has rolled back."""
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
def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    """ConfigurationError, before a file is made."""
    with pytest.raises(ConfigurationError):
        load_transport(url)


def test_a_url_is_a_path_from_here_or_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escaped where it has to be; a later change of directory changes nothing."""
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///a%20b%3F.db?timeout=1&poll_interval=0.5", f"sqlite:///{tmp_path}/a%20b%3F.db"):
        with contextlib.closing(load_transport(url)) as transport:
            monkeypatch.chdir("/")
            transport.send([MESSAGE])
        monkeypatch.chdir(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a b?.db"]
