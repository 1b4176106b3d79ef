"""Worker processes that are killed, stopped or slow, and the other workers that take over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import supervised
from pg_tables import Tables
from postgres.support import on_one_server, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import ContinuationSpec, Delivery

pytestmark = on_one_server

LEASE = 1.5


def attempts(tables: Tables, queue: str) -> list[int]:
    return [row[0] for row in tables.rows("SELECT read_ct FROM {messages} WHERE queue_name = %s", queue)]


def test_killed_workers_message_runs_again_in_time(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """After SIGKILL in mid-task another worker runs the message, as attempt 2, within a lease and one second.

    Of three tries at the most one has to be as quick: the machine may be busy.
    """
    delays: list[float] = []
    while len(delays) < 3 and not any(delay < LEASE + 1 for delay in delays):
        delays.append(seconds_until_taken_over(postgres, tables, f"{queue}-{len(delays)}"))
    assert min(delays) < LEASE + 1, delays


def seconds_until_taken_over(postgres: PostgresTransport, tables: Tables, queue: str) -> float:
    """Kill a worker in mid-task, and see another one run its message to the end; return the seconds between the two."""
    with (
        worker(tables.url, tables.schema, queue, lease=LEASE) as first,
        worker(tables.url, tables.schema, queue, lease=LEASE) as second,
    ):
        postgres.send([message("hold", queue, "x", on_success=then("done", queue + "-cb"))])
        wait_until(lambda: first.has_said() or second.has_said(), what="the task to start")
        victim, heir = (first, second) if first.has_said() else (second, first)
        assert victim.says() == "holding x"
        victim.kill()
        killed = time.monotonic()
        assert heir.says(timeout=30) == "holding x"
        delay = time.monotonic() - killed
        assert attempts(tables, queue) == [2]
        heir.tell("go")
        wait_until(lambda: tables.count(queue) == 0, what="the second attempt to be settled")
        assert tables.count(queue + "-cb") == 1
    return delay


def test_long_task_runs_once_under_living_worker(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A living worker renews its lease, so no other worker gets its message."""
    with (
        worker(tables.url, tables.schema, queue, lease=2.5) as first,
        worker(tables.url, tables.schema, queue, lease=2.5) as second,
    ):
        postgres.send([message("sleep", queue, 7.0, on_success=then("done", queue + "-cb"))])
        wait_until(lambda: tables.count(queue) == 0, what="the task to be settled")
        assert tables.count(queue + "-cb") == 1
        said = []
        for process in (first, second):
            while process.has_said():
                said.append(process.says())
        assert said == ["sleeping", "slept"]


