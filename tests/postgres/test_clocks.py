"""The database's clock is the only one: the wall clock of a producer, worker or caller has no effect."""

from __future__ import annotations

import ast
import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pg_tables import Tables
from postgres import wrong_clock_tasks as off
from postgres.support import Worker, on_one_server, worker
from postgres.wrong_clock import AHEAD, BEHIND, JUMPING, OFF, WrongClock, starting_wrong, tell, wrong_clock
from queues import bury

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from tools.check_lock import ROOT
from transports.postgres import PostgresTransport
from unstract_core import Reply, Settlement, Verdict
from unstract_core.transport import STATUS_TTL

LEASE = 2.5

ALLOWED = {
    "unstract_core.clock:SystemClock.now": "the one clock of the worker, for messages with an absolute time of expiry",
    "unstract_core.worker.loop:Loop._start": "it asks the worker's clock whether a message has expired",
    "unstract_core.worker.task_threads:TaskThreads._serve": "it asks the worker's clock whether a message has expired",
    "unstract_core.cli.render.snapshot:take_snapshot": "`top` shows the time",
    "unstract_core.cli.render.live_view:LiveView.run": "`top` shows the time of its last answer",
    "unstract_core.observability.metrics:Metrics.on_heartbeat": "Prometheus compares this gauge with its own clock",
    "unstract_core.observability.tracing:Tracing.settled": "spans of OpenTelemetry have absolute times",
    "transports.postgres.diagnostics.server_checks:clock": "`doctor` compares this clock with the database's",
    "transports.memory.store:Store.__init__": "the origin of its dates; it counts monotonic seconds",
}
"""The functions that may read the wall clock, with the reason. Leases, delays and times to live must not."""

CLOCK_OF_TIME = {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "clock_gettime"}
CLOCK_OF_DATETIME = {"now", "utcnow", "today"}


@pytest.fixture(scope="module", params=[AHEAD, BEHIND, JUMPING], ids=["ahead", "behind", "jumping"])
def wrong(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WrongClock]:
    """A process whose clock is wrong."""
    with wrong_clock(tmp_path_factory.mktemp("clock"), request.param) as process:
        yield process


def the(tables: Tables, expression: str, queue: str) -> float:
    """Return a number of the one message in a queue, reckoned by the database."""
    statement = "SELECT ({})::float8 FROM {{messages}} WHERE queue_name = %s"
    ((value,),) = tables.rows(statement.format(expression), queue)
    return float(value)


def test_clock_of_these_processes_is_wrong(wrong: WrongClock) -> None:
    """Both of Python's clocks are wrong by more than a day, so that the other tests prove something."""
    for _ in range(2):
        assert all(abs(shown - time.time()) > OFF - 3600 for shown in wrong(tell))


@on_one_server
@pytest.mark.parametrize(
    ("holders", "heirs"),
    [(AHEAD, BEHIND), (BEHIND, AHEAD), (JUMPING, JUMPING)],
    ids=["ahead and behind", "behind and ahead", "jumping"],
)
def test_a_lease_ends_when_the_database_says_so(
    postgres: PostgresTransport, tables: Tables, queue: str, tmp_path: Path, holders: list[float], heirs: list[float]
) -> None:
    """However wrong two workers' clocks are: a living one keeps its message, a dead one's is taken over in its time."""
    with contextlib.ExitStack() as stack:

        def at_work(offsets: list[float]) -> Worker:
            with starting_wrong(tmp_path, offsets):
                return stack.enter_context(worker(tables.url, tables.schema, queue, lease=LEASE))

        holder = at_work(holders)
        postgres.send([message("hold", queue, on_success=then("done", queue + "-cb"))])
        assert holder.says() == "holding"
        assert 0 < the(tables, "extract(epoch FROM vt - now())", queue) <= LEASE
        heir = at_work(heirs)
        subscribed = the(tables, "extract(epoch FROM now())", queue)
        wait_until(
            lambda: the(tables, "extract(epoch FROM now())", queue) > subscribed + LEASE + 0.5,
            what="a lease to pass",
        )
        assert (the(tables, "read_ct", queue), heir.has_said(), holder.log) == (1, False, [])
        holder.kill()
        until = the(tables, "extract(epoch FROM vt)", queue)
        assert heir.says(timeout=60) == "holding"
        assert the(tables, "read_ct", queue) == 2
        assert the(tables, f"extract(epoch FROM vt) - {LEASE}", queue) >= until - 0.001
        heir.tell("go")
        wait_until(lambda: tables.count(queue) == 0, what="the heir to settle")
    assert tables.count(queue + "-cb") == 1


