"""The demo as a person runs it: a process, watched from outside, and what it leaves behind."""

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
    """A place that the demo can play at, by the options and the environment that it takes to get there."""

    name: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = attrs.field(factory=dict)


@attrs.define
class Run:
    """A demo in a process group of its own, all of whose processes can be told by `mark` or by `scratch`."""

    process: subprocess.Popen[str]
    output: Path
    scratch: Path
    mark: str
    text: str = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read what it prints up to a line that `pattern` is found in."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} was not printed by the demo, which ended with {self.end()}:\n{self.text}")

    def end(self) -> int:
        """Read the rest, wait for the end, and return the exit code."""
        output, errors = self.process.communicate(timeout=200)
        self.text += output + errors
        return self.process.returncode

    def directory(self) -> Path:
        (directory,) = self.output.iterdir()
        return directory

    def processes(self) -> dict[int, str]:
        """Return the command line of every process of this demo, wherever its group or session is."""
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
        """Return the names of the queues that it has shown."""
        return re.findall(r"^  \w+ worker +.*, queue (\S+),", self.text, re.MULTILINE)

    def left_behind(self) -> list[str]:
        """Return the names of what is left in its scratch directory, the embedded server's own lock file aside."""
        return [path.name for path in self.scratch.iterdir() if path.name != ".lockfile"]


class Starter:
    """Starts demos in a test's own directory, and ends those that a failed test would leave."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._runs: list[Run] = []

    def __call__(self, *options: str, stops_at: str | None = None, **variables: str) -> Run:
        """Start one, on an embedded server unless told otherwise; one that `stops_at` a library says so and waits."""
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
    """A way to start demos."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module", params=["postgres", "rabbitmq", "inside"])
def where(request: pytest.FixtureRequest) -> Where:
    """Each place in turn: the embedded server, a broker, and kombu's own broker in the demo's process."""
    match request.param:
        case "postgres":
            return Where("postgres")
        case "rabbitmq":
            return over_rabbitmq(request.getfixturevalue("rabbitmq_url"))
        case name:
            return Where(name, ("--transport", "celery"), {"UNSTRACT_WIRE_BROKER": NOBODY})


def over_rabbitmq(url: str) -> Where:
    """On a broker the URL of a database is of no interest, wherever it points."""
    variables = {"UNSTRACT_WIRE_BROKER": url, "UNSTRACT_WIRE_URL": "nonsense"}
    return Where("rabbitmq", ("--transport", "celery"), variables)