def test_late_settlement_of_stopped_worker_is_ignored(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """After SIGSTOP for longer than a lease, only the other worker's follow-up exists, and one WARNING is logged."""
    with worker(tables.url, tables.schema, queue, lease=0.8) as stopped:
        postgres.send([message("hold", queue, on_success=then("done", queue + "-cb"), task_id="the-dispatch")])
        assert stopped.says() == "holding"
        stopped.signal(signal.SIGSTOP)
        with worker(tables.url, tables.schema, queue, lease=60) as other:
            assert other.says() == "holding"
            assert attempts(tables, queue) == [2]
            stopped.tell("go")
            stopped.signal(signal.SIGCONT)
            assert stopped.says() == "let go"
            wait_until(lambda: any("lease_lost" in line for line in stopped.log), what="the warning")
            assert attempts(tables, queue) == [2]
            assert tables.count(queue + "-cb") == 0
            assert postgres.reply("the-dispatch") is None
            other.tell("go")
            wait_until(lambda: tables.count(queue) == 0, what="the other worker to settle")
        stopped.signal(signal.SIGTERM)
        assert stopped.wait() == 0
        assert tables.count(queue + "-cb") == 1
        warnings = [line for line in stopped.log if re.match(r"WARNING .*lease_lost", line)]
        assert len(warnings) == 1, stopped.log


def test_terminated_worker_settles_and_releases(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """On SIGTERM the running task is finished and settled, and unstarted ones are released."""
    with worker(tables.url, tables.schema, queue, lease=60) as process:
        postgres.send([message("hold", queue, "first"), message("hold", queue, "second")])
        assert process.says() == "holding first"
        process.signal(signal.SIGTERM)
        process.tell("go")
        assert process.says() == "let go first"
        assert process.wait() == 0
        rows = tables.rows("SELECT message -> 'args' ->> 0, state FROM {messages} WHERE queue_name = %s", queue)
        assert rows == [("second", "ready")]


@pytest.fixture
def url(tables: Tables, postgres: PostgresTransport) -> str:
    return f"{tables.url}?schema={tables.schema}"


def states(transport: PostgresTransport, queue: str) -> tuple[int, int, int]:
    """Return the numbers of ready, in-flight and dead messages."""
    (state,) = transport.queues([queue])
    return state.ready, state.in_flight, state.dead


def test_killed_child_is_replaced(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """After SIGKILL in mid-task another child runs the message, as attempt 2, and a new child is started."""
    with supervised.worker(
        "--processes", "2", "--lease", "1.5", url=url, directory=tmp_path, queues=[queue]
    ) as command:
        pids = command.children(2)
        postgres.send([message("hold", queue, str(tmp_path), "h", on_success=callback_into(tmp_path, queue))])
        wait_until(lambda: supervised.noted(tmp_path, "h"), what="the task to start")
        (victim,) = supervised.noted(tmp_path, "h")
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(supervised.noted(tmp_path, "h")) == 2, what="another to run it")
        assert command.event("child_died")["pid"] == str(victim)
        assert set(command.children(3)) > set(pids)
        (tmp_path / "h.go").touch()
        wait_until(lambda: supervised.noted(tmp_path, "told"), what="the callback")
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="everything to be settled")
        assert len(supervised.noted(tmp_path, "told")) == 1


def callback_into(directory: Path, queue: str) -> ContinuationSpec:
    return then("callback", queue, directory=str(directory), name="told")


def first(directory: Path) -> object:
    """Return the argument of the callback."""
    return json.loads((directory / "told.first").read_text())


def test_message_of_hung_child_runs_again(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """SIGKILL after the grace loses no message: it runs elsewhere when its lease is over."""
    postgres.send([message("hang", queue, str(tmp_path), "hung")])
    with supervised.worker(
        "--processes", "1", "--grace", "0.5", "--lease", "2", url=url, directory=tmp_path, queues=[queue]
    ) as command:
        wait_until(lambda: supervised.noted(tmp_path, "hung"), what="it to hang")
        command.signal(signal.SIGTERM)
        assert command.ends() == 137
        assert len(command.events("child_killed")) == 1
    subscription = postgres.subscribe([queue], lease=60)
    received: list[Delivery] = []

    def came() -> list[Delivery]:
        received.extend(subscription.receive(limit=1, wait=1))
        return received

    wait_until(came, what="it to come back")
    assert received[0].attempt == 2
    subscription.close()


def test_child_is_replaced_after_max_tasks(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """With --max-tasks 3 and seven messages, three processes run 3, 3 and 1, each once, without a pause."""
    postgres.send([message("mark", queue, str(tmp_path), "m") for _ in range(7)])
    with supervised.worker("--max-tasks", "3", url=url, directory=tmp_path, queues=[queue]) as command:
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="all to be settled")
        pids = command.children(3)
        assert supervised.noted(tmp_path, "m") == [pids[0]] * 3 + [pids[1]] * 3 + [pids[2]]
        assert [event["reason"] for event in command.events("child_recycled")] == ["max_tasks"] * 2
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("child_died") == []


def test_child_is_replaced_above_max_memory(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """With --max-memory the task is finished and settled; the next one runs in another process."""
    postgres.send([message("mark", queue, str(tmp_path), "before")])
    with supervised.worker("--max-memory", "300", url=url, directory=tmp_path, queues=[queue]) as command:
        wait_until(lambda: supervised.noted(tmp_path, "before"), what="a small task")
        postgres.send([message("take_memory", queue, str(tmp_path), "large", 200)])
        assert command.event("child_recycled")["reason"] == "max_memory"
        postgres.send([message("mark", queue, str(tmp_path), "after")])
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="all to be settled")
        pids = command.children(2)
        assert supervised.noted(tmp_path, "before") == supervised.noted(tmp_path, "large") == pids[:1]
        assert supervised.noted(tmp_path, "after") == pids[1:]


def test_overdue_task_is_reported_alone(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """on_error and a blocked caller get the deadline error; other tasks finish, and the child is replaced."""
    text = "DeadlineExceeded: deadline of 8 s exceeded"
    options = ("--task-deadline", "8", "--concurrency", "4", "--lease", "5")
    with supervised.worker(*options, url=url, directory=tmp_path, queues=[queue]) as command:
        command.children()
        spec = then("callback", queue, directory=str(tmp_path), name="told", callback_kwargs={})
        postgres.send([message("hang", queue, str(tmp_path), "hung", on_error=spec, task_id="the-dispatch")])
        postgres.send([message("hang", queue, str(tmp_path), "asked", reply_key="the-caller")])
        wait_until(lambda: supervised.noted(tmp_path, "asked"), what="both to hang")
        time.sleep(4)
        postgres.send([message("hold", queue, str(tmp_path), "beside")])
        wait_until(lambda: supervised.noted(tmp_path, "beside"), what="one beside them")
        command.event("task_overdue", 2)
        (tmp_path / "beside.go").touch()
        assert command.event("child_recycled")["reason"] == "overdue"
        wait_until(lambda: supervised.noted(tmp_path, "told"), what="the callback")
        assert first(tmp_path) == "the-dispatch"
        status, reply = postgres.reply("the-dispatch"), postgres.reply("the-caller", timeout=30)
        assert status is not None
        assert reply is not None
        assert (status.status, status.error) == (reply.status, reply.error) == ("failed", text)
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="everything to be settled")
        assert len(supervised.noted(tmp_path, "hung")) == len(supervised.noted(tmp_path, "asked")) == 1
        wait_until(lambda: supervised.noted(tmp_path, "beside.done"), what="what ran beside them to end")
        busy = len(command.events("task_overdue")) > 2  # so much that it was overdue itself before it was let go
        assert len(supervised.noted(tmp_path, "beside")) == 1 or busy
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("child_died") == command.events("child_killed") == []


def test_unknown_tasks_can_be_replayed(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """A worker dead-letters unknown tasks; `dead replay` sends them again, and the right worker runs them."""
    postgres.send([message("mark", queue, str(tmp_path), "m")])
    with supervised.worker(url=url, directory=tmp_path, queues=[queue], app="supervised:others") as wrong:
        wait_until(lambda: states(postgres, queue) == (0, 0, 1), what="it to be buried")
        assert "no task 'mark'" in wrong.event("message_rejected")["reason"]
    replay = [sys.executable, "-m", "unstract_core", "dead", "replay", "--queue", queue, "--all", "--url", url]
    assert subprocess.run(replay, capture_output=True, text=True, cwd=supervised.ROOT).stdout.startswith("replayed 1\n")
    with supervised.worker(url=url, directory=tmp_path, queues=[queue]):
        wait_until(lambda: supervised.noted(tmp_path, "m"), what="it to be run")
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="it to be settled")


def test_strict_worker_refuses_unknown_tasks(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """The error names the queue, at most five waiting tasks and the worker's own tasks; the queue is unchanged.

    An empty queue, and one with a single task that is known, is no reason to refuse.
    """
    strange = [message(f"strange{number}", queue) for number in range(7)]
    postgres.send(strange)
    empty = f"{queue}-empty"
    with supervised.worker(
        "--strict", url=url, directory=tmp_path, queues=[empty, queue], app="supervised:others"
    ) as command:
        assert command.ends() == 2
        (line,) = command.log
    assert f"'{queue}'" in line
    assert "(strange0, strange1, strange2, strange3, strange4 and 2 more)" in line
    assert "(something.else)" in line
    assert states(postgres, queue) == (7, 0, 0)
    postgres.send([message("mark", queue, str(tmp_path), "m")])
    with supervised.worker("--strict", url=url, directory=tmp_path, queues=[empty, queue]):
        wait_until(lambda: states(postgres, queue) == (0, 0, 7), what="the known to be run, and the others buried")
        assert supervised.noted(tmp_path, "m")
