"""The worker as a process: its log, its stop, and the database afterwards."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import servers
import supervised
from cli.outcomes import Ended, the_one_line
from hypothesis import example, given
from hypothesis import strategies as st
from queues import bury, receive_all

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Dispatcher
from unstract_core.cli.context import CliContext
from unstract_core.cli.render.logs import LogFormatter


@attrs.frozen
class Callback:
    """A stand-in for a Celery signature."""

    task: str
    options: dict[str, Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = attrs.field(factory=dict)


Start = Callable[..., "subprocess.Popen[str]"]
WORKER = ("worker", "--app", "cli.shared:tasks", "--queue", "q")
NEXT = Callback("then", {"queue": "next"})
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) [\w.]+ \S.*")


@attrs.frozen
class Database:
    """A schema with its URL for the command line, which has a password."""

    url: str
    transport: PostgresTransport


@pytest.fixture(scope="module")
def server(embedded_url: str) -> str:
    return embedded_url.replace("postgres@", "postgres:s3cret-word@")


@pytest.fixture
def bare_url(server: str, embedded_url: str) -> Iterator[str]:
    """Return the URL of a schema that was never migrated."""
    with servers.fresh_schema(embedded_url) as schema:
        yield f"{server}?schema={schema}"


@pytest.fixture
def database(bare_url: str, server: str) -> Iterator[Database]:
    transport = PostgresTransport(server, bare_url.rpartition("=")[2])
    transport.migrate()
    yield Database(bare_url, transport)
    transport.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str], typed: str = "") -> Ended:
    out, err = process.communicate(typed, timeout=60)
    return Ended(process.returncode, out, err)


def event(log: str, name: str) -> dict[str, str]:
    """Return the fields of the only event of this name. Fails unless each line of the log is a whole record."""
    lines = log.splitlines()
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    (line,) = [line for line in lines if f" wire.{name} " in line]
    return dict(field.split("=", 1) for field in line.partition(f"wire.{name} ")[2].split(" "))


def test_sigterm_lets_the_running_task_finish(start: Start, database: Database) -> None:
    """On SIGTERM no new task starts; the running task is settled, and the exit code is 0."""
    dispatcher = Dispatcher(database.transport)
    dispatcher.send_with_callback("wait_for_line", queue="q", on_success=NEXT, task_id="first")
    dispatcher.send("wait_for_line", queue="q")
    process = start(*WORKER, "--queue", "other", "--url", database.url)
    assert line_of(process) == "running"
    process.send_signal(signal.SIGTERM)
    ended = finish(process, "the end\nanother\n")

    assert (ended.code, ended.out) == (0, "")
    stopped = event(ended.err, "worker_stopped")
    assert {name: stopped[name] for name in ("ran", "buried", "lost", "refused", "replaced")} == {
        "ran": "1",
        "buried": "0",
        "lost": "0",
        "refused": "0",
        "replaced": "0",
    }
    assert stopped["settled"] == "1"
    (state,) = database.transport.queues(["q"])
    assert (state.ready, state.in_flight, state.delayed) == (1, 0, 0)
    status = database.transport.reply("first")
    assert status is not None
    assert (status.status, status.result) == ("completed", None)
    (follow_up,) = receive_all(database.transport, "next")
    assert follow_up.payload is not None
    assert follow_up.payload.args == ["the end"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(start: Start, database: Database, number: signal.Signals) -> None:
    """The worker exits with 128 + the signal and waits for no thread; the message keeps its lease."""
    database.transport.send([message("wait_in_a_pool", "q")])
    process = start(*WORKER, "--url", database.url)
    assert line_of(process) == "running"
    while process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    ended = finish(process)
    assert ended.code == 128 + number
    assert "Traceback" not in ended.err
    assert event(ended.err, "worker_stopped")["settled"] == "0"
    (state,) = database.transport.queues(["q"])
    assert (state.ready, state.in_flight) == (0, 1)


def test_the_first_log_line_describes_the_worker(start: Start, database: Database) -> None:
    """`worker_started` has the masked transport, the queues, the tasks and the concurrency."""
    database.transport.send([message("wait_for_line", "b")])
    process = start(
        *("worker", "--app", "cli.shared:plain_tasks", "--queue", "a", "--queue", "b", "--queue", "a"),
        *("--concurrency", "3", "--lease", "7.5", "--max-attempts", "2", "--prefetch", "4", "--url", database.url),
    )
    assert line_of(process) == "running"
    process.send_signal(signal.SIGINT)
    ended = finish(process, "\n")
    assert ended.code == 0
    started = event(ended.err, "worker_started")
    assert started["transport"] == database.url.replace("s3cret-word", "***")
    assert (started["queues"], started["tasks"], started["concurrency"]) == ("a,b", "wait_for_line", "3")
    assert (started["lease"], started["pid"]) == ("7.5", str(process.pid))
    assert "s3cret-word" not in ended.err


def test_the_log_has_no_payload_content(start: Start, database: Database) -> None:
    """A failed task is logged by ids, type and place, without its arguments and error text."""
    Dispatcher(database.transport).send_with_callback("fail", args=["payload content"], queue="q", task_id="t-1")
    Dispatcher(database.transport).send_with_callback("nobody.has.this", queue="q", task_id="t-2")
    process = start(*WORKER, "--max-attempts", "1", "--log-level", "debug", "--url", database.url)
    for task_id in ("t-1", "t-2"):
        status = database.transport.reply(task_id, timeout=20)
        assert status is not None
        assert status.status == "failed"
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.code == 0
    assert "error_type=ValueError" in ended.err
    assert "payload content" not in ended.err
    reasons = {letter.task_name: letter.reason for letter in database.transport.dead.find()}
    assert reasons["fail"] == "ValueError: payload content"
    assert "nobody.has.this" in reasons["nobody.has.this"]


def test_log_level_error_logs_no_success(start: Start) -> None:
    """With --log-level error a worker without errors logs nothing."""
    process = start(*WORKER, "--log-level", "ERROR", "--url", "cli.shared:busy")
    assert line_of(process) == "running"
    process.send_signal(signal.SIGTERM)
    assert finish(process, "\n\n") == Ended(0, "", "")


def test_sigterm_during_the_import_exits_at_once(start: Start, tmp_path: Path) -> None:
    """Before a message is claimed, SIGTERM ends the process with 143 and without output."""
    (tmp_path / "slow_app.py").write_text("import sys\nprint('importing', flush=True)\nsys.stdin.readline()\n")
    process = start("worker", "--app", "slow_app:tasks", "--queue", "q", "--url", "cli.shared:busy", cwd=tmp_path)
    assert line_of(process) == "importing"
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert finish(process) == Ended(128 + signal.SIGTERM, "", "")


def test_an_app_in_the_current_directory_is_found(start: Start, tmp_path: Path) -> None:
    """The installed command, like `python -m`, imports the app and module:factory from the current directory."""
    (tmp_path / "here.py").write_text("from cli.shared import busy, tasks\nclass Nested:\n    tasks = dict(tasks)\n")
    command = "import sys; sys.path.pop(0); from unstract_core.__main__ import main; main()"
    arguments = ("worker", "--app", "here:Nested.tasks", "--queue", "q", "--url", "here:busy")
    process = start(*arguments, program=("-c", command), cwd=tmp_path)
    assert line_of(process) == "running"
    process.send_signal(signal.SIGTERM)
    assert finish(process, "\n").code == 0


@pytest.mark.parametrize("command", [WORKER, ("queues",), ("dead", "list"), ("dead", "purge", "--all", "--yes")])
def test_missing_tables_are_reported_with_the_remedy(
    run: Callable[..., Any], bare_url: str, command: tuple[str, ...]
) -> None:
    """Without tables each command says to run `unstract-wire migrate`."""
    assert "unstract-wire migrate" in the_one_line(run(*command, url=bare_url))


def test_migrate_prints_sql_and_changes_nothing(run: Callable[..., Any], bare_url: str) -> None:
    """`--sql` prints the statements and does not create the schema."""
    printed = run("migrate", "--sql", url=bare_url).stdout
    assert "CREATE TABLE" in printed
    assert "CREATE INDEX pg_queue_message_ready" in printed
    assert run("migrate", "--lock-timeout", "2", "--create-tables", url=bare_url).stdout.startswith("created schema")


def test_migrate_creates_the_tables_once(run: Callable[..., Any], bare_url: str) -> None:
    """After `migrate` the other commands work, and a second `migrate` creates nothing."""
    created = json.loads(run("migrate", "--json", url=bare_url).stdout)["created"]
    assert {"pg_queue_message", "pg_task_result", "pg_queue_dead_letter"} <= set(created)
    assert json.loads(run("queues", "--json", url=bare_url).stdout) == []
    assert run("migrate", url=bare_url).stdout == "up to date, nothing was created\n"


def test_dead_commands_work_over_postgresql(run: Callable[..., Any], database: Database) -> None:
    """The dead letter commands behave over PostgreSQL as over memory."""
    for queue in ("a", "a", "b"):
        database.transport.send([message("t", queue, {"for": queue})])
        bury(database.transport, queue, f"reason of {queue}", result={"paid": True})
    listed = json.loads(run("dead", "list", "--json", url=database.url).stdout)
    assert [row["queue"] for row in listed] == ["b", "a", "a"]
    shown = json.loads(run("dead", "show", listed[0]["id"], "--json", url=database.url).stdout)
    assert (shown["message"]["args"], shown["result"]) == ([{"for": "b"}], {"paid": True})
    assert "no dead letter x" in the_one_line(run("dead", "show", "x", url=database.url))
    replayed = json.loads(run("dead", "replay", "--queue", "a", "--all", "--json", url=database.url).stdout)
    assert sorted(replayed["replayed"]) == sorted(row["id"] for row in listed[1:])
    states = json.loads(run("queues", "--json", url=database.url).stdout)
    assert [(row["queue"], row["ready"], row["dead"]) for row in states] == [("a", 2, 0), ("b", 0, 1)]
    assert json.loads(run("dead", "purge", "--all", "--yes", "--json", url=database.url).stdout) == {"purged": 1}


LEFT_BEHIND = """
import atexit, time