@on_one_server
def test_delay_follows_the_database_clock(
    postgres: PostgresTransport, tables: Tables, queue: str, wrong: WrongClock
) -> None:
    """A delayed message between two processes with wrong clocks waits at least as long as requested."""
    began = tables.rows("SELECT extract(epoch FROM now())::float8")[0][0]
    wrong(off.send, tables.url, tables.schema, queue, 2.0)
    assert began <= the(tables, "extract(epoch FROM enqueued_at)", queue)
    assert 0 <= the(tables, "extract(epoch FROM now() - enqueued_at)", queue) < 600
    assert the(tables, "extract(epoch FROM vt - enqueued_at)", queue) == pytest.approx(2.0, abs=0.5)
    due = the(tables, "extract(epoch FROM vt)", queue)
    assert wrong(off.drain, tables.url, tables.schema, queue, 60.0) == 1
    assert the(tables, "extract(epoch FROM enqueued_at)", queue + "-cb") >= due
    assert the(tables, "extract(epoch FROM now() - enqueued_at)", queue + "-cb") < 600
    kept = "SELECT extract(epoch FROM expires_at - created_at)::float8, created_at <= now() FROM {results}"
    assert tables.rows(kept) == [(STATUS_TTL, True)]


@on_one_server
def test_retry_delay_follows_the_database_clock(
    postgres: PostgresTransport, tables: Tables, queue: str, wrong: WrongClock
) -> None:
    """A task that requests a retry in ten minutes waits ten minutes."""
    postgres.send([message("again", queue, 600.0)])
    assert wrong(off.drain, tables.url, tables.schema, queue, 1.0) == 1
    assert 0 < the(tables, "extract(epoch FROM vt - now())", queue) <= 600
    assert wrong(off.drain, tables.url, tables.schema, queue, 1.0) == 0


@on_one_server
def test_reply_expiry_follows_the_database_clock(
    postgres: PostgresTransport, tables: Tables, queue: str, wrong: WrongClock
) -> None:
    """A reply from a process with a wrong clock is readable until it expires by the database's clock."""
    wrong(off.give_reply, tables.url, tables.schema, queue, 3600.0)
    lasts = "SELECT extract(epoch FROM expires_at - created_at)::float8, created_at <= now() FROM {results}"
    assert tables.rows(lasts) == [(3600.0, True)]
    assert postgres.reply(queue) == Reply(queue, "completed", result="here", ttl=3600.0)
    assert wrong(off.read_reply, tables.url, tables.schema, queue) == "here"
    tables.execute("UPDATE {results} SET expires_at = now()")
    assert postgres.reply(queue) is None
    assert wrong(off.read_reply, tables.url, tables.schema, queue) is None


@on_one_server
def test_call_is_answered_with_wrong_clocks(
    postgres: PostgresTransport, tables: Tables, queue: str, wrong: WrongClock
) -> None:
    """A caller and a worker with wrong or jumping clocks lose no reply and delay none."""
    assert wrong(off.call, tables.url, tables.schema, queue) == "fine"


