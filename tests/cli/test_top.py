"""`unstract-wire top`: its output without a terminal, and its live view."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import servers
from cli import shared
from cli.outcomes import Ended, the_one_line
from cli.shared import Lasting
from pg_tables import Tables
from queues import bury, receive_all
from supervised import SIGNALLED_WHILE_FINALIZING, program

from contract_tests.messages import message
from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core.cli.render.snapshot import take_snapshot
from unstract_core.observability.diagnostics import WorkerState

Run = Callable[..., Any]
_STYLE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Screen:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (30, 110), before: str = "") -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, size)
        self.settings_before = termios.tcgetattr(self._ours)
        self._process = subprocess.Popen(
            [*program(before), "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._shown = ""

    def shows(self, *texts: str, without: str = "\0", timeout: float = 60.0) -> str:
        """Wait for a picture that has all of these texts, and not `without`; return it."""
        deadline = time.monotonic() + timeout
        self._shown = ""
        while time.monotonic() < deadline:
            self._read(0.2)
            for picture in (_STYLE.sub("", drawn) for drawn in self._shown.split("\x1b[H")[1:-1]):
                if all(text in picture for text in texts) and without not in picture:
                    return picture
        raise AssertionError(f"never showed {texts}, but {self._shown[-3000:]!r}")

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ends(self) -> Ended:
        """Wait until the command has ended, and return its last output."""
        deadline = time.monotonic() + 60.0
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self._shown[-3000:]
            self._read(0.2)
        self._read(0.0)
        err = self._process.stderr.read().decode() if self._process.stderr else ""
        return Ended(self._process.returncode, self._shown, err)

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._ours)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        if self._process.stderr:
            self._process.stderr.close()
        os.close(self._ours)

    def _read(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            while select.select([self._ours], [], [], seconds)[0]:
                block = os.read(self._ours, 65536)
                if not block:
                    return
                self._shown += block.decode("utf-8", "replace")


@pytest.fixture
def watch() -> Iterator[Callable[..., Screen]]:
    """Start the command on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> Screen:
            return stack.enter_context(contextlib.closing(Screen(*arguments, **options)))

        yield start


def many_queues() -> MemoryTransport:
    """A transport with forty queues of different depths, and a dead letter."""
    transport = MemoryTransport()
    transport.send([message("t", "dead")])
    bury(transport, "dead", "Boom: secret-word")
    transport.send([message("t", f"q-{number}") for number in range(40) for _ in range(number + 1)])
    return transport


class Watched(Lasting):
    """A transport that lists its workers."""

    sessions = (
        WorkerState("unstract-wire worker h:1", "10.0.0.7", 71, "active", 3.2),
        WorkerState("unstract-wire", "", 72, None, None),
    )

    def workers(self) -> tuple[WorkerState, ...]:
        return self.sessions


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    transport = Watched()
    monkeypatch.setattr(shared, "current", transport)
    transport.send([message("a.task", "q", "secret-word") for _ in range(3)])
    bury(transport, "q", "ValueError: secret-word")
    transport.send([message("a.task", "full", "secret-word"), message("a.task", "full", delay=60.0)])
    return transport


def test_top_prints_once_without_a_terminal(run: Run, watched: Watched) -> None:
    """Queues, workers and failures are printed as columns, with a note about hidden sessions."""
    ended = run("top")
    queues, workers, failures = ended.stdout.split("\n\n")
    assert [line.split() for line in queues.splitlines()[1:]] == [
        ["full", "2", "-", "1", "0", "1", "0s", "0"],
        ["q", "0", "-", "0", "0", "0", "-", "3"],
    ]
    assert [line.split()[-5:] for line in workers.splitlines()[1:]] == [
        ["h:1", "10.0.0.7", "71", "active", "3s"],
        ["unstract-wire", "hidden", "72", "hidden", "-"],
    ]
    assert [line.split()[1:3] + line.split()[4:] for line in failures.splitlines()[1:]] == [
        ["q", "a.task", "ValueError"]
    ] * 3
    assert (ended.exit_code, "pg_read_all_stats" in ended.stderr) == (0, True)


