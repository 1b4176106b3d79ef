"""A supervised worker: starts, restarts, signals, and the log and health of its children."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervised import ROOT, SIGNALLED_WHILE_FINALIZING, ask, gone, lives, noted, worker

from contract_tests.kit import wait_until
from transports.memory import MemoryTransport
from unstract_core import Consumer, Delivery
from unstract_core.cli.supervisor.backoff import LONGEST_PAUSE, LOOPING, Backoff
from unstract_core.cli.supervisor.child import Parent
from unstract_core.cli.supervisor.heartbeat import Heartbeat
from unstract_core.cli.supervisor.protocol import ChildReport, Role
from unstract_core.cli.supervisor.recycle_limits import RecycleLimits
from unstract_core.cli.supervisor.worker_process import WorkerProcess
from unstract_core.observability.observer import Turn

HTTP = ("--http", "127.0.0.1:0")


def members(group: int) -> str:
    """Return the processes of a process group; "" if it has none."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,pid="], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if line.split()[0] == str(group))


def go(directory: Path, name: str = "held") -> None:
    (directory / f"{name}.go").touch()


@given(st.lists(st.floats(0, 59.9), max_size=12))
def test_each_death_doubles_the_restart_pause(lives: list[float]) -> None:
    """A child that dies young is restarted after 1 s, then 2 s, and so on to 60 s; the fifth death is a crash loop."""
    backoff = Backoff()
    pauses = [backoff.note_death(lived) for lived in lives]
    assert pauses == [min(2.0**number, LONGEST_PAUSE) for number in range(len(lives))]
    assert backoff.looping == (len(lives) >= LOOPING)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_a_minute_at_work_ends_a_crash_loop(lives: list[float]) -> None:
    """A minute at work ends the row of deaths, and five minutes reset the pause."""
    backoff, in_a_row, since = Backoff(), 0, 0
    for lived in lives:
        in_a_row = 1 if lived >= 60 else in_a_row + 1
        since = 1 if lived >= 300 else since + 1
        assert backoff.note_death(lived) == min(2.0 ** (since - 1), LONGEST_PAUSE)
        assert (backoff.deaths, backoff.looping) == (in_a_row, in_a_row >= LOOPING)


def test_each_slot_has_a_child_and_all_stop(tmp_path: Path) -> None:
    """--processes 3 starts three processes; on SIGTERM each finishes its task, and the exit code is 0."""
    with worker("--processes", "3", *HTTP, url="supervised:holding", directory=tmp_path) as command:
        pids = command.children(3)
        assert len({*pids, command.process.pid}) == 4
        wait_until(lambda: len(noted(tmp_path, "held")) == 3, what="each to run its task")
        health = command.health()
        assert health["status"] == "ok"
        shown = [(str(child["slot"]), child["state"], str(child["pid"])) for child in health["children"]]
        assert shown == sorted((event["slot"], "running", event["pid"]) for event in command.events("child_started"))
        command.signal(signal.SIGTERM)
        wait_until(lambda: not command.healthy(), what="it to say that it stops")
        assert "the worker stops" in command.health()["reasons"]
        go(tmp_path)
        assert command.ends() == 0
        assert sorted(noted(tmp_path, "held.done")) == sorted(pids)
        assert not any(map(lives, pids))
        wait_until(lambda: not any(map(members, pids)), what="nothing of the children's groups to be left")
        assert command.events("child_died") == command.events("child_killed") == []
        assert command.events("supervisor_stopped")[0]["killed"] == "0"