@pytest.fixture(scope="module")
def played(where: Where, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole demo, which ended well."""
    run = Starter(tmp_path_factory.mktemp("demo")).at(where)
    assert run.end() == 0, run.text
    return run


def saved(run: Run, document: str) -> dict[str, Any]:
    output: dict[str, Any] = json.loads((run.directory() / f"{document}.json").read_text(encoding="utf-8"))
    return output


def test_the_last_line_is_a_tally_in_which_everything_is_there(played: Run) -> None:
    """The same line at every place, its seconds aside, which are few."""
    tally = COMPLETE.fullmatch(played.text.rstrip().splitlines()[-1])
    assert tally is not None, played.text
    assert float(tally["seconds"]) < 60


@pytest.mark.parametrize("document", sorted(set(DISPATCHED) - BROKEN))
def test_the_saved_output_holds_the_fields_of_the_document(played: Run, document: str) -> None:
    """What came through executor, queue and callback is what the extraction reads, amounts as exact text."""
    output = saved(played, document)
    text = (DOCUMENTS / f"{document}.txt").read_text(encoding="utf-8")
    assert output["fields"] == normalise(extract(text))
    assert (output["document_id"], output["status"], output["error"]) == (document, "completed", None)


def test_the_error_callback_gets_the_real_error_text(played: Run) -> None:
    """Not "task failed", but what the executor raised; on the screen as in the saved output."""
    (broken,) = BROKEN
    output = saved(played, broken)
    assert (output["status"], output["fields"], output["error"]) == ("failed", None, ERROR)
    assert ERROR in played.text


def test_every_dispatched_document_has_its_output_and_there_are_no_others(played: Run) -> None:
    """One file a document; nothing half written is left beside them."""
    assert sorted(path.name for path in played.directory().iterdir()) == [f"{name}.json" for name in DISPATCHED]


@pytest.mark.parametrize("document", DISPATCHED)
def test_a_document_is_shown_dispatched_then_running_then_ended(played: Run, document: str) -> None:
    """The stages are shown once each, in this order, with times that do not run backwards."""
    shown = re.findall(rf"^ +([\d.]+) s  (\w+) +{document} ", played.text, re.MULTILINE)
    assert [stage for _, stage in shown] == ["dispatched", "running", "failed" if document in BROKEN else "done"]
    times = [float(seconds) for seconds, _ in shown]
    assert times == sorted(times)


@pytest.mark.parametrize("where", ["postgres", "rabbitmq"], indirect=True)
def test_executor_and_callbacks_run_in_two_processes_of_their_own(played: Run) -> None:
    """The pids under which tasks were seen are those of the two workers that were started."""
    started = dict(re.findall(r"^  (executor|callback) worker +pid (\d+)", played.text, re.MULTILINE))
    ran = {(task, pid) for task, pid in re.findall(r"  (\w+), pid (\d+)$", played.text, re.MULTILINE)}
    assert started["executor"] != started["callback"]
    assert ran == {
        ("execute_extraction", started["executor"]),
        ("ide_prompt_complete", started["callback"]),
        ("ide_prompt_error", started["callback"]),
    }


@pytest.mark.parametrize("where", ["inside"], indirect=True)
def test_where_no_broker_answers_all_of_it_runs_inside_one_process_and_says_so(played: Run) -> None:
    """The broker that was looked for is named, without its password; tasks run under the demo's own pid."""
    assert re.search(r"broker +none answers at amqp://127.0.0.1:1//: kombu's own, inside this process", played.text)
    assert re.findall(r"(\w+) worker +threads of this process", played.text) == ["executor", "callback"]
    assert set(re.findall(r", pid (\d+)$", played.text, re.MULTILINE)) == {str(played.process.pid)}
    assert "secret" not in played.text


@pytest.mark.parametrize("where", ["rabbitmq", "inside"], indirect=True)
def test_what_a_broker_cannot_do_is_said(played: Run) -> None:
    """It keeps no statuses, and has no inspection."""
    assert re.search(r"^  statuses +none are kept, and so they are no evidence", played.text, re.MULTILINE)
    assert "a broker has no inspection" in played.text


@pytest.mark.parametrize("where", ["rabbitmq"], indirect=True)
def test_the_queues_at_a_broker_are_the_runs_own_and_deleted(played: Run, rabbitmq_url: str) -> None:
    """Neither of them has the product's name, and neither is left: no dead letters of theirs, and no exchange."""
    assert len(set(played.queues()) - {"celery_executor_legacy", "ide_callback"}) == 2
    assert still_there(rabbitmq_url, played.queues()) == []


def still_there(url: str, queues: list[str]) -> list[str]:
    """Return those of the queues, their dead letters' and their exchanges that a broker still has."""
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


def test_the_blocking_caller_gets_the_fields_as_its_reply(played: Run) -> None:
    """The called document is shown running and then replied, with its total."""
    shown = re.findall(rf"^ +[\d.]+ s  (\w+) +{CALLED}", played.text, re.MULTILINE)
    assert shown == ["called", "running", "replied"]
    assert "30.37 + 6.08 tax (20 %) = 36.45 GBP" in played.text


@needs_proc
def test_nothing_is_left_when_it_has_ended(played: Run) -> None:
    """No process, and nothing in the scratch directory."""
    assert (played.processes(), played.left_behind()) == ({}, [])


@needs_proc
@pytest.mark.parametrize("moment", ["executor worker", "running", "called"])
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["process", "terminal"])
def test_ctrl_c_leaves_nothing_running_on_postgres(start: Starter, moment: str, to: Any) -> None:
    """SIGINT, to the demo alone or to its whole group as a terminal sends it: workers, server and scratch are gone."""
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
@pytest.mark.parametrize("moment", ["executor worker", "running", "called"])
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["process", "terminal"])
def test_ctrl_c_leaves_nothing_running_and_no_queue_at_a_broker(
    start: Starter, rabbitmq_url: str, moment: str, to: Any
) -> None:
    """SIGINT, to the demo alone or to its whole group: workers, scratch and the run's queues are gone."""
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
def test_ctrl_c_ends_the_threads_of_one_process_as_well(start: Starter, moment: str) -> None:
    """Where no broker answers too: what runs is finished, and nothing is left."""
    run = start("--transport", "celery", UNSTRACT_WIRE_BROKER=NOBODY)
    run.read_until(moment)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.text
    assert (run.processes(), run.left_behind()) == ({}, [])
    assert "Traceback" not in run.text


@needs_proc
@pytest.mark.parametrize("library", ["attrs", "rich"])
def test_ctrl_c_while_the_libraries_are_imported_ends_without_a_traceback(start: Starter, library: str) -> None:
    """Before there is anything to clear away the demo just ends, as interrupted as a shell expects: by SIGINT."""
    run = start(stops_at=library)
    run.read_until("importing")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == -signal.SIGINT, run.text
    assert (run.text, run.processes(), run.left_behind()) == ("importing\n", {}, [])


def test_a_missing_callback_worker_is_counted_as_missing(start: Starter, where: Where) -> None:
    """Every output is missed by name, the queue is not empty, and the exit code says so."""
    run = start.at(where, "--without", "callback", "--deadline", "3")
    assert run.end() == 1, run.text
    assert re.findall(r"^missing: (\S+): no output was saved$", run.text, re.MULTILINE) == DISPATCHED
    assert re.search(r"^missing: queue ide_callback\w* still holds 7$", run.text, re.MULTILINE)
    assert "0 called back; 0 outputs and 0 error saved; 1 of 1 reply; 1 of 2 queues empty" in run.text