@pytest.mark.parametrize("arguments", [("--once",), ("--json",), ("--once", "--json", "--queue", "q")])
def test_top_shows_no_payload_and_no_error_text(run: Run, watched: Watched, arguments: tuple[str, ...]) -> None:
    """Message contents and error texts are shown by `dead show` only."""
    ended = run("top", *arguments)
    assert ended.exit_code == 0
    assert "ValueError" in ended.stdout
    assert "secret-word" not in ended.stdout + ended.stderr


def test_top_as_json_has_stable_keys(run: Run, watched: Watched) -> None:
    """There is one document, with and without --once; --queue restricts queues and failures, not workers."""
    document = json.loads(run("top", "--once", "--json", "--queue", "q").stdout)
    assert list(document) == ["at", "queues", "workers", "failures"]
    assert [row["queue"] for row in document["queues"]] == ["q"]
    keys = ["queue", "depth", "ready", "in_flight", "delayed", "oldest_seconds", "dead", "estimated"]
    assert list(document["queues"][0]) == keys
    assert document["workers"][0] == {
        "name": "unstract-wire worker h:1",
        "address": "10.0.0.7",
        "pid": 71,
        "state": "active",
        "since": 3.2,
    }
    assert {tuple(row) for row in document["failures"]} == {("id", "queue", "task_name", "buried_at", "error")}
    assert json.loads(run("top", "--json", "--queue", "full").stdout)["failures"] == []


def test_top_shows_the_newest_five_failures(run: Run, transport: Lasting) -> None:
    """The newest five failures of all named queues are shown, the newest first."""
    for number in range(4):
        for queue in ("a", "b", "c"):
            transport.send([message("t", queue)])
            bury(transport, queue, f"Error{number}")
    failures = json.loads(run("top", "--json", "--queue", "a", "--queue", "b").stdout)["failures"]
    assert [(row["queue"], row["error"]) for row in failures] == [
        ("b", "Error3"),
        ("a", "Error3"),
        ("b", "Error2"),
        ("a", "Error2"),
        ("b", "Error1"),
    ]


def test_top_shows_the_growth_of_each_queue(transport: Lasting) -> None:
    """The growth per second is measured between two snapshots, and a new queue starts from 0."""
    transport.send([message("t", "a") for _ in range(10)])
    first = take_snapshot(transport, [], None)
    receive_all(transport, "a")
    transport.send([message("t", "b") for _ in range(5)])
    time.sleep(0.05)
    second = take_snapshot(transport, [], first)
    seconds = second.moment - first.moment
    assert first.rates == {}
    assert second.rates == {"a": 0.0, "b": 5 / seconds}


def test_top_refuses_transports_without_inspection(run: Run) -> None:
    """The error has the transport's own remedy, if it gives one, as for `queues`."""
    assert "ask the broker's own tools" in the_one_line(run("top", url="cli.shared:explaining"))
    assert "'inspection'" in the_one_line(run("top", url="cli.shared:claimless"))


def test_top_notes_a_missing_list_of_workers(run: Run, transport: Lasting) -> None:
    """Without a list of workers there is a note on standard error, and null in the document."""
    assert "does not list its workers" in run("top").stderr
    assert json.loads(run("top", "--json").stdout)["workers"] is None


def test_top_without_tables_names_the_remedy(run: Run, embedded_url: str) -> None:
    """Missing tables are one error line with the remedy at the start."""
    with servers.fresh_schema(embedded_url) as schema:
        assert "unstract-wire migrate" in the_one_line(run("top", url=f"{embedded_url}?schema={schema}"))


