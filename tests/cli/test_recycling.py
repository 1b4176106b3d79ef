"""Replacement of children at a limit: the next child is ready before the old one ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from supervised import Command, noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Delivery
from unstract_core.cli.supervisor import health, heartbeat, pool, recycle_limits, worker_process
from unstract_core.cli.supervisor import supervisor as supervisors
from unstract_core.cli.supervisor.child import Parent
from unstract_core.cli.supervisor.heartbeat import Heartbeat
from unstract_core.cli.supervisor.protocol import VARIABLE, ChildReport, Role
from unstract_core.cli.supervisor.recycle_limits import RecycleLimits
from unstract_core.cli.supervisor.supervisor import Supervisor
from unstract_core.cli.supervisor.worker_process import WorkerProcess
from unstract_core.observability.observer import Turn

HTTP = ("--http", "127.0.0.1:0")


@pytest.fixture(name="database")
def database_(embedded_url: str) -> Iterator[tuple[str, PostgresTransport]]:
    with (
        servers.fresh_schema(embedded_url) as schema,
        contextlib.closing(PostgresTransport(embedded_url, schema)) as transport,
    ):
        transport.migrate()
        yield f"{embedded_url}?schema={schema}", transport


class Child:
    """A simulated child process: it writes to the real pipes, and exits when the test calls `end`."""

    def __init__(self, pid: int, variable: str) -> None:
        _, reports, _, _, role = variable.split(",", 4)
        self.pid, self.role = pid, Role.of(role)
        self.status: int | None = None
        self.leaves = False
        self._reports = os.dup(int(reports))

    def poll(self) -> int | None:
        return self.status

    def tell(self, *reports: ChildReport) -> None:
        for report in reports:
            self.leaves = self.leaves or report.ends_child
            os.write(self._reports, report.value)

    def end(self, status: int = 0) -> None:
        if self.status is None:
            self.status = status
            os.close(self._reports)


class Simulated(Supervisor):
    """A supervisor with simulated children and a simulated clock."""

    def __init__(self, processes: int = 1) -> None:
        super().__init__(["a command"], {}, processes=processes, grace=25, silence_limit=60)
        self.now = 1000.0
        self.all: list[Child] = []

    @contextlib.contextmanager
    def simulated(self) -> Iterator[Simulated]:
        """Replace the clock and the start of processes. No process is signalled, as none exists."""

        def start(command: Sequence[str], env: Mapping[str, str], **_: Any) -> Child:
            self.all.append(Child(2**30 + len(self.all), env[VARIABLE]))
            return self.all[-1]

        with pytest.MonkeyPatch.context() as patch:
            clock = SimpleNamespace(monotonic=lambda: self.now)
            for module in (health, pool, supervisors, worker_process):
                patch.setattr(module, "time", clock)
            patch.setattr(worker_process, "subprocess", SimpleNamespace(Popen=start))
            patch.setattr(supervisors, "reap_orphans", lambda children: None)
            try:
                self.step()
                yield self
            finally:
                for child in self.all:
                    child.end()
                for slot in self.children:
                    slot.close()

    def step(self, seconds: float = 0.0) -> None:
        """Advance the clock, and run one iteration of the supervisor without waiting."""
        self.now += seconds
        self._reap()
        self._check_children()
        self._start_due_children()

    @property
    def children(self) -> list[WorkerProcess]:
        return self._pool.all()

    @property
    def active(self) -> list[WorkerProcess]:
        return self._pool.active

    @property
    def living(self) -> list[Child]:
        return [child for child in self.all if child.status is None]


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """Return the fields of each event of this name."""
    return [vars(record) for record in caplog.records if getattr(record, "wire.event", "") == event]


MOVES = st.lists(
    st.tuples(
        st.sampled_from([*ChildReport, 0, 1, -signal.SIGKILL, "time passes"]),
        st.integers(0, 9),
    ),
    max_size=40,
)


@given(st.integers(1, 2), MOVES)
def test_a_slot_has_at_most_two_processes(processes: int, moves: list[tuple[ChildReport | int | str, int]]) -> None:
    """For every order of reports and exits a slot has at most two processes, and in the end one that works."""
    with Simulated(processes).simulated() as supervisor:
        for move, index in moves:
            if not supervisor.living:
                supervisor.step(60)
            child = supervisor.living[index % len(supervisor.living)]
            if isinstance(move, ChildReport):
                child.tell(move)
            elif isinstance(move, int):
                child.end(move)
            supervisor.step(60 * index if move == "time passes" else 0)
            for _ in range(3):
                supervisor.step()
            places = Counter(slot.number for slot in supervisor.children if slot.process is not None)
            assert max(places.values(), default=0) <= 2
        for child in supervisor.living:
            if child.leaves:
                child.end()
        supervisor.step()
        supervisor.step(60)
        working = {slot.number for slot in supervisor.active if slot.process is not None and slot.leave_reason is None}
        assert working == set(range(1, processes + 1))


def deaths(supervisor: Simulated, count: int, *reports: ChildReport) -> list[float]:
    """Let the newest child report and die `count` times; return the seconds until each next start."""
    pauses = []
    for _ in range(count):
        supervisor.living[-1].tell(*reports)
        supervisor.step()
        started, died_at = len(supervisor.all), supervisor.now
        supervisor.living[-1].end(1)
        supervisor.step()
        while len(supervisor.all) == started:
            for child in supervisor.living:
                child.tell(ChildReport.ALIVE)
            supervisor.step(1)
        pauses.append(supervisor.now - died_at)
    return pauses


def test_a_crashing_spare_child_is_backed_off(caplog: pytest.LogCaptureFixture) -> None:
    """A spare child that dies at import is restarted after growing pauses, and its crash loop is logged."""
    caplog.set_level("INFO")
    with Simulated().simulated() as supervisor:
        child = supervisor.all[0]
        child.tell(ChildReport.STARTED)
        supervisor.step()
        supervisor.step(1000)
        child.tell(ChildReport.LIMIT_NEAR)
        supervisor.step()
        supervisor.step()
        assert [child.role.spare for child in supervisor.living] == [False, True]
        assert deaths(supervisor, 6) == [1, 2, 4, 8, 16, 32]
        assert all(record["wire.spare"] for record in logged(caplog, "child_died"))
        (looping,) = logged(caplog, "crash_loop")
        assert (looping["wire.deaths"], looping["wire.spare"]) == (5, True)
        assert supervisor.health().reasons == ["the spare of child 1 has died 6 times in a row"]
        assert [child["deaths"] for child in supervisor.health().details["children"]] == [0, 6]
        supervisor.living[-1].tell(ChildReport.READY)
        supervisor.step()
        assert logged(caplog, "crash_loop_over") == []
        child.tell(ChildReport.ALIVE)
        supervisor.step(60)
        assert len(logged(caplog, "crash_loop_over")) == 1
        child.tell(ChildReport.ALIVE)
        supervisor.living[-1].tell(ChildReport.ALIVE)
        supervisor.step()
        assert supervisor.health().reasons == []


def test_a_spares_crash_loop_survives_its_take_over(caplog: pytest.LogCaptureFixture) -> None:
    """The slot keeps the pause and the deaths of its spare child."""
    with Simulated().simulated() as supervisor:
        child = supervisor.all[0]
        child.tell(ChildReport.STARTED, ChildReport.LIMIT_NEAR)
        supervisor.step()
        supervisor.step()
        deaths(supervisor, 4)
        supervisor.living[-1].end(1)
        supervisor.step()
        child.tell(ChildReport.MAX_TASKS)
        supervisor.step()
        child.end()
        supervisor.step()
        assert supervisor.living == []
        assert "child 1 has died 5 times in a row" in supervisor.health().reasons
        supervisor.step(16)
        assert [child.role.spare for child in supervisor.living] == [False]


@pytest.mark.parametrize("soon", [False, True])
def test_an_ending_child_hides_no_crash_loop(caplog: pytest.LogCaptureFixture, soon: bool) -> None:
    """Neither a child that is ending nor a ready spare child ends the row of deaths of its slot."""
    with Simulated().simulated() as supervisor:
        old = supervisor.all[0]
        old.tell(ChildReport.STARTED)
        supervisor.step()
        supervisor.step(1000)
        old.tell(ChildReport.ALIVE if soon else ChildReport.MAX_TASKS)
        for _ in range(3):
            supervisor.step()
        if soon:
            for number in range(5):
                supervisor.living[-1].tell(ChildReport.STARTED, ChildReport.LIMIT_NEAR)
                supervisor.step()
                supervisor.step(32)
                supervisor.step()
                assert [child.role.spare for child in supervisor.living] == [bool(number), True]
                supervisor.living[-1].tell(ChildReport.READY)
                supervisor.step()
                supervisor.living[0].end(1)
                supervisor.step()
        else:
            assert deaths(supervisor, 5, ChildReport.STARTED) == [1, 2, 4, 8, 16]
        assert len(logged(caplog, "crash_loop")) == 1


@contextlib.contextmanager
def reporting(monkeypatch: pytest.MonkeyPatch, limits: RecycleLimits) -> Iterator[Any]:
    """Yield a function that returns the reports of a child, given its tasks, its peak memory and the time."""
    now = SimpleNamespace(moment=0.0, peak=100)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now.moment))
    for module in (heartbeat, recycle_limits):
        monkeypatch.setattr(module, "peak_memory", lambda: now.peak)
    life, (ours, theirs) = os.pipe(), os.pipe()
    os.set_blocking(ours, False)
    consumer, slot = Consumer(MemoryTransport(), {"t": print}, ["q"]), WorkerProcess(1, reports=ours)
    observer = Heartbeat(Parent(life[0], theirs, first=True), limits)
    observer.attach(consumer)

    def reports(ran: int, peak: int, moment: float) -> list[ChildReport]:
        now.moment, now.peak = moment, peak
        if ran != consumer.counters["ran"]:
            consumer.counters["ran"] = ran
            observer.ran(Delivery("1", "q", 1, None, ""), "returned", None, 0.0, 0)
        observer.turned(Turn(held=0, running=0, away=False))
        return [report for report in slot.read_reports() if report is not ChildReport.ALIVE]

    yield reports
    for end in (*life, ours, theirs):
        os.close(end)


def test_a_spare_child_stops_when_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare child stops after some minutes below the memory limit, and starts again when the peak has grown."""
    with reporting(monkeypatch, RecycleLimits(max_memory=1100)) as reports:
        assert reports(1, 899, 1) == []
        assert reports(2, 901, 10) == [ChildReport.LIMIT_NEAR]
        assert reports(3, 901, 309) == []
        assert reports(4, 901, 310) == [ChildReport.SPARE_UNNEEDED]
        assert [reports(5 + hour, 1050, 3600.0 * (1 + hour)) for hour in range(9)] == [[]] * 9
        assert reports(20, 1070, 40_000) == [ChildReport.LIMIT_NEAR]
        assert reports(20, 1099, 40_300) == []  # the limit is much nearer
        assert reports(20, 1099, 40_600) == [ChildReport.SPARE_UNNEEDED]
        assert reports(21, 1101, 40_601) == [ChildReport.MAX_MEMORY]


