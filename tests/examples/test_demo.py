"""The demo as a process: its output, and the processes and files that it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import kombu
import psycopg
import pytest
import servers
from pgbouncer import private_pgbouncer

from contract_tests.kit import wait_until
from examples.demo import BROKEN, CALLED, DOCUMENTS
from examples.extraction import extract
from examples.processes import ROOT
from unstract_core import normalise

OTHER_MOMENT = pytest.mark.slow(
    variant="tests/examples/test_demo.py, Ctrl-C at most moments",
    reason="Each case runs a demo of its own; `make test` interrupts two of them in each place.",
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

COMPLETE = re.compile(
    r"7 dispatched, 7 called back; 6 outputs and 1 error saved; 1 of 1 reply; 2 of 2 queues empty; "
    r"0 dead letters: complete \((?P<seconds>[\d.]+) s\)"
)
ERROR = (
    "ExtractionError: invoice MF-4471 of MARLOW & FINCH PRINT does not add up: "
    "its 3 line items come to 1,184.00 GBP, but its subtotal says 1,284.00"
)
NOBODY = "amqp://guest:secret@127.0.0.1:1//"
"""Where no broker answers."""
DISPATCHED = sorted(path.stem for path in DOCUMENTS.iterdir() if path.stem != CALLED)


@attrs.frozen
class Where:
    """A place at which the demo can run, with its options and environment."""

    name: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = attrs.field(factory=dict)


@attrs.define
class Run:
    """A demo in its own process group; `mark` or `scratch` identify its processes."""

    process: subprocess.Popen[str]
    output: Path
    scratch: Path
    mark: str
    text: str = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read the output up to a line that matches `pattern`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} was not printed by the demo, which ended with {self.end()}:\n{self.text}")

    def end(self) -> int:
        """Read the rest of the output, wait for the end, and return the exit code."""
        output, errors = self.process.communicate(timeout=200)
        self.text += output + errors
        return self.process.returncode

    def directory(self) -> Path:
        (directory,) = self.output.iterdir()
        return directory

    def processes(self) -> dict[int, str]:
        """Return the command line of every process of this demo in any group or session."""
        found: dict[int, str] = {}
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in environment or str(self.scratch).encode() in command:
                found[int(process.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def queues(self) -> list[str]:
        """Return the names of the queues that the demo has shown."""
        return re.findall(r"^  \w+ worker +.*, queue (\S+),", self.text, re.MULTILINE)

    def left_behind(self) -> list[str]:
        """Return the names of the files in the scratch directory, without the embedded server's lock file."""
        return [path.name for path in self.scratch.iterdir() if path.name != ".lockfile"]


class Starter:
    """Starts demos in the test's own directory, and ends those that a failed test leaves."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._runs: list[Run] = []

    def __call__(self, *options: str, stops_at: str | None = None, **variables: str) -> Run:
        """Start a demo, on an embedded server by default; with `stops_at` it waits at the import of that library."""
        name = f"run{len(self._runs)}"
        output, scratch, mark = self._directory / f"{name}-output", self._directory / name, uuid.uuid4().hex
        scratch.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UNSTRACT_WIRE")}
        environment |= {"TMPDIR": str(scratch), "DEMO_TEST_MARK": mark, **variables}
        if stops_at is not None:
            shadows = self._directory / f"{name}-shadows"
            shadows.mkdir()
            (shadows / f"{stops_at}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
            environment["PYTHONPATH"] = str(shadows)
        process = subprocess.Popen(
            [sys.executable, "-m", "examples", "--output", str(output), *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._runs.append(Run(process, output, scratch, mark))
        return self._runs[-1]

    def at(self, where: Where, *options: str) -> Run:
        return self(*where.options, *options, **where.environment)

    def close(self) -> None:
        for run in self._runs:
            if run.process.poll() is None:
                run.process.terminate()
                run.process.communicate(timeout=200)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Return a function that starts a demo."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module", params=["postgres", "rabbitmq", "inside"])
def where(request: pytest.FixtureRequest) -> Where:
    """Each place: the embedded server, a broker, and kombu's own broker in the demo's process."""
    match request.param:
        case "postgres":
            return Where("postgres")
        case "rabbitmq":
            return over_rabbitmq(request.getfixturevalue("rabbitmq_url"))
        case name:
            return Where(name, ("--transport", "celery"), {"UNSTRACT_WIRE_BROKER": NOBODY})


def over_rabbitmq(url: str) -> Where:
    """The demo over RabbitMQ, where the database URL is not used."""
    variables = {"UNSTRACT_WIRE_BROKER": url, "UNSTRACT_WIRE_URL": "nonsense"}
    return Where("rabbitmq", ("--transport", "celery"), variables)


@pytest.fixture(scope="module")
def played(where: Where, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole demo that succeeded."""
    run = Starter(tmp_path_factory.mktemp("demo")).at(where)
    assert run.end() == 0, run.text
    return run