def test_a_missing_executor_is_counted_as_missing(start: Starter, where: Where) -> None:
    """Nothing is called back, nobody is answered, and the log of the workers or of their one process is shown."""
    run = start.at(where, "--without", "executor", "--deadline", "2")
    assert run.end() == 1, run.text
    assert "0 called back; 0 outputs and 0 error saved; 0 of 1 reply; 1 of 2 queues empty" in run.text
    assert "missing: the reply of the blocking dispatch: no reply from task 'execute_extraction'" in run.text
    assert re.search(r"^missing: queue celery_executor_legacy\w* still holds 8$", run.text, re.MULTILINE)
    assert f"The end of {'demo' if where.name == 'inside' else 'callback'}.log" in run.text


def test_a_worker_that_dies_is_noticed_before_the_deadline(start: Starter) -> None:
    """A killed callback worker ends the wait at once; its exit code is among what is missed."""
    run = start("--deadline", "50")
    pid = run.read_until(r"callback worker +pid (\d+)")[1]
    run.read_until("running")
    os.kill(int(pid), signal.SIGKILL)
    assert run.end() == 1, run.text
    assert "missing: the callback worker left with exit code -9" in run.text


def test_a_broker_takes_back_what_a_killed_worker_held(start: Starter, rabbitmq_url: str) -> None:
    """The documents that it ran are counted among those that wait, and its queue is deleted with them."""
    run = start.at(over_rabbitmq(rabbitmq_url), "--deadline", "50")
    pid = run.read_until(r"executor worker +pid (\d+)")[1]
    run.read_until("running")
    os.kill(int(pid), signal.SIGKILL)
    assert run.end() == 1, run.text
    assert "missing: the executor worker left with exit code -9" in run.text
    assert re.search(r"^missing: queue celery_executor_legacy\w+ still holds [78]$", run.text, re.MULTILINE)
    assert still_there(rabbitmq_url, run.queues()) == []


@pytest.mark.parametrize("options", ["", "?listen=false"], ids=["found", "told"])
def test_through_a_pgbouncer_it_is_the_same_demo(start: Starter, server_url: str, options: str) -> None:
    """In transaction mode, told of or not: everything is there in the end, and the schema is gone."""
    with private_pgbouncer(server_url) as pgbouncer:
        run = start(UNSTRACT_WIRE_URL=pgbouncer.url + options)
        assert run.end() == 0, run.text
        assert COMPLETE.fullmatch(run.text.rstrip().splitlines()[-1]), run.text
        (own,) = re.findall(r"created in schema (\w+)", run.text)
        assert own not in schemas(server_url)


def test_on_a_given_server_it_works_in_a_schema_of_its_own_and_drops_it(start: Starter, server_url: str) -> None:
    """Not even the schema that the URL names is touched."""
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
def test_a_server_that_cannot_be_used_is_one_line_without_its_password(
    start: Starter, url: str, complaint: str
) -> None:
    """Exit code 2, what is wrong on standard error, no traceback."""
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
def test_a_broker_that_is_not_understood_is_one_line_without_its_password(
    start: Starter, url: str, complaint: str
) -> None:
    """The same for the broker's URL: no fallback where somebody meant something else."""
    assert_is_refused(start("--transport", "celery", UNSTRACT_WIRE_BROKER=url), complaint)


@pytest.mark.parametrize(
    ("login", "path", "complaint"),
    [("guest:secret", "//", "ACCESS_REFUSED"), (None, "/no-such-vhost", "vhost no-such-vhost not found")],
    ids=["password", "vhost"],
)
def test_a_broker_that_lets_nobody_in_is_one_line_without_its_password(
    start: Starter, rabbitmq_url: str, login: str | None, path: str, complaint: str
) -> None:
    """It answers, so it was meant: that is no reason to play inside one process instead."""
    user, _, host = urlsplit(rabbitmq_url).netloc.rpartition("@")
    run = start("--transport", "celery", UNSTRACT_WIRE_BROKER=f"amqp://{login or user}@{host}{path}")
    assert_is_refused(run, complaint)


def assert_is_refused(run: Run, complaint: str) -> None:
    rest, errors = run.process.communicate(timeout=200)
    assert run.process.returncode == 2
    assert complaint in errors
    assert len(errors.splitlines()) == 1
    assert "secret" not in rest + errors


def test_the_help_tells_of_the_transports(start: Starter) -> None:
    """Which there are, and by what variables they are reached."""
    run = start("--help")
    assert run.end() == 0
    assert "--transport {postgres,celery}" in run.text
    assert "UNSTRACT_WIRE_BROKER" in run.text
