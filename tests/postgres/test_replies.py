"""Replies as rows: one waiting connection, the first reply wins, cleared when read, purged when expired."""

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


def test_waiting_threads_share_one_connection(
    make_named: Make, postgres: PostgresTransport, tables: Tables, name: str, queue: str
) -> None:
    """While fifty callers wait, there are the pool's connections and one more; all callers get their reply."""
    caller = make_named(pool_size=2, poll_interval=LONG_POLL)
    replies: dict[int, Reply | None] = {}

    def wait(number: int) -> None:
        replies[number] = caller.reply(f"{queue}-{number}", timeout=LONG_POLL, consume=True)

    waiting = [lambda number=number: wait(number) for number in range(50)]
    with in_background(*waiting):
        wait_until(lambda: caller._waiter.waiting == 50, what="fifty callers to wait")
        assert len(tables.backends(name)) <= 3
        answer(postgres, *[Reply(f"{queue}-{n}", "completed", result=n) for n in range(50)])
    assert {number: reply.result for number, reply in replies.items() if reply} == {n: n for n in range(50)}
    assert len(tables.backends(name)) <= 3


def test_all_callers_of_one_key_get_its_reply(make_postgres: Make, queue: str) -> None:
    """A reply that is not consumed is read by every caller that waits for it."""
    caller = make_postgres(poll_interval=LONG_POLL)
    replies: list[Reply | None] = []
    with in_background(*[lambda: replies.append(caller.reply(queue, timeout=LONG_POLL)) for _ in range(5)]):
        wait_until(lambda: caller._waiter.waiting == 5, what="five callers to wait")
        answer(caller, Reply(queue, "completed", result=1))
    assert replies == [Reply(queue, "completed", result=1)] * 5


def test_finished_calls_leave_no_state(make_postgres: Make, queue: str) -> None:
    """Callers that ran into their timeout or got their reply are forgotten."""
    caller = make_postgres()
    with in_background(*[lambda n=n: caller.reply(f"{queue}-{n}", timeout=0.1) for n in range(10)]):
        pass
    answer(caller, Reply(queue, "completed"))
    assert caller.reply(queue, timeout=5) is not None
    assert caller._waiter.waiting == 0


def test_first_reply_wins(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A later reply under the same key changes neither result nor expiry."""
    answer(postgres, Reply(queue, "completed", result={}))
    before = tables.rows("SELECT * FROM {results}")
    answer(postgres, Reply(queue, "failed", error="later"))
    assert tables.rows("SELECT * FROM {results}") == before
    assert postgres.reply(queue) == Reply(queue, "completed", result={})


def test_consumed_reply_keeps_only_its_status(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Result and error are cleared; status and expiry stay, and no other reply can be written."""
    answer(postgres, Reply(queue + "-c", "completed", result={"big": 1}), Reply(queue + "-f", "failed", error="e"))
    before = tables.rows("SELECT task_id, status, created_at, expires_at FROM {results} ORDER BY 1")
    assert postgres.reply(queue + "-c", consume=True) == Reply(queue + "-c", "completed", result={"big": 1})
    assert postgres.reply(queue + "-f", consume=True) == Reply(queue + "-f", "failed", error="e")
    assert tables.rows("SELECT result, error FROM {results}") == [(None, "")] * 2
    assert tables.rows("SELECT task_id, status, created_at, expires_at FROM {results} ORDER BY 1") == before
    answer(postgres, Reply(queue + "-c", "failed", error="later"))
    assert postgres.reply(queue + "-c") == Reply(queue + "-c", "completed")


def test_one_of_many_consumers_gets_the_result(postgres: PostgresTransport, queue: str) -> None:
    """Of ten callers that consume at once, one gets the result, the others the status alone."""
    answer(postgres, Reply(queue, "completed", result="once"))
    replies: list[Reply | None] = []
    barrier = threading.Barrier(10)

    def consume() -> None:
        barrier.wait(10)
        replies.append(postgres.reply(queue, consume=True))

    with in_background(*[consume] * 10):
        pass
    assert sorted(reply.result is not None for reply in replies if reply) == [False] * 9 + [True]


def test_expired_reply_counts_as_none(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Before it is purged, an expired row is not read, and does not prevent a new reply."""
    answer(postgres, Reply(queue, "failed", error="old"))
    tables.execute("UPDATE {results} SET expires_at = now()")
    assert postgres.reply(queue) is None
    answer(postgres, Reply(queue, "completed", result="new"))
    assert postgres.reply(queue) == Reply(queue, "completed", result="new")


def test_replies_expire_after_their_ttl(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A reply for a caller is kept an hour, the status of a dispatch a day, by the database's clock."""
    postgres.send([message("t", queue, reply_key=queue + "-r"), message("t", queue, task_id=queue + "-s")])
    postgres.send([message("absent", queue, task_id=queue + "-s")])
    Consumer(postgres, {"t": lambda: 1}, [queue]).drain(timeout=10)
    lives = tables.rows("SELECT task_id, extract(epoch FROM expires_at - created_at)::int FROM {results} ORDER BY 1")
    assert lives == [(queue + "-r", 3600), (queue + "-s", 86400)]


def test_expired_replies_are_purged_in_batches(make_postgres: Make, tables: Tables, queue: str) -> None:
    """A batch removes at most a thousand expired replies, the oldest first, and the next one follows soon."""
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
def test_consumers_purge_expired_replies(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running consumer, busy or idle, removes expired replies."""
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


def test_impossible_reply_key_is_refused(postgres: PostgresTransport) -> None:
    """NUL and lone surrogates raise a PayloadError that names the key, also in a waiting call."""
    for key in ("a\0b", "a\ud800b"):
        with pytest.raises(PayloadError):
            postgres.reply(key)
        with pytest.raises(PayloadError):
            postgres.reply(key, timeout=1)


def test_caller_can_wait_without_end(postgres: PostgresTransport, queue: str) -> None:
    """A call with an infinite timeout gets its reply."""
    with running(Consumer(postgres, {"t": lambda: "answer"}, [queue])):
        assert Dispatcher(postgres).call("t", queue=queue, timeout=float("inf")) == "answer"


def test_reply_purged_while_consumed_reaches_its_reader(
    postgres: PostgresTransport, tables: Tables, name: str, make_named: Make, queue: str
) -> None:
    """A reply that is removed between reading and clearing belongs to its reader."""
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
def test_unparsable_reply_is_returned_as_text(
    postgres: PostgresTransport, tables: Tables, queue: str, value: str
) -> None:
    """A result that exceeds the limits of json.loads is returned as text, and can be consumed."""
    tables.execute(
        "INSERT INTO {results} VALUES (%s, 'completed', %s::jsonb, '', now(), now() + interval '1 hour')", queue, value
    )
    reply = postgres.reply(queue, consume=True)
    assert reply is not None
    assert isinstance(reply.result, str)
    assert (postgres.reply(queue) or reply).result is None