@on_one_server
def test_ages_follow_the_database_clock(
    postgres: PostgresTransport, tables: Tables, queue: str, wrong: WrongClock
) -> None:
    """The age of a message or dead letter is the same for every process."""
    postgres.send([message("fine", queue)])
    bury(postgres, queue)
    assert wrong(off.purge, tables.url, tables.schema, queue, 3600.0) == 0
    tables.execute("UPDATE {dead} SET buried_at = now() - interval '2 hours'")
    assert wrong(off.purge, tables.url, tables.schema, queue, 3600.0) == 1
    postgres.send([message("fine", queue)])
    tables.execute("UPDATE {messages} SET enqueued_at = now() - interval '2 hours', vt = now() - interval '2 hours'")
    age = wrong(off.age, tables.url, tables.schema, queue)
    assert age is not None
    assert 7200 <= age < 7200 + 600


def test_only_listed_functions_read_the_wall_clock() -> None:
    """In the core, the memory transport and the PostgreSQL transport, only the listed functions read the wall clock."""
    readers = set[str]()
    for package in ("unstract_core", "transports/memory", "transports/postgres"):
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            readers.update(f"{module}:{place}" for place in looks_at_the_clock(ast.parse(file.read_text())))
    assert readers == set(ALLOWED), "give a new one its reason in ALLOWED, or use the monotonic clock or the database's"


def looks_at_the_clock(tree: ast.AST, place: str = "") -> Iterator[str]:
    """Yield the name of each function, or of what encloses it, that names a function of Python's wall clock."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield from looks_at_the_clock(node, f"{place}.{name}".lstrip("."))
                continue
            case ast.Attribute(value=ast.Name(id="time"), attr=attr) if attr in CLOCK_OF_TIME:
                yield place
            case ast.Attribute(attr=attr) if attr in CLOCK_OF_DATETIME:
                yield place
            case ast.ImportFrom(module="time", names=names) if CLOCK_OF_TIME.intersection(name.name for name in names):
                yield place
        yield from looks_at_the_clock(node, place)


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndef f(): return time.time()",
        "def f():\n from time import time_ns as clock",
        "import datetime\ndef f(at=None): return datetime.datetime.now(at)",
        "from datetime import date\ndef f(): return date.today()",
        "import datetime as d\ndef f(): return sorted(key=d.datetime.utcnow)",
    ],
)
def test_wall_clock_use_is_detected(source: str) -> None:
    """The test above detects each way to read the wall clock."""
    assert set(looks_at_the_clock(ast.parse(source))) == {"f"}


def test_no_statement_gets_the_time() -> None:
    """Each statement takes the time from the database, and only durations as parameters."""
    for file in (ROOT / "transports/postgres/sql").glob("*.sql"):
        text = re.sub(r"--.*", "", file.read_text())
        for kind in re.findall(r"(?:%\(\w+\)s|\$\d+)::(\w+)", text):
            assert not re.match("timestamp|date|time|abstime", kind), f"{file.name}: a parameter is a {kind}"


def test_holder_renews_its_message_after_clock_jump(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A clock jump ends the lease and makes the message ready; a renewal before another claim keeps it."""
    postgres.send([message("t", queue)])
    holder, other = postgres.subscribe([queue], lease=60), postgres.subscribe([queue + "-other"], lease=60)
    (held,) = holder.receive(limit=1, wait=5)
    tables.execute("UPDATE {messages} SET vt = vt - interval '1 hour', state = 'ready'")
    assert holder.renew([held]) == [True]
    assert tables.rows("SELECT state, vt > now() FROM {messages}") == [("claimed", True)]
    assert holder.settle([Settlement(held, Verdict.ACK)]) == [True]
    holder.close()
    other.close()


def test_doctor_warns_of_a_clock_set_back(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Messages with a time of sending in the future show that the database's clock was set back."""
    postgres.send([message("t", queue)])
    tables.execute("UPDATE {messages} SET enqueued_at = now() + interval '1 hour'")
    (finding,) = [finding for finding in postgres.check_up() if finding.name == "clock"]
    assert (finding.level, "set back" in finding.what) == ("warning", True)


def test_doctor_warns_of_a_wrong_clock(postgres: PostgresTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is wrong by an hour may be corrected by a step, which ends leases at once or late."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600.0)
    (finding,) = [finding for finding in postgres.check_up() if finding.name == "clock"]
    assert (finding.level, "NTP" in finding.remedy) == ("warning", True)
