"""Replies as rows: one waiting connection, first write wins, cleared when read, swept when old."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from consumers import running
from pg_tables import Tables
from postgres.support import LONG_POLL, ShiftedClock, in_background, on_one_server
from queues import answer

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Dispatcher, PayloadError, Reply

Make = Callable[..., PostgresTransport]


def test_fifty_waiting_threads_use_one_waiting_connection(
    make_named: Make, postgres: PostgresTransport, tables: Tables, name: str, queue: str
) -> None:
    """While fifty callers wait there are the pool's connections and one more; all of them are answered."""
    caller = make_named(pool_size=2, poll_interval=LONG_POLL)
    replies: dict[int, Reply | None] = {}

    def wait(number: int) -> None:
        replies[number] = caller.reply(f"{queue}-{number}", timeout=LONG_POLL, consume=True)

    waiting = [lambda number=number: wait(number) for number in range(50)]
    with in_background(*waiting):
        wait_until(lambda: caller.waiting_callers == 50, what="fifty callers to wait")
        assert len(tables.backends(name)) <= 3
        answer(postgres, *[Reply(f"{queue}-{n}", "completed", result=n) for n in range(50)])
    assert {number: reply.result for number, reply in replies.items() if reply} == {n: n for n in range(50)}
    assert len(tables.backends(name)) <= 3


def test_several_callers_of_one_key_are_all_told(make_postgres: Make, queue: str) -> None:
    """A reply that nobody consumes is read by everyone who waits for it."""
    caller = make_postgres(poll_interval=LONG_POLL)
    replies: list[Reply | None] = []
    with in_background(*[lambda: replies.append(caller.reply(queue, timeout=LONG_POLL)) for _ in range(5)]):
        wait_until(lambda: caller.waiting_callers == 5, what="five callers to wait")
        answer(caller, Reply(queue, "completed", result=1))
    assert replies == [Reply(queue, "completed", result=1)] * 5


def test_calls_that_come_and_go_leave_nothing_behind(make_postgres: Make, queue: str) -> None:
    """Callers that ran into their timeout are forgotten, and those that were answered as well."""
    caller = make_postgres()
    with in_background(*[lambda n=n: caller.reply(f"{queue}-{n}", timeout=0.1) for n in range(10)]):
        pass
    answer(caller, Reply(queue, "completed"))
    assert caller.reply(queue, timeout=5) is not None
    assert caller.waiting_callers == 0