def saved(run: Run, document: str) -> dict[str, Any]:
    output: dict[str, Any] = json.loads((run.directory() / f"{document}.json").read_text(encoding="utf-8"))
    return output


def test_last_line_is_a_complete_tally(played: Run) -> None:
    """The last line is the same at every place, except for its seconds."""
    tally = COMPLETE.fullmatch(played.text.rstrip().splitlines()[-1])
    assert tally is not None, played.text
    assert float(tally["seconds"]) < 60


@pytest.mark.parametrize("document", sorted(set(DISPATCHED) - BROKEN))
def test_saved_output_has_the_fields_of_the_document(played: Run, document: str) -> None:
    """The saved fields are those that the extraction reads, with amounts as exact text."""
    output = saved(played, document)
    text = (DOCUMENTS / f"{document}.txt").read_text(encoding="utf-8")
    assert output["fields"] == normalise(extract(text))
    assert (output["document_id"], output["status"], output["error"]) == (document, "completed", None)


def test_error_callback_gets_the_original_error(played: Run) -> None:
    """The screen and the saved output have the error that the executor raised."""
    (broken,) = BROKEN
    output = saved(played, broken)
    assert (output["status"], output["fields"], output["error"]) == ("failed", None, ERROR)
    assert ERROR in played.text


def test_each_document_has_exactly_one_output(played: Run) -> None:
    """Each document has one file, and no partial file is left."""
    assert sorted(path.name for path in played.directory().iterdir()) == [f"{name}.json" for name in DISPATCHED]


@pytest.mark.parametrize("document", DISPATCHED)
def test_stages_of_a_document_are_shown_in_order(played: Run, document: str) -> None:
    """Dispatched, running and ended are shown once each, with increasing times."""
    shown = re.findall(rf"^ +([\d.]+) s  (\w+) +{document} ", played.text, re.MULTILINE)
    assert [stage for _, stage in shown] == ["dispatched", "running", "failed" if document in BROKEN else "done"]
    times = [float(seconds) for seconds, _ in shown]
    assert times == sorted(times)


@pytest.mark.parametrize("where", ["postgres", "rabbitmq"], indirect=True)
def test_executor_and_callbacks_run_in_two_processes(played: Run) -> None:
    """The tasks run in the two workers that the demo starts."""
    started = dict(re.findall(r"^  (executor|callback) worker +pid (\d+)", played.text, re.MULTILINE))
    ran = {(task, pid) for task, pid in re.findall(r"  (\w+), pid (\d+)$", played.text, re.MULTILINE)}
    assert started["executor"] != started["callback"]
    assert ran == {
        ("execute_extraction", started["executor"]),
        ("ide_prompt_complete", started["callback"]),
        ("ide_prompt_error", started["callback"]),
    }