def test_a_dead_child_is_replaced_after_a_pause(tmp_path: Path) -> None:
    """A killed child is logged with its signal and the pause, and /healthz is 503 until another one runs."""
    with worker("--processes", "2", *HTTP, url="memory://", directory=tmp_path) as command:
        command.children(2)
        (first,) = [int(event["pid"]) for event in command.events("child_started") if event["slot"] == "1"]
        assert command.healthy()
        for number, pause in enumerate(("1.0", "2.0"), start=1):
            os.kill(first, signal.SIGKILL)
            died = command.event("child_died", number)
            assert (died["slot"], died["pid"], died["exit"]) == ("1", str(first), "SIGKILL")
            assert died["restart_in"] == pause
            status, body = command.asks("/healthz")
            assert status == 503 or len(command.events("child_started")) == 2 + number, body
            first = command.children(2 + number)[-1]
            wait_until(command.healthy, what="it to be well again")
        slots = [event["slot"] for event in command.events("child_started")]
        assert (sorted(slots[:2]), slots[2:]) == (["1", "2"], ["1", "1"])
        command.signal(signal.SIGINT)
        assert command.ends() == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param({"app": "supervised:nothing"}, "has no 'nothing'", id="app"),
        pytest.param({"url": "nosuch://host"}, "no transport for nosuch:// URLs", id="url"),
        pytest.param({"url": ""}, "no transport: give --url", id="no-url"),
        pytest.param({"more": ["--max-memory", "1"]}, "--max-memory 1: the worker has taken", id="memory"),
        pytest.param({"more": ["--strict"], "app": "supervised:others"}, "--strict: none of the tasks", id="strict"),
        pytest.param({"more": ["--never-rerun", "--prefetch", "9"]}, "leave prefetch out", id="settings"),
    ],
)
def test_a_wrong_start_ends_the_supervisor(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    """If no child can work, the exit code is 2, and the error is printed once."""
    options = {"url": "supervised:hanging", **arguments}
    more = options.pop("more", ())
    with worker("--processes", "3", *more, directory=tmp_path, **options) as command:
        assert command.ends() == 2
    (line,) = [line for line in command.log if " INFO " not in line]
    assert line.startswith("unstract-wire: ")
    assert text in line


def test_a_later_start_error_is_a_crash(tmp_path: Path) -> None:
    """After one child has started, a child that exits with 2 is restarted, so that a deployment can be fixed."""
    app = tmp_path / "deployed.py"
    app.write_text("tasks = {'t': print}\n")
    with worker("--processes", "1", url="memory://", directory=tmp_path, app="deployed:tasks") as command:
        (pid,) = command.children()
        app.write_text("raise RuntimeError('a broken image, of another size')\n")
        os.kill(pid, signal.SIGKILL)
        assert command.event("child_died", 2)["exit"] == "2"
        app.write_text("tasks = {'t': print}\n")
        command.children(2)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_a_replacement_child_waits_out_an_outage(tmp_path: Path) -> None:
    """A child that replaces another one waits for an unavailable transport, without a crash loop."""
    with worker("--processes", "1", *HTTP, url="supervised:away", directory=tmp_path) as command:
        (pid,) = command.children()
        (tmp_path / "away").touch()
        os.kill(pid, signal.SIGKILL)
        assert "no answer" in command.event("transport_away")["error"]
        wait_until(lambda: command.health()["children"][0]["away"], what="it to say that it waits")
        assert command.healthy()
        (tmp_path / "away").unlink()
        command.children(2)
        os.kill(command.children(2)[-1], signal.SIGKILL)
        (tmp_path / "away").touch()
        command.event("transport_away", 2)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert [event["exit"] for event in command.events("child_died")] == ["SIGKILL"] * 2
    with worker("--processes", "1", url="supervised:away", directory=tmp_path) as command:
        assert command.ends() == 2
        assert "no answer" in command.log[-1] or "no answer" in command.log[-2]


@pytest.mark.slow(reason="It waits for the pauses between five deaths: half a minute.")
def test_a_crash_loop_is_logged_and_unhealthy(tmp_path: Path) -> None:
    """The fifth death in a row is one ERROR, and /healthz is 503 although a child may be starting."""
    with worker("--processes", "1", *HTTP, url="supervised:dying", directory=tmp_path) as command:
        command.children()
        (tmp_path / "die").touch()
        looping = command.event("crash_loop")
        assert (looping["slot"], looping["deaths"], looping["exit"]) == ("1", "5", "3")
        assert [event["restart_in"] for event in command.events("child_died")] == ["1.0", "2.0", "4.0", "8.0", "16.0"]
        assert any(" ERROR " in line and "wire.crash_loop" in line for line in command.log)
        (tmp_path / "die").unlink()
        command.event("child_started", 6)
        status, body = command.asks("/healthz")
        assert status == 503
        assert "child 1 has died 5 times in a row" in body
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_children_are_killed_after_the_grace_period(tmp_path: Path) -> None:
    """After --grace seconds, which all children share, each is killed with a WARNING, and the exit code is 137."""
    with worker("--processes", "2", "--grace", "1", url="supervised:hanging", directory=tmp_path) as command:
        pids = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "hung")) == 2, what="both to hang")
        command.signal(signal.SIGTERM)
        assert command.ends() == 128 + signal.SIGKILL
        assert sorted(int(event["pid"]) for event in command.events("child_killed")) == sorted(pids)
        assert not any(map(lives, pids))