def test_the_first_write_wins(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A later reply under the same key is acknowledged, and changes nothing: neither result nor expiry."""
    answer(postgres, Reply(queue, "completed", result={}))
    before = tables.rows("SELECT * FROM {results}")
    answer(postgres, Reply(queue, "failed", error="later"))
    assert tables.rows("SELECT * FROM {results}") == before
    assert postgres.reply(queue) == Reply(queue, "completed", result={})


def test_a_consumed_reply_is_cleared_in_the_table_and_keeps_its_status(
    postgres: PostgresTransport, tables: Tables, queue: str
) -> None:
    """Result and error are gone from the row; its status and its expiry stay, and nobody else can answer any more."""
    answer(postgres, Reply(queue + "-c", "completed", result={"big": 1}), Reply(queue + "-f", "failed", error="e"))
    before = tables.rows("SELECT task_id, status, created_at, expires_at FROM {results} ORDER BY 1")
    assert postgres.reply(queue + "-c", consume=True) == Reply(queue + "-c", "completed", result={"big": 1})
    assert postgres.reply(queue + "-f", consume=True) == Reply(queue + "-f", "failed", error="e")
    assert tables.rows("SELECT result, error FROM {results}") == [(None, "")] * 2
    assert tables.rows("SELECT task_id, status, created_at, expires_at FROM {results} ORDER BY 1") == before
    answer(postgres, Reply(queue + "-c", "failed", error="later"))
    assert postgres.reply(queue + "-c") == Reply(queue + "-c", "completed")


def test_only_one_of_many_consumers_gets_a_result(postgres: PostgresTransport, queue: str) -> None:
    """Consuming is exclusive: of ten callers at once one has the result, the others the bare status."""
    answer(postgres, Reply(queue, "completed", result="once"))
    replies: list[Reply | None] = []
    barrier = threading.Barrier(10)

    def consume() -> None:
        barrier.wait(10)
        replies.append(postgres.reply(queue, consume=True))

    with in_background(*[consume] * 10):
        pass
    assert sorted(reply.result is not None for reply in replies if reply) == [False] * 9 + [True]


def test_an_expired_reply_is_as_good_as_none(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Before the sweep has come by, an expired row is neither read nor in the way of a new reply."""
    answer(postgres, Reply(queue, "failed", error="old"))
    tables.execute("UPDATE {results} SET expires_at = now()")
    assert postgres.reply(queue) is None
    answer(postgres, Reply(queue, "completed", result="new"))
    assert postgres.reply(queue) == Reply(queue, "completed", result="new")


def test_replies_live_as_long_as_they_say(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """An hour for a blocked caller, a day for the status of a dispatch, by the database's clock."""
    postgres.send([message("t", queue, reply_key=queue + "-r"), message("t", queue, task_id=queue + "-s")])
    postgres.send([message("absent", queue, task_id=queue + "-s")])
    Consumer(postgres, {"t": lambda: 1}, [queue]).drain(timeout=10)
    lives = tables.rows("SELECT task_id, extract(epoch FROM expires_at - created_at)::int FROM {results} ORDER BY 1")
    assert lives == [(queue + "-r", 3600), (queue + "-s", 86400)]


def test_expired_replies_are_swept_in_bounded_bites(make_postgres: Make, tables: Tables, queue: str) -> None:
    """A sweep deletes a thousand expired rows at most, the oldest first, and soon comes back for the rest."""
    clock = ShiftedClock()
    postgres = make_postgres(clock=clock)
    tables.execute(
        "INSERT INTO {results} (task_id, status, result, error, created_at, expires_at)"
        " SELECT n::text, 'completed', NULL, '', now(), now() - n * interval '1 s' FROM generate_series(1, 2500) AS n"
    )
    answer(postgres, Reply(queue, "completed", result="alive"))
    subscription = postgres.subscribe([queue], lease=60)
    left = []
    for _ in range(4):
        clock.ahead += 61.0
        subscription.receive(limit=1, wait=0)
        left.append(tables.rows("SELECT count(*), max(now() - expires_at) < interval '2501 s' FROM {results}")[0][0])
        if len(left) == 1:
            assert tables.rows("SELECT count(*) FROM {results} WHERE task_id ~ '^[0-9]+$' AND task_id::int > 1500") == [
                (0,)
            ]
            assert subscription.purger.due_at < clock() + 5
    assert left == [1501, 501, 1, 1]
    assert subscription.purger.due_at > clock() + 30
    assert postgres.reply(queue) is not None
    subscription.close()


@on_one_server
def test_consumers_sweep_without_being_asked(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a running consumer is needed for expired replies to go, whether it is busy or idle."""
    monkeypatch.setattr("transports.postgres.reply_purger._INTERVAL", 0.05)
    answer(postgres, Reply(queue, "completed"))
    subscription = postgres.subscribe([queue], lease=60)
    for _ in range(2):
        tables.execute("UPDATE {results} SET expires_at = now()")
        subscription.receive(limit=1, wait=0.3 if _ else 0.1)
        subscription.receive(limit=1, wait=0)
        assert tables.rows("SELECT 1 FROM {results}") == []
        answer(postgres, Reply(queue, "completed"))
    subscription.close()


def test_a_key_that_no_text_column_can_hold_is_refused(postgres: PostgresTransport) -> None:
    """NUL and lone surrogates are a PayloadError that names the key, in a waiting call too."""
    for key in ("a\0b", "a\ud800b"):
        with pytest.raises(PayloadError):
            postgres.reply(key)
        with pytest.raises(PayloadError):
            postgres.reply(key, timeout=1)


def test_a_caller_may_wait_without_end(postgres: PostgresTransport, queue: str) -> None:
    """An infinite timeout is a timeout: the reply comes."""
    with running(Consumer(postgres, {"t": lambda: "answer"}, [queue])):
        assert Dispatcher(postgres).call("t", queue=queue, timeout=float("inf")) == "answer"


def test_a_reply_that_goes_while_it_is_consumed_reaches_its_reader(
    postgres: PostgresTransport, tables: Tables, name: str, make_named: Make, queue: str
) -> None:
    """It was read, and then expired and was swept before it was cleared: nobody else had it, so the reader has."""
    reader = make_named()
    answer(postgres, Reply(queue, "completed", result={"paid": 1}))
    replies: list[Reply | None] = []
    locked = tables.locked("SELECT * FROM {results} WHERE task_id = %s FOR UPDATE", queue)
    with locked as lock, in_background(lambda: replies.append(reader.reply(queue, consume=True))):
        tables.wait_for_lock(name)
        lock.execute(tables.sql("DELETE FROM {results} WHERE task_id = %s"), (queue,))
        lock.commit()
    assert replies[0] is not None
    assert replies[0].result == {"paid": 1}


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "9" * 5001], ids=["deep", "long"])
def test_a_reply_that_python_cannot_parse_is_its_text(
    postgres: PostgresTransport, tables: Tables, queue: str, value: str
) -> None:
    """Another writer's result beyond what json.loads takes is read as text, and can be consumed."""
    tables.execute(
        "INSERT INTO {results} VALUES (%s, 'completed', %s::jsonb, '', now(), now() + interval '1 hour')", queue, value
    )
    reply = postgres.reply(queue, consume=True)
    assert reply is not None
    assert isinstance(reply.result, str)
    assert (postgres.reply(queue) or reply).result is None
