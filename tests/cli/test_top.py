"""`unstract-wire top`: what it shows once, and how it lives on a terminal."""

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
    """The command on a terminal of its own, as somebody sees it who sits there."""

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
        """Wait for a picture that holds all of these texts, and not that one; return it."""
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
        """Wait until the command has ended; the last that it wrote to the terminal is its output."""
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
    """A transport with forty queues, one fuller than the other, and a dead letter."""
    transport = MemoryTransport()
    transport.send([message("t", "dead")])
    bury(transport, "dead", "Boom: secret-word")
    transport.send([message("t", f"q-{number}") for number in range(40) for _ in range(number + 1)])
    return transport


class Watched(Lasting):
    """Tells who is connected."""

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


def test_where_no_terminal_is_it_shows_everything_once(run: Run, watched: Watched) -> None:
    """Queues, workers and the last failures as columns, with a note on what this role may not see."""
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
def test_what_a_message_holds_and_what_an_error_says_is_not_shown(
    run: Run, watched: Watched, arguments: tuple[str, ...]
) -> None:
    """It is seen over somebody's shoulder; `dead show` is what shows content."""
    ended = run("top", *arguments)
    assert ended.exit_code == 0
    assert "ValueError" in ended.stdout
    assert "secret-word" not in ended.stdout + ended.stderr


def test_json_has_stable_keys(run: Run, watched: Watched) -> None:
    """One document, with or without --once; --queue restricts queues and failures, and not workers."""
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


def test_the_newest_failures_of_all_named_queues_come_first(run: Run, transport: Lasting) -> None:
    """Five at most."""
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


def test_a_queue_shows_by_how_much_it_grows(transport: Lasting) -> None:
    """A second, between two looks; a queue that was empty is counted from nothing."""
    transport.send([message("t", "a") for _ in range(10)])
    first = take_snapshot(transport, [], None)
    receive_all(transport, "a")
    transport.send([message("t", "b") for _ in range(5)])
    time.sleep(0.05)
    second = take_snapshot(transport, [], first)
    seconds = second.moment - first.moment
    assert first.rates == {}
    assert second.rates == {"a": 0.0, "b": 5 / seconds}


def test_what_a_transport_does_not_claim_is_refused_with_the_remedy(run: Run) -> None:
    """As `queues` refuses it: in the transport's own words, where it has some."""
    assert "ask the broker's own tools" in the_one_line(run("top", url="cli.shared:explaining"))
    assert "'inspection'" in the_one_line(run("top", url="cli.shared:claimless"))


def test_a_transport_that_does_not_tell_who_works_says_so(run: Run, transport: Lasting) -> None:
    """Beside the output; null in the document."""
    assert "does not list its workers" in run("top").stderr
    assert json.loads(run("top", "--json").stdout)["workers"] is None


def test_tables_that_are_not_there_end_it_with_the_remedy(run: Run, embedded_url: str) -> None:
    """At start, in one line."""
    with servers.fresh_schema(embedded_url) as schema:
        assert "unstract-wire migrate" in the_one_line(run("top", url=f"{embedded_url}?schema={schema}"))


@pytest.mark.parametrize(("keys", "code"), [("q", 0), ("Q", 0), ("xxq", 0), ("\x03", 130)])
def test_on_a_terminal_it_stays_until_a_key_leaves(watch: Callable[..., Screen], keys: str, code: int) -> None:
    """q with 0, Ctrl-C with 130; the terminal is as it was before, and no traceback is left on it."""
    screen = watch("--interval", "0.1", "--url", "cli.shared:product")
    picture = screen.shows("celery_executor_legacy", "1200", "ExtractionError")
    assert "does not add up" not in picture
    assert screen.settings != screen.settings_before
    screen.type(keys)
    ended = screen.ends()
    assert (ended.code, ended.err.strip()) == (code, "")
    assert screen.settings == screen.settings_before
    assert "\x1b[?1049l" in ended.out


def test_a_signal_leaves_the_terminal_as_it_was(watch: Callable[..., Screen]) -> None:
    """SIGTERM ends it with 128 + 15, through every clean-up."""
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


def test_a_signal_is_heard_at_any_moment(watch: Callable[..., Screen]) -> None:
    """Also while an object is finalized, where an exception goes nowhere: nobody presses Ctrl-C in vain."""
    screen = watch("--url", "cli.shared:product", before=INTERRUPTED)
    ended = screen.ends()
    assert (ended.code, ended.err.strip()) == (130, "")
    assert screen.settings == screen.settings_before


def test_on_a_small_terminal_the_fullest_queues_are_shown(watch: Callable[..., Screen]) -> None:
    """What there is no room for is counted; failures keep their place."""
    screen = watch("--interval", "0.1", "--url", "cli.test_top:many_queues", size=(16, 100))
    picture = screen.shows("q-39", "and ", " more", "Boom")
    assert "q-0 " not in picture
    screen.type("q")
    assert screen.ends().code == 0


def test_no_figure_is_cut_however_narrow_the_terminal_is(watch: Callable[..., Screen]) -> None:
    """Names are; ids, times and figures are not."""
    screen = watch("--interval", "0.1", "--url", "cli.shared:product", size=(24, 72))
    picture = screen.shows("+0.0", "FAILURE")
    assert all(len(line.rstrip("\r")) <= 72 for line in picture.split("\n"))
    queues, failures = (line.split() for line in picture.split("\n") if line.startswith(("celery", "4711001")))
    assert queues[1:4] + queues[4:6] == ["1200", "+0.0", "1200", "0", "0"]
    assert queues[0].endswith("…")
    assert [part for part in failures if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", part)]
    screen.type("q")
    assert screen.ends().code == 0


def test_an_outage_is_told_and_outlived(watch: Callable[..., Screen]) -> None:
    """While the database is away the last picture stays, with since when; then it goes on. A key is heard meanwhile."""
    with servers.private_server() as server:
        transport = PostgresTransport(server.url, "s")
        transport.migrate()
        transport.send([message("t", "a-queue", "secret-word")])
        screen = watch("--interval", "0.2", "--url", f"{server.url}?schema=s&timeout=1")
        screen.shows("a-queue", "unstract-wire")
        server.stop()
        picture = screen.shows("away since", "a-queue")
        assert "secret-word" not in picture
        server.start()
        Tables(server.url, "s").execute("UPDATE {messages} SET queue_name = 'b-queue'")
        screen.shows("b-queue", without="away since")
        server.stop()
        screen.shows("away since")
        screen.type("q")
        assert screen.ends().code == 0
        server.start()
        transport.close()