def test_a_waiting_supervisor_uses_no_processor_time(tmp_path: Path) -> None:
    """The supervisor sleeps while one child finishes and another slot is empty."""
    with worker("--processes", "2", url="supervised:holding", directory=tmp_path) as command:
        first, _ = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "held")) == 2, what="both to run")
        os.kill(first, signal.SIGKILL)
        command.event("child_died")
        command.signal(signal.SIGTERM)
        command.event("supervisor_stopping")
        before = processor_seconds(command.process.pid)
        time.sleep(6)
        assert processor_seconds(command.process.pid) - before <= 1
        go(tmp_path)
        assert command.ends() == 0


def processor_seconds(pid: int) -> int:
    """Return the whole seconds of processor time that a process has used."""
    used = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    minutes, seconds = used.strip().split(":")[-2:]
    return 60 * int(minutes) + int(float(seconds))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_all_children(tmp_path: Path, number: signal.Signals) -> None:
    """The exit code is 128 + the signal number, and no child is left, for any grace period."""
    with worker("--processes", "2", "--grace", "600", url="supervised:hanging", directory=tmp_path) as command:
        pids = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "hung")) == 2, what="both to hang")
        command.signal(number)
        assert command.event("supervisor_stopping")["signal"] == number.name
        command.signal(number)
        assert command.ends() == 128 + number
        assert not any(map(lives, pids))


def test_ctrl_c_reaches_the_supervisor_alone(tmp_path: Path) -> None:
    """At SIGINT to the whole process group, as a terminal sends it, children finish their tasks."""
    with worker("--processes", "2", url="supervised:holding", directory=tmp_path, start_new_session=True) as command:
        pids = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "held")) == 2, what="both to run")
        os.killpg(command.process.pid, signal.SIGINT)
        command.event("supervisor_stopping")
        time.sleep(1)  # in which a child that took it for a second signal would leave
        assert all(map(lives, pids))
        go(tmp_path)
        assert command.ends() == 0
        assert sorted(noted(tmp_path, "held.done")) == sorted(pids)
        assert len(command.events("worker_stopped")) == 2


def test_children_of_a_killed_supervisor_finish_and_exit(tmp_path: Path) -> None:
    """After SIGKILL of the supervisor, children finish their running tasks and exit."""
    with worker("--processes", "2", url="supervised:holding", directory=tmp_path) as command:
        pids = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "held")) == 2, what="both to run")
        command.process.kill()
        command.process.wait()
        assert all(map(lives, pids))
        go(tmp_path)
        gone(*pids)
        assert sorted(noted(tmp_path, "held.done")) == sorted(pids)


