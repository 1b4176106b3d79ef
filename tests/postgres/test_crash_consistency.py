"""`settle` while the process, the connection or the server fails between the task's return and the commit.

UNSTRACT_WIRE_CRASH_POINTS=all kills the process at every line for every shape of settlement. Otherwise it does so at
every line for `on_success`, and at every twenty-ninth for the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import cast

import psycopg
import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.crashing import crashing
from postgres.crashing_ledger import SHAPES, Ledger
from postgres.crashing_proxy import CuttingProxy, Exchange, Side, boundaries, cutting
from postgres.support import application, named, on_one_server, transport_on
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from contract_tests.kit import wait_until
from transports.postgres import PostgresTransport, connector
from unstract_core import Consumer
from unstract_core.worker.loop import Loop

ALL = os.environ.get("UNSTRACT_WIRE_CRASH_POINTS") == "all"
STEP = 1 if ALL else 29
TRIES = 3
"""On a busy machine the threads of a worker may now and then go another way, and it dies elsewhere."""


@on_one_server
@pytest.mark.timeout(1800 if ALL else 300)
@pytest.mark.parametrize(
    ("shapes", "step"),
    [
        pytest.param(["on_success"], 1, id="on_success"),
        pytest.param(["on_error"], STEP, id="on_error"),
        pytest.param(["reply"], STEP, id="reply"),
        pytest.param(["retry"], STEP, id="retry"),
        pytest.param(["burial"], STEP, id="burial"),
        pytest.param(["on_success", "on_error", "reply", "retry", "burial"], STEP, id="batch"),
    ],
)
def test_killed_worker_settles_everything_or_nothing(
    postgres: PostgresTransport, tables: Tables, queue: str, shapes: list[str], step: int
) -> None:
    """SIGKILL at each line of the package, on either thread, leaves a settlement whole or absent.

    A message is in flight as before, or gone with all effects of its settlement. After another worker has run the rest,
    every callback has run exactly once, and every reply exists.
    """
    ledger = Ledger(postgres, tables, queue)
    name = application()
    with crashing(named(tables.url, name), tables.schema, queue, len(shapes)) as crash:
        ledger.send(0, shapes)
        whole = crash().lines
        places = [(thread, number) for thread, lines in whole.items() for number in range(1, len(lines) + 1, step)]
        died_at, trials, trial = [], [], 0
        for place in places:
            for _ in range(TRIES):
                trial += 1
                ledger.send(trial, shapes)
                died = crash(place).died_at
                if died == whole[place[0]][place[1] - 1]:
                    break
            died_at.append(died)
            trials.append(trial)
    wait_until(lambda: not tables.backends(name), what="the connections of the dead to end")
    verdicts = ledger.verdicts()
    assert verdicts[0], "the worker that lived has not settled"
    assert died_at == [whole[thread][number - 1] for thread, number in places]
    if step == 1:
        assert set(died_at) == set(chain(*whole.values()))
    outcomes = [verdicts[trial] for trial in trials]
    assert {outcome for outcome, (thread, _) in zip(outcomes, places, strict=True) if thread == "io"} == {True, False}
    settled = sum(outcomes)
    print(f"{', '.join(shapes)}: {len(places)} deaths, {len(places) - settled} not settled, {settled} settled")
    ledger.finish()


@pytest.fixture
def between(postgres_url: str) -> Iterator[CuttingProxy]:
    parts = conninfo_to_dict(postgres_url)
    with cutting(str(parts["host"]), int(str(parts["port"]))) as made:
        yield made


@on_one_server
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("prepared", [False, True], ids=["not prepared", "prepared"])
def test_interrupted_settlement_takes_effect_once(
    postgres: PostgresTransport,
    tables: Tables,
    queue: str,
    between: CuttingProxy,
    monkeypatch: pytest.MonkeyPatch,
    side: Side,
    prepared: bool,
) -> None:
    """The connection ends at each message of the protocol, and inside each, in the request and in the answer.

    The consumer continues and settles its finished tasks: no task runs twice, no callback is doubled or missing.
    """
    ledger = Ledger(postgres, tables, queue)
    trial = 0

    def settle(*, cut_at: int | None = None) -> Exchange:
        nonlocal trial
        trial += 1
        marker = ledger.label(trial, "on_success").encode()
        exchange = between.watch(marker, {} if cut_at is None else {side: cut_at})
        (label,) = ledger.send(trial, ["on_success"])
        wait_until(lambda: ledger.look()[label] == SHAPES["on_success"].settled, what="the settlement")
        wait_until(lambda: exchange.is_over and not loop.in_flight, what="the consumer to know of it")
        return exchange

    if prepared:
        monkeypatch.setattr(connector, "_PREPARE_AFTER", 0)
    url = make_conninfo(tables.url, host="127.0.0.1", port=between.port)
    with transport_on(url, tables.schema) as transport:
        transport._notifier._window = 0.0  # each settlement carries its own announcement, and all are of one length
        consumer = Consumer(transport, {"returns": lambda label: {"of": label}}, [queue])
        with running(consumer):
            loop = cast(Loop, consumer._running)
            passed = settle().passed
            assert passed["client"][:1] == (b"B" if prepared else b"P")
            places = boundaries(passed[side])
            if side == "client":
                places = [place - len(passed[side]) for place in places]
            assert all(settle(cut_at=place).is_over for place in places)
    committed_unheard = trial - consumer.counters["settled"]
    print(f"{len(places)} cuts, {committed_unheard} of them after the commit")
    assert consumer.counters == {"ran": trial, "settled": trial - committed_unheard, "replaced": 0}
    if side == "client":
        assert committed_unheard == 1, "what was not wholly sent has done nothing"
    else:
        assert committed_unheard > len(places) // 2, "only the end of an answer shows that everything was done"
    ledger.finish()


@pytest.fixture
def private_tables(private: servers.PrivateServer) -> Iterator[Tables]:
    with servers.fresh_schema(private.url) as schema, transport_on(private.url, schema) as transport:
        transport.migrate()
        yield Tables(private.url, schema)


def lock_of_the_message(tables: Tables, label: str) -> contextlib.AbstractContextManager[object]:
    """A lock that blocks a settlement before it has done anything."""
    return tables.locked("SELECT FROM {messages} WHERE message -> 'args' ->> 0 = %s FOR UPDATE", label)


def lock_of_the_status(tables: Tables, label: str) -> contextlib.AbstractContextManager[object]:
    """A lock that blocks a settlement in the middle: another transaction writes the same status."""
    return tables.locked("INSERT INTO {results} VALUES (%s, 'failed', NULL, '', now(), now())", label)


def lock_of_the_commit(tables: Tables, label: str) -> contextlib.AbstractContextManager[object]:
    """A lock that blocks a settlement at its commit, by a deferred trigger."""
    tables.execute(
        """CREATE TABLE {schema}.gate ();
           CREATE FUNCTION {schema}.pass() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN EXECUTE format('LOCK TABLE %%I.gate IN ACCESS SHARE MODE', TG_TABLE_SCHEMA); RETURN NULL; END $$;
           CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON {messages} DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION {schema}.pass()""".replace("%%", "%")
    )
    return tables.locked("LOCK TABLE {schema}.gate")


@pytest.mark.parametrize("fault", ["backend terminated", "backend killed", "server crashed"])
@pytest.mark.parametrize("lock", [lock_of_the_message, lock_of_the_status, lock_of_the_commit])
def test_settlement_during_server_crash_takes_effect_once(
    private: servers.PrivateServer,
    private_tables: Tables,
    queue: str,
    lock: Callable[[Tables, str], contextlib.AbstractContextManager[object]],
    fault: str,
) -> None:
    """Nothing of a settlement stays if the server dies before, during or at its commit; the consumer repeats it.

    The task runs once, and its callback and its status exist once.
    """
    tables, name = private_tables, application()
    started, finish = threading.Event(), threading.Event()

    def returns(label: str) -> dict[str, str]:
        started.set()
        finish.wait(60)
        return {"of": label}

    def strike() -> None:
        pid = tables.wait_for_lock(name)
        if fault == "backend terminated":
            tables.rows("SELECT pg_terminate_backend(%s, 20000)", pid)
        elif fault == "backend killed":
            os.kill(pid, signal.SIGKILL)
        else:
            private.stop("immediate")
            private.start()

    def settled() -> bool:
        try:
            return ledger.look()[label] == SHAPES["on_success"].settled
        except psycopg.OperationalError:  # the server recovers
            return False

    with (
        transport_on(private.url, tables.schema) as sound,
        transport_on(named(private.url, name), tables.schema) as transport,
    ):
        ledger = Ledger(sound, tables, queue)
        consumer = Consumer(transport, {"returns": returns}, [queue])
        with running(consumer):
            (label,) = ledger.send(0, ["on_success"])
            assert started.wait(30)
            struck = False
            try:
                with lock(tables, label):
                    finish.set()
                    strike()
                    struck = True
                    if fault == "backend terminated":
                        assert ledger.look()[label] == SHAPES["on_success"].held
            except psycopg.OperationalError:  # the connection that held the lock has died with the server
                assert struck
            wait_until(settled, what="the settlement")
        assert consumer.counters == {"ran": 1, "settled": 1, "replaced": 0}
        ledger.finish()