@pytest.mark.parametrize(("keys", "code"), [("q", 0), ("Q", 0), ("xxq", 0), ("\x03", 130)])
def test_top_on_a_terminal_ends_at_a_key(watch: Callable[..., Screen], keys: str, code: int) -> None:
    """q exits with 0 and Ctrl-C with 130; the terminal is restored, without a traceback."""
    screen = watch("--interval", "0.1", "--url", "cli.shared:product")
    picture = screen.shows("celery_executor_legacy", "1200", "ExtractionError")
    assert "does not add up" not in picture
    assert screen.settings != screen.settings_before
    screen.type(keys)
    ended = screen.ends()
    assert (ended.code, ended.err.strip()) == (code, "")
    assert screen.settings == screen.settings_before
    assert "\x1b[?1049l" in ended.out


def test_a_signal_restores_the_terminal(watch: Callable[..., Screen]) -> None:
    """SIGTERM ends top with 128 + 15 and restores the terminal."""
    screen = watch("--interval", "0.1", "--url", "cli.shared:product")
    screen.shows("celery_executor_legacy")
    screen.signal(signal.SIGTERM)
    ended = screen.ends()
    assert (ended.code, screen.settings == screen.settings_before) == (128 + signal.SIGTERM, True)
    assert "\x1b[?1049l" in ended.out


INTERRUPTED = f"""{SIGNALLED_WHILE_FINALIZING}
from unstract_core.cli.render import live_view as screen

def draw(*arguments, draw=screen._screen, pictures=[]):
    pictures.append(draw(*arguments))
    if len(pictures) == 3:
        signalled_while_finalizing(signal.SIGINT)
    return pictures[-1]

screen._screen = draw
"""


def test_a_signal_during_a_finalizer_ends_top(watch: Callable[..., Screen]) -> None:
    """Ctrl-C while an object is finalized, which discards exceptions, still ends top."""
    screen = watch("--url", "cli.shared:product", before=INTERRUPTED)
    ended = screen.ends()
    assert (ended.code, ended.err.strip()) == (130, "")
    assert screen.settings == screen.settings_before


def test_a_small_terminal_shows_the_fullest_queues(watch: Callable[..., Screen]) -> None:
    """Queues that do not fit are counted, and failures keep their rows."""
    screen = watch("--interval", "0.1", "--url", "cli.test_top:many_queues", size=(16, 100))
    picture = screen.shows("q-39", "and ", " more", "Boom")
    assert "q-0 " not in picture
    screen.type("q")
    assert screen.ends().code == 0


def test_a_narrow_terminal_cuts_names_only(watch: Callable[..., Screen]) -> None:
    """Ids, times and figures are never cut."""
    screen = watch("--interval", "0.1", "--url", "cli.shared:product", size=(24, 72))
    picture = screen.shows("+0.0", "FAILURE")
    assert all(len(line.rstrip("\r")) <= 72 for line in picture.split("\n"))
    queues, failures = (line.split() for line in picture.split("\n") if line.startswith(("celery", "4711001")))
    assert queues[1:4] + queues[4:6] == ["1200", "+0.0", "1200", "0", "0"]
    assert queues[0].endswith("…")
    assert [part for part in failures if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", part)]
    screen.type("q")
    assert screen.ends().code == 0


def test_top_survives_an_outage(watch: Callable[..., Screen]) -> None:
    """During an outage the last snapshot stays, keys work, and the start of the outage is shown."""
    with servers.private_server() as server:
        transport = PostgresTransport(server.url, "s")
        transport.migrate()
        transport.send([message("t", "a-queue", "secret-word")])
        screen = watch("--interval", "0.2", "--url", f"{server.url}?schema=s&timeout=1")
        screen.shows("a-queue", "unstract-wire")
        server.stop()
        picture = screen.shows("unavailable since", "a-queue")
        assert "secret-word" not in picture
        server.start()
        Tables(server.url, "s").execute("UPDATE {messages} SET queue_name = 'b-queue'")
        screen.shows("b-queue", without="unavailable since")
        server.stop()
        screen.shows("unavailable since")
        screen.type("q")
        assert screen.ends().code == 0
        server.start()
        transport.close()