def test_a_hanging_child_of_a_killed_supervisor_exits(tmp_path: Path) -> None:
    """A child whose supervisor was killed exits after the grace period, although its task hangs."""
    with worker("--processes", "1", "--grace", "1", url="supervised:hanging", directory=tmp_path) as command:
        (pid,) = command.children()
        wait_until(lambda: noted(tmp_path, "hung"), what="it to hang")
        command.process.kill()
        gone(pid)


def test_a_silent_child_is_logged_and_not_killed(tmp_path: Path) -> None:
    """A stopped child is one ERROR and makes /healthz 503; when it continues, that is logged, too."""
    before = "import unstract_core.cli.commands.worker as w; w._MIN_SILENCE = 3.0"
    with worker(
        "--processes", "1", "--lease", "1", *HTTP, url="memory://", directory=tmp_path, before=before
    ) as command:
        (pid,) = command.children()
        os.kill(pid, signal.SIGSTOP)
        assert command.event("child_silent")["pid"] == str(pid)
        status, body = command.asks("/healthz")
        assert status == 503
        assert "child 1 has not been heard of for" in body
        os.kill(pid, signal.SIGCONT)
        command.event("child_heard_again")
        wait_until(command.healthy, what="it to be well again")
        assert command.health()["children"][0]["pid"] == pid
        assert len(command.events("child_silent")) == 1
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_a_signal_during_a_replacement_is_the_first(tmp_path: Path) -> None:
    """A child that is being replaced finishes its running task when SIGTERM comes."""
    options = ("--processes", "1", "--concurrency", "2", "--max-tasks", "1")
    with worker(*options, url="supervised:recycling", directory=tmp_path) as command:
        (pid,) = command.children()
        wait_until(lambda: noted(tmp_path, "held") and noted(tmp_path, "marked"), what="one to be done")
        time.sleep(0.5)  # in which the child begins to end
        command.signal(signal.SIGTERM)
        command.event("supervisor_stopping")
        time.sleep(0.5)  # in which it would leave at once
        go(tmp_path)
        assert command.ends() == 0
        assert pid in noted(tmp_path, "held.done")  # beside the next child, which has the same messages


@pytest.mark.parametrize("first", ["parent", "children"])
def test_a_signal_to_every_process_counts_once(tmp_path: Path, first: str) -> None:
    """A signal to the supervisor and to each child, as service managers send it, stops no task early."""
    with worker("--processes", "3", url="supervised:holding", directory=tmp_path) as command:
        pids = command.children(3)
        wait_until(lambda: len(noted(tmp_path, "held")) == 3, what="each to run its task")
        processes = [command.process.pid, *pids]
        for pid in processes if first == "parent" else reversed(processes):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
        command.event("supervisor_stopping")
        time.sleep(0.5)  # in which they would leave at once
        go(tmp_path)
        assert command.ends() == 0
        assert sorted(noted(tmp_path, "held.done")) == sorted(pids)


def test_a_death_during_the_stop_exits_with_1(tmp_path: Path) -> None:
    """A child that dies while the worker stops is a WARNING, and the exit code is 1."""
    with worker("--processes", "2", url="supervised:holding", directory=tmp_path) as command:
        pids = command.children(2)
        wait_until(lambda: len(noted(tmp_path, "held")) == 2, what="each to run its task")
        command.signal(signal.SIGTERM)
        command.event("supervisor_stopping")
        os.kill(pids[0], signal.SIGKILL)
        died = command.event("child_died")
        assert (died["pid"], died["exit"]) == (str(pids[0]), "SIGKILL")
        go(tmp_path)
        assert command.ends() == 1
        assert noted(tmp_path, "held.done") == pids[1:]


def test_a_leftover_thread_delays_no_replacement(tmp_path: Path) -> None:
    """A thread that a task has left behind delays the exit of a replaced child by some seconds only."""
    with worker("--processes", "1", "--max-tasks", "1", url="supervised:held_up", directory=tmp_path) as command:
        (first,) = command.children()
        assert command.event("exit_held_up")["pid"] == str(first)
        assert command.event("child_recycled")["pid"] == str(first)
        assert len(command.children(2)) >= 2
        command.signal(signal.SIGTERM)
        command.ends()


