"""Worker processes that are killed, stopped or slow, and what the others do about their messages."""

from __future__ import annotations

import re
import signal
import time

from pg_tables import Tables
from postgres.support import on_one_server, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport

pytestmark = on_one_server

LEASE = 1.5


def attempts(tables: Tables, queue: str) -> list[int]:
    return [row[0] for row in tables.rows("SELECT read_ct FROM {messages} WHERE queue_name = %s", queue)]


def test_the_message_of_a_killed_worker_runs_again_within_a_lease_and_a_second(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """SIGKILL in mid-task: another worker runs it, as attempt 2, no later than the lease and one second.

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


def test_a_task_longer_than_its_lease_is_run_once_under_a_living_worker(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """A living worker renews: nobody else gets its message, however long the task takes."""
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


def test_the_late_settlement_of_a_stopped_worker_changes_nothing(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """SIGSTOP for longer than a lease: the other worker's follow-up is the only one, and one WARNING tells of it."""
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


def test_a_terminated_worker_settles_what_it_runs_and_gives_back_the_rest(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """SIGTERM in mid-task: the task is finished and settled, what was not started is left for others."""
    with worker(tables.url, tables.schema, queue, lease=60) as process:
        postgres.send([message("hold", queue, "first"), message("hold", queue, "second")])
        assert process.says() == "holding first"
        process.signal(signal.SIGTERM)
        process.tell("go")
        assert process.says() == "let go first"
        assert process.wait() == 0
        rows = tables.rows("SELECT message -> 'args' ->> 0, state FROM {messages} WHERE queue_name = %s", queue)
        assert rows == [("second", "ready")]