def test_a_spare_child_waits_for_the_last_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child near its task limit keeps its spare child for as long as the queue is empty."""
    with reporting(monkeypatch, RecycleLimits(max_tasks=100)) as reports:
        assert reports(99, 100, 1) == [ChildReport.LIMIT_NEAR]
        assert reports(99, 100, 100_000) == reports(99, 100, 200_000) == []
        assert reports(100, 100, 200_001) == [ChildReport.MAX_TASKS]


@pytest.mark.parametrize("status", [0, 128 + signal.SIGTERM, -signal.SIGTERM])
def test_an_unneeded_spare_child_stops(caplog: pytest.LogCaptureFixture, status: int) -> None:
    """The exit of an unneeded spare child is no death, and another one starts when it is needed."""
    caplog.set_level("INFO")
    with Simulated().simulated() as supervisor:
        child = supervisor.all[0]
        for asked in range(2):
            child.tell(ChildReport.STARTED, ChildReport.LIMIT_NEAR)
            supervisor.step()
            supervisor.step()
            spare = supervisor.living[-1]
            child.tell(ChildReport.SPARE_UNNEEDED)
            supervisor.step()
            assert [slot.state for slot in supervisor.children] == ["running", "recycling"]
            spare.end(status)
            supervisor.step()
            assert supervisor.living == [child]
            assert [record["wire.pid"] for record in logged(caplog, "spare_stopped")][asked:] == [spare.pid]
        assert logged(caplog, "child_died") == logged(caplog, "child_recycled") == []
        assert supervisor.health().reasons == []


def test_a_slowly_ending_child_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A long task of an ending child is one WARNING, and /healthz is 200 while the next child works."""
    with Simulated().simulated() as supervisor:
        supervisor.all[0].tell(ChildReport.STARTED, ChildReport.MAX_TASKS)
        for _ in range(3):
            supervisor.step(40)
            supervisor.living[-1].tell(ChildReport.STARTED)
            supervisor.all[0].tell(ChildReport.ALIVE)
        supervisor.step()
        assert supervisor.health().reasons == []
        assert [record["wire.pid"] for record in logged(caplog, "child_still_leaving")] == [supervisor.all[0].pid]
        leaving = [child.get("leaving") for child in supervisor.health().details["children"]]
        assert leaving == [None, 80.0]