IN_A_LARGE_PROGRAM = """
import subprocess, sys
large = bytearray(b"x") * (400 << 20)
code = "from unstract_core.cli.supervisor.recycle_limits import peak_memory; print(peak_memory() >> 20)"
subprocess.run([sys.executable, "-c", code], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems report no peak memory of one program")
def test_the_memory_of_the_parent_does_not_count(tmp_path: Path) -> None:
    """The peak memory of a child does not include that of the process that started it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    output = subprocess.run(
        [sys.executable, "-c", IN_A_LARGE_PROGRAM], check=True, capture_output=True, text=True, env=env
    ).stdout
    assert 5 < int(output) < 200


WITH_MANY_FILES = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
"""
"""A supervisor that has more than 1,024 files open, as one may have that has run for long."""


@pytest.mark.parametrize(
    "how", ["killed", "overdue", "abandoned", "abandoned overdue", "exits", "both killed", "both killed, many files"]
)
def test_programs_of_tasks_end_with_their_child(tmp_path: Path, how: str) -> None:
    """If a child dies, is overdue or is abandoned, the programs that its tasks have started are killed."""
    options = ["--task-deadline", "2"] if "overdue" in how else []
    options += ["--grace", "1" if how == "abandoned" else "30"] if "abandoned" in how else []
    before = WITH_MANY_FILES if how == "both killed, many files" else ""
    with worker("--processes", "1", *options, url="supervised:starting", directory=tmp_path, before=before) as command:
        (child,) = command.children()
        wait_until(lambda: noted(tmp_path, "program"), what="the program")
        (program,) = noted(tmp_path, "program")
        if "abandoned" in how:
            command.process.kill()
        elif "both killed" in how:
            os.kill(command.process.pid, signal.SIGSTOP)  # it sees neither the end of the child nor its own
            os.kill(child, signal.SIGKILL)
            command.process.kill()
        elif how == "exits":
            go(tmp_path, "program")
            command.event("child_died")
        elif how == "killed":
            os.kill(child, signal.SIGKILL)
            command.event("child_died")
        else:
            command.event("child_recycled")
        gone(program)
        command.signal(signal.SIGTERM)
        command.signal(signal.SIGTERM)
        command.ends()


ORPHAN = """
import ctypes, subprocess
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans fall to it as to the first of a container
subprocess.run(["sh", "-c", "sleep 1 & echo $! > orphan"], start_new_session=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to make a process the parent of its orphans")
def test_the_supervisor_reaps_orphans(tmp_path: Path) -> None:
    """As process 1 of a container the supervisor reaps orphans, and still notices the exits of its children."""
    with worker("--processes", "1", url="memory://", directory=tmp_path, before=ORPHAN) as command:
        (child,) = command.children()
        (orphan,) = noted(tmp_path, "orphan")
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), what="the orphan to be no zombie either")
        os.kill(child, signal.SIGKILL)
        assert command.event("child_died")["exit"] == "SIGKILL"
        command.children(2)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_programs_of_tasks_see_no_supervision(tmp_path: Path) -> None:
    """A task's program is no child of the supervisor, and the arguments of a child contain no URL."""
    with worker("--processes", "1", url="supervised:looking", directory=tmp_path) as command:
        (pid,) = command.children()
        wait_until(lambda: noted(tmp_path, "looked"), what="the task")
        assert "UNSTRACT_WIRE_CHILD" not in (tmp_path / "looked.env").read_text()
        arguments = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
        assert "--app supervised:tasks" in arguments
        assert "supervised:looking" not in arguments
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_two_supervisors_on_one_port_both_work(tmp_path: Path) -> None:
    """The second supervisor logs one WARNING, and runs its tasks."""
    with worker("--processes", "1", *HTTP, url="memory://", directory=tmp_path) as first:
        address = first.event("http_listening")["address"]
        first.children()
        with worker("--processes", "1", "--http", address, url="supervised:holding", directory=tmp_path) as second:
            taken = second.event("http_port_taken")
            assert taken["address"] == address
            go(tmp_path)
            wait_until(lambda: noted(tmp_path, "held.done"), what="its task")
            second.signal(signal.SIGTERM)
            assert second.ends() == 0
            assert len(second.events("http_port_taken")) == 1
        assert ask(address, "/healthz")[0] == 200


