"""A queue whose tasks are started once: the errors that senders get, and the remaining rows."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from pg_tables import Tables
from postgres.support import on_one_server
from supervised import noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Reply

pytestmark = on_one_server

LOST = "WorkerLost: another worker took this task and did not end it; it may have run, and is not run again"


@pytest.fixture
def url(tables: Tables, postgres: PostgresTransport) -> str:
    return f"{tables.url}?schema={tables.schema}"


def states(transport: PostgresTransport, queue: str) -> tuple[int, int, int]:
    """Return the numbers of ready, in-flight and dead messages."""
    (state,) = transport.queues([queue])
    return state.ready, state.in_flight, state.dead


def answered(transport: PostgresTransport, key: str) -> Reply:
    reply = transport.reply(key, timeout=60)
    assert reply is not None
    return reply


def test_lost_task_is_reported_and_never_rerun(
    postgres: PostgresTransport, url: str, queue: str, tmp_path: Path
) -> None:
    """After SIGKILL, on_error and a blocked caller get `WorkerLost: ...`; each task ran once and is dead-lettered.

    A replay by an operator runs it.
    """
    spec = then("callback", queue, directory=str(tmp_path), name="told", callback_kwargs={})
    with worker(
        *("--processes", "1", "--concurrency", "3", "--lease", "1.5", "--never-rerun"),
        url=url,
        directory=tmp_path,
        queues=[queue],
    ) as command:
        (pid,) = command.children()
        postgres.send([message("hold", queue, str(tmp_path), "continued", on_error=spec, task_id="the-dispatch")])
        postgres.send([message("hold", queue, str(tmp_path), "asked", reply_key="the-caller")])
        for name in ("continued", "asked"):
            wait_until(lambda name=name: noted(tmp_path, name), what="both to run")  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        for key in ("the-dispatch", "the-caller"):
            reply = answered(postgres, key)
            assert (reply.status, reply.error) == ("failed", LOST)
        wait_until(lambda: noted(tmp_path, "told"), what="the callback")
        assert json.loads((tmp_path / "told.first").read_text()) == "the-dispatch"
        wait_until(lambda: states(postgres, queue) == (0, 0, 2), what="both to be buried")
        assert len(noted(tmp_path, "continued")) == len(noted(tmp_path, "asked")) == len(noted(tmp_path, "told")) == 1
        assert {letter.reason for letter in postgres.dead.find(queue=queue)} == {LOST}
        for name in ("continued", "asked"):
            (tmp_path / f"{name}.go").touch()
        postgres.dead.replay(queue=queue)
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="them to be run after all")
        assert len(noted(tmp_path, "continued")) == len(noted(tmp_path, "asked")) == 2


@pytest.mark.parametrize(
    ("task", "error"), [("fail", "ValueError: it failed"), ("ask_again", "RetryLater: asked to be run again in 0 s")]
)
def test_never_rerun_tasks_start_once(
    postgres: PostgresTransport, url: str, queue: str, tmp_path: Path, task: str, error: str
) -> None:
    """A task that raises without a waiting sender, or asks for a retry, is not started again."""
    postgres.send([message(task, queue, str(tmp_path), "alone"), message("mark", queue, str(tmp_path), "next")])
    postgres.send([message(task, queue, str(tmp_path), "asked", reply_key="the-caller")])
    with worker("--never-rerun", "--max-attempts", "9", url=url, directory=tmp_path, queues=[queue]) as command:
        assert answered(postgres, "the-caller").error == error
        wait_until(lambda: states(postgres, queue) == (0, 0, 1), what="one to be buried, and the others done")
        assert len(noted(tmp_path, "alone")) == len(noted(tmp_path, "asked")) == len(noted(tmp_path, "next")) == 1
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
    (letter,) = postgres.dead.find(queue=queue)
    assert (letter.reason, letter.attempts) == (error, 1)


def test_orderly_stop_loses_nothing(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """On SIGTERM running tasks finish; claimed and unstarted ones are released, uncounted, and run later.

    The child may receive the signal late and start another task first, so the test lets each task end.
    """
    names = [f"h{number}" for number in range(4)]
    options = ("--processes", "1", "--never-rerun", "--lease", "2")
    postgres.send([message("hold", queue, str(tmp_path), name) for name in names])
    with worker(*options, "--concurrency", "2", url=url, directory=tmp_path, queues=[queue]) as command:
        wait_until(lambda: noted(tmp_path, "h0") and noted(tmp_path, "h1"), what="two to run")
        command.signal(signal.SIGTERM)
        command.event("supervisor_stopping")
        for name in names:
            (tmp_path / f"{name}.go").touch()
        assert command.ends() == 0
        done = sum(len(noted(tmp_path, f"{name}.done")) for name in names)
        assert (done >= 2, states(postgres, queue)) == (True, (4 - done, 0, 0))
    with worker(*options, url=url, directory=tmp_path, queues=[queue]):
        wait_until(lambda: states(postgres, queue) == (0, 0, 0), what="the others to be run")
    assert [len(noted(tmp_path, f"{name}.done")) for name in names] == [1, 1, 1, 1]


def test_recycling_loses_nothing(postgres: PostgresTransport, url: str, queue: str, tmp_path: Path) -> None:
    """Children that are replaced release their messages: every task runs, and none runs twice."""
    names = [f"m{number}" for number in range(12)]
    postgres.send([message("mark", queue, str(tmp_path), name) for name in names])
    options = ("--processes", "2", "--concurrency", "2", "--max-tasks", "2", "--never-rerun")
    with worker(*options, url=url, directory=tmp_path, queues=[queue]) as command:
        wait_until(lambda: states(postgres, queue)[:2] == (0, 0), timeout=120, what="all to be settled")
        assert [len(noted(tmp_path, name)) for name in names] == [1] * len(names)
        assert states(postgres, queue) == (0, 0, 0)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("child_died") == []