@pytest.mark.parametrize("where", ["inside"], indirect=True)
def test_demo_without_a_broker_runs_in_one_process(played: Run) -> None:
    """The demo names the missing broker without its password, and runs the tasks in its own process."""
    assert re.search(
        r"broker +no broker answers at amqp://127.0.0.1:1//: kombu's own, inside this process", played.text
    )
    assert re.findall(r"(\w+) worker +threads of this process", played.text) == ["executor", "callback"]
    assert set(re.findall(r", pid (\d+)$", played.text, re.MULTILINE)) == {str(played.process.pid)}
    assert "secret" not in played.text


@pytest.mark.parametrize("where", ["rabbitmq", "inside"], indirect=True)
def test_demo_says_what_a_broker_cannot_do(played: Run) -> None:
    """The demo says that a broker has no statuses and no inspection."""
    assert re.search(r"^  statuses +none are stored; the evidence is", played.text, re.MULTILINE)
    assert "a broker has no inspection" in played.text


@pytest.mark.parametrize("where", ["rabbitmq"], indirect=True)
def test_broker_queues_of_a_run_are_deleted(played: Run, rabbitmq_url: str) -> None:
    """The run's queues have their own names, and neither they, their dead letters nor exchanges are left."""
    assert len(set(played.queues()) - {"celery_executor_legacy", "ide_callback"}) == 2
    assert still_there(rabbitmq_url, played.queues()) == []


def still_there(url: str, queues: list[str]) -> list[str]:
    """Return those of the queues, dead-letter queues and exchanges that the broker still has."""
    found = []
    with kombu.Connection(url) as connection:
        for name in (*queues, *(f"{queue}.dead" for queue in queues)):
            for declare in ("queue_declare", "exchange_declare"):
                options = {"type": "direct"} if declare == "exchange_declare" else {}
                try:
                    getattr(connection.channel(), declare)(name, passive=True, **options)
                except connection.channel_errors:
                    continue
                found.append(f"{declare} {name}")
    return found


def test_blocking_caller_gets_the_fields(played: Run) -> None:
    """The called document is shown running and then replied, with its total."""
    shown = re.findall(rf"^ +[\d.]+ s  (\w+) +{CALLED}", played.text, re.MULTILINE)
    assert shown == ["called", "running", "replied"]
    assert "30.37 + 6.08 tax (20 %) = 36.45 GBP" in played.text


@needs_proc
def test_demo_leaves_nothing_behind(played: Run) -> None:
    """No process and no scratch file is left."""
    assert (played.processes(), played.left_behind()) == ({}, [])


INTERRUPTS = pytest.mark.parametrize(
    ("to", "moment"),
    [
        pytest.param(os.killpg, "running", id="terminal-running"),
        pytest.param(os.kill, "called", id="process-called"),
        pytest.param(os.kill, "executor worker", id="process-executor worker", marks=OTHER_MOMENT),
        pytest.param(os.kill, "running", id="process-running", marks=OTHER_MOMENT),
        pytest.param(os.killpg, "executor worker", id="terminal-executor worker", marks=OTHER_MOMENT),
        pytest.param(os.killpg, "called", id="terminal-called", marks=OTHER_MOMENT),
    ],
)
"""How Ctrl-C reaches the demo, and when."""