def test_only_options_that_need_it_start_a_supervisor(tmp_path: Path) -> None:
    """A plain worker is one process; options that need a restart start a supervisor with one child."""
    with worker(url="supervised:holding", directory=tmp_path) as plain:
        assert plain.event("worker_started")["pid"] == str(plain.process.pid)
    for option in ("--max-tasks", "--max-memory", "--task-deadline", "--grace"):
        with worker(option, "5000", url="memory://", directory=tmp_path) as command:
            assert command.children()[0] != command.process.pid
            command.signal(signal.SIGTERM)
            assert command.ends() == 0


TERMINATED = f"""{SIGNALLED_WHILE_FINALIZING}
signalled_while_finalizing(signal.SIGTERM)
tasks = dict(t=print)
"""


def test_sigterm_during_a_finalizer_stops_the_start(tmp_path: Path) -> None:
    """SIGTERM while the import finalizes an object, which discards exceptions, still ends the worker."""
    (tmp_path / "dropping.py").write_text(TERMINATED)
    with worker(url="memory://", app="dropping:tasks", directory=tmp_path, path=tmp_path) as command:
        assert command.ends() == 128 + signal.SIGTERM
        assert command.events("worker_started") == []


@pytest.mark.parametrize("first", [{"ran": 1}, {"ran": 1, "overdue": 1}, {"overdue": 1}], ids=str)
def test_an_overdue_task_is_always_reported(first: dict[str, int]) -> None:
    """The supervisor gets the report of an overdue task also after another report."""
    life, reports = os.pipe(), os.pipe()
    consumer = Consumer(MemoryTransport(), {"t": print}, ["q"])
    observer = Heartbeat(Parent(life[0], reports[1], first=True), RecycleLimits(max_tasks=1))
    observer.attach(consumer)
    slot = WorkerProcess(1, reports=reports[0])
    os.set_blocking(reports[0], False)
    delivery, turn = Delivery("1", "q", 1, None, ""), Turn(held=0, running=0, away=False)
    for counted in (first, {"ran": 1, "overdue": 1}):
        consumer.counters.update(counted)
        observer.ran(delivery, "raised", None, 0.0, 0)
        observer.turned(turn)
    reported = [report for report in slot.read_reports() if report.ends_child]
    assert reported == ([ChildReport.MAX_TASKS] if "overdue" not in first else []) + [ChildReport.OVERDUE]
    for end in (*life, *reports):
        os.close(end)


@pytest.mark.parametrize("left", range(8))
def test_a_failed_start_leaves_no_file_open(left: int) -> None:
    """However few files the supervisor can open, a failed start closes those that it has opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, taken, slot = os.listdir("/dev/fd"), [], WorkerProcess(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(taken.pop())
        with pytest.raises(OSError, match="Too many open files"):
            slot.start([sys.executable, "-c", ""], {}, Role(first=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for end in taken:
            os.close(end)
    assert os.listdir("/dev/fd") == before
    assert (slot.process, slot.reports, slot.orders, slot.guard) == (None, -1, -1, -1)


def test_an_unknown_report_is_ignored() -> None:
    """A byte that a task writes to the report pipe is ignored."""
    slot = WorkerProcess(1)
    slot.reports, theirs = os.pipe()
    os.set_blocking(slot.reports, False)
    os.write(theirs, b"aZs")
    assert list(slot.read_reports()) == [ChildReport.ALIVE, ChildReport.STARTED]
    os.close(theirs)
    slot.close()