class Slow:
    def __del__(self):
        time.sleep(60)

slow = Slow()
file = open("written", "w")
file.write("all of it")
atexit.register(lambda: open("at_exit", "w").close())
tasks = dict(t=print)
"""


@pytest.mark.parametrize("options", [(), ("--processes", "1")])
def test_a_stopped_worker_skips_the_interpreter_cleanup(tmp_path: Path, options: tuple[str, ...]) -> None:
    """After `worker_stopped` exit handlers run and open files are written; nothing else delays the exit."""
    (tmp_path / "behind.py").write_text(LEFT_BEHIND)
    with supervised.worker(*options, url="memory://", app="behind:tasks", directory=tmp_path, path=tmp_path) as command:
        command.event("worker_started")
        command.signal(signal.SIGTERM)
        command.event("worker_stopped")
        began = time.monotonic()
        assert command.ends() == 0
        assert time.monotonic() - began < 40
    assert (tmp_path / "at_exit").exists()
    assert (tmp_path / "written").read_text() == "all of it"


@given(st.text(max_size=80), st.booleans())
@example("failed\n2026-01-01T00:00:00.000Z INFO unstract_core.worker.loop wire.forged", False)
@example("\x1b[31mred\r\x85\u2028next", True)
def test_a_traceback_forges_no_log_line(text: str, formatted: bool) -> None:
    """Each line of a traceback starts with a mark and is printable; other handlers get the record unchanged."""
    try:
        raise ValueError(text)
    except ValueError as exc:
        record = logging.LogRecord("app", logging.ERROR, __file__, 1, "it failed", (), (type(exc), exc, None))
    if formatted:
        logging.Formatter().format(record)
    before = record.exc_text
    first, *lines = LogFormatter(CliContext().mask).format(record).split("\n")
    assert LOG_LINE.fullmatch(first)
    assert lines
    assert all(line.startswith("  | ") and line.isprintable() for line in lines)
    assert record.exc_text == before