def test_a_hanging_task_adds_at_most_one_process(tmp_path: Path) -> None:
    """Two children that cannot end get no third; /healthz says so, and the slot works again when they end."""
    before = "import unstract_core.cli.commands.worker as w; w._MIN_SILENCE = 1.5"
    options = ("--concurrency", "2", "--max-tasks", "1", "--lease", "0.5", *HTTP)
    with worker(*options, url="supervised:recycling", directory=tmp_path, before=before) as command:
        first, second = command.children(2)

        def is_reported() -> bool:
            return any("child 1 has taken no messages for" in reason for reason in command.health()["reasons"])

        wait_until(is_reported, what="the place without a worker to be reported")
        assert not command.healthy()
        assert [child["pid"] for child in command.health()["children"]] == [second, first]
        command.event("child_still_leaving", pid=str(first))
        (tmp_path / "held.go").touch()
        command.children(3)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def spare(command: Command) -> int:
    """Wait until a spare child is ready, and return its pid."""
    pids: list[int] = []

    def is_ready() -> bool:
        pids[:] = [child["pid"] for child in command.health()["children"] if child["state"] == "spare"]
        return bool(pids)

    wait_until(is_ready, timeout=60, what="a child to be ready to follow")
    return pids[0]


def test_a_spare_child_is_ready_before_the_limit(database: tuple[str, PostgresTransport], tmp_path: Path) -> None:
    """The next child has imported the app when the old one reaches its limit, and runs the next task."""
    url, transport = database

    def run(count: int) -> list[int]:
        transport.send([message("mark", "q", str(tmp_path), "m")])
        wait_until(lambda: len(noted(tmp_path, "m")) == count, what="the task")
        return noted(tmp_path, "m")

    with worker("--max-tasks", "3", *HTTP, url=url, app="recycled:tasks", directory=tmp_path) as command:
        (old,) = command.children()
        run(1)
        first = spare(command)
        assert command.healthy()
        os.kill(first, signal.SIGKILL)
        command.event("child_died")
        assert run(2) == [old, old]
        follower = spare(command)
        assert noted(tmp_path, "importing") == [old, first, follower]
        assert run(3) == [old, old, old]
        assert command.event("child_recycled")["pid"] == str(old)
        assert run(4)[-1] == follower
        last = spare(command)
        os.kill(follower, signal.SIGKILL)
        wait_until(lambda: command.children(3)[-1] == last, what="the spare child to take over")
        assert run(5)[-1] == last
        spare(command)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("child_killed") == []


def test_children_start_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All children import the app at the same time."""
    monkeypatch.setenv("RECYCLED_TOGETHER", "3")
    with worker("--processes", "3", url="memory://", app="recycled:tasks", directory=tmp_path) as command:
        assert len(set(command.children(3))) == 3
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


@given(st.integers(1, 40), st.integers(1, 10_000))
def test_first_children_reach_their_limits_at_different_times(processes: int, limit: int) -> None:
    """Each first child has between half of its limit and all of it, with different limits if there are enough tasks."""
    limits = [RecycleLimits(max_tasks=limit).for_share(number / processes).max_tasks for number in range(processes)]
    assert limits[0] == limit
    assert all(each is not None and limit / 2 <= each <= limit for each in limits)
    assert len(set(limits)) == processes or limit < 2 * processes


@given(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1))
def test_a_role_survives_its_text_form(first: bool, silent: bool, spare: bool, share: float) -> None:
    """A child reads the role that its supervisor has written."""
    role = Role(first, silent, spare, share)
    assert Role.of(str(role)) == role