@needs_proc
@INTERRUPTS
def test_ctrl_c_leaves_nothing_running_on_postgres(start: Starter, moment: str, to: Any) -> None:
    """SIGINT to the demo or to its group ends the workers and the server, and removes the scratch directory."""
    run = start()
    run.read_until(moment)

    def up() -> bool:
        commands = " ".join(run.processes().values())
        return "unstract_core worker" in commands and "bin/postgres" in commands

    wait_until(up, what="a worker and the server to run")
    to(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.text
    assert (run.processes(), run.left_behind()) == ({}, [])
    assert "Traceback" not in run.text
    assert all(list(directory.iterdir()) for directory in run.output.glob("*"))


@needs_proc
@INTERRUPTS
def test_ctrl_c_leaves_no_queue_at_a_broker(start: Starter, rabbitmq_url: str, moment: str, to: Any) -> None:
    """SIGINT to the demo or to its group ends the workers, and removes the scratch directory and the queues."""
    run = start.at(over_rabbitmq(rabbitmq_url))
    run.read_until(moment)
    assert still_there(rabbitmq_url, run.queues())
    to(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.text
    assert still_there(rabbitmq_url, run.queues()) == []
    assert (run.processes(), run.left_behind()) == ({}, [])
    assert "interrupted: the workers are stopped, and this run's queues deleted" in run.text
    assert "Traceback" not in run.text


@needs_proc
@pytest.mark.parametrize("moment", ["executor worker", "running", "called"])
def test_ctrl_c_ends_a_demo_in_one_process(start: Starter, moment: str) -> None:
    """Without a broker, the running tasks are finished and nothing is left."""
    run = start("--transport", "celery", UNSTRACT_WIRE_BROKER=NOBODY)
    run.read_until(moment)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.text
    assert (run.processes(), run.left_behind()) == ({}, [])
    assert "Traceback" not in run.text


@needs_proc
@pytest.mark.parametrize("library", ["attrs", "rich"])
def test_ctrl_c_during_imports_prints_no_traceback(start: Starter, library: str) -> None:
    """The demo ends by SIGINT, as a shell expects."""
    run = start(stops_at=library)
    run.read_until("importing")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == -signal.SIGINT, run.text
    assert (run.text, run.processes(), run.left_behind()) == ("importing\n", {}, [])


def test_missing_callback_worker_is_reported(start: Starter, where: Where) -> None:
    """Every missing output is named, the queue is not empty, and the exit code is not zero."""
    run = start.at(where, "--without", "callback", "--deadline", "3")
    assert run.end() == 1, run.text
    assert re.findall(r"^missing: (\S+): no output was saved$", run.text, re.MULTILINE) == DISPATCHED
    assert re.search(r"^missing: queue ide_callback\w* still holds 7$", run.text, re.MULTILINE)
    assert "0 called back; 0 outputs and 0 error saved; 1 of 1 reply; 1 of 2 queues empty" in run.text


def test_missing_executor_is_reported(start: Starter, where: Where) -> None:
    """No callback runs, the blocking caller gets no reply, and the workers' log is shown."""
    run = start.at(where, "--without", "executor", "--deadline", "2")
    assert run.end() == 1, run.text
    assert "0 called back; 0 outputs and 0 error saved; 0 of 1 reply; 1 of 2 queues empty" in run.text
    assert "missing: the reply of the blocking dispatch: no reply from task 'execute_extraction'" in run.text
    assert re.search(r"^missing: queue celery_executor_legacy\w* still holds 8$", run.text, re.MULTILINE)
    assert f"The end of {'demo' if where.name == 'inside' else 'callback'}.log" in run.text


def test_killed_worker_ends_the_wait(start: Starter) -> None:
    """A killed callback worker ends the wait at once, and its exit code is reported."""
    run = start("--deadline", "50")
    pid = run.read_until(r"callback worker +pid (\d+)")[1]
    run.read_until("running")
    os.kill(int(pid), signal.SIGKILL)
    assert run.end() == 1, run.text
    assert "missing: the callback worker ended with exit code -9" in run.text


def test_broker_requeues_messages_of_a_killed_worker(start: Starter, rabbitmq_url: str) -> None:
    """The documents of a killed worker are counted as waiting, and its queue is deleted."""
    run = start.at(over_rabbitmq(rabbitmq_url), "--deadline", "50")
    pid = run.read_until(r"executor worker +pid (\d+)")[1]
    run.read_until("running")
    os.kill(int(pid), signal.SIGKILL)
    assert run.end() == 1, run.text
    assert "missing: the executor worker ended with exit code -9" in run.text
    assert re.search(r"^missing: queue celery_executor_legacy\w+ still holds [78]$", run.text, re.MULTILINE)
    assert still_there(rabbitmq_url, run.queues()) == []


@pytest.mark.parametrize("options", ["", "?listen=false"], ids=["found", "told"])
def test_demo_works_through_pgbouncer(start: Starter, server_url: str, options: str) -> None:
    """In transaction mode, with or without listen=false, the tally is complete and the schema is dropped."""
    with private_pgbouncer(server_url) as pgbouncer:
        run = start(UNSTRACT_WIRE_URL=pgbouncer.url + options)
        assert run.end() == 0, run.text
        assert COMPLETE.fullmatch(run.text.rstrip().splitlines()[-1]), run.text
        (own,) = re.findall(r"created in schema (\w+)", run.text)
        assert own not in schemas(server_url)


def test_demo_uses_and_drops_its_own_schema(start: Starter, server_url: str) -> None:
    """On a given server, the schema that the URL names is not touched either."""
    with servers.fresh_schema(server_url) as product:
        separator = "&" if "?" in server_url else "?"
        run = start(UNSTRACT_WIRE_URL=f"{server_url}{separator}schema={product}&listen=false")
        own = run.read_until(r"created in schema (demo_\w+)")[1]
        assert own in schemas(server_url)
        assert run.end() == 0, run.text
        assert COMPLETE.search(run.text)
        assert schemas(server_url).isdisjoint({own, product})


def schemas(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        return {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace").fetchall()}


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("amqp://guest:secret@127.0.0.1/", "is not a postgresql:// URL"),
        ("postgresql://user:secret@127.0.0.1:1/database", "cannot connect to PostgreSQL"),
        ("postgresql://user:secret@127.0.0.1/database?connect_timeout=soon", "cannot"),
    ],
)
def test_unusable_server_is_one_line_without_password(start: Starter, url: str, complaint: str) -> None:
    """The exit code is 2, and standard error has the problem without a traceback."""
    assert_is_refused(start(UNSTRACT_WIRE_URL=url), complaint)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://:secret@127.0.0.1/", "is not an amqp:// URL"),
        ("secret", "is not an amqp:// URL"),
        ("amqp://guest:sec/secret@127.0.0.1//", "cannot be parsed"),
        ("amqp://guest:secret@127.0.0.1:port//", "cannot be parsed"),
        ("amqp://guest:secret@127.0.0.1//;amqp://guest:secret@127.0.0.2//", "names several brokers"),
    ],
)
def test_invalid_broker_url_is_one_line_without_password(start: Starter, url: str, complaint: str) -> None:
    """An invalid broker URL is an error, without a fallback to one process."""
    assert_is_refused(start("--transport", "celery", UNSTRACT_WIRE_BROKER=url), complaint)


@pytest.mark.parametrize(
    ("login", "path", "complaint"),
    [("guest:secret", "//", "ACCESS_REFUSED"), (None, "/no-such-vhost", "vhost no-such-vhost not found")],
    ids=["password", "vhost"],
)
def test_refusing_broker_is_one_line_without_password(
    start: Starter, rabbitmq_url: str, login: str | None, path: str, complaint: str
) -> None:
    """A broker that rejects the login is an error, without a fallback to one process."""
    user, _, host = urlsplit(rabbitmq_url).netloc.rpartition("@")
    run = start("--transport", "celery", UNSTRACT_WIRE_BROKER=f"amqp://{login or user}@{host}{path}")
    assert_is_refused(run, complaint)


def assert_is_refused(run: Run, complaint: str) -> None:
    rest, errors = run.process.communicate(timeout=200)
    assert run.process.returncode == 2
    assert complaint in errors
    assert len(errors.splitlines()) == 1
    assert "secret" not in rest + errors


def test_help_lists_the_transports(start: Starter) -> None:
    """The help names the transports and their variables."""
    run = start("--help")
    assert run.end() == 0
    assert "--transport {postgres,celery}" in run.text
    assert "UNSTRACT_WIRE_BROKER" in run.text
