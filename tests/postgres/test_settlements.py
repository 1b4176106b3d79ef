"""`settle`: a whole batch in one statement, behind the fence."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from pg_tables import Tables
from postgres.support import in_background

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Delivery, Reply, Settlement, Subscription, TransportUnavailable, Verdict

Make = Callable[..., PostgresTransport]


def held(
    transport: PostgresTransport, queue: str, number: int, *, lease: float = 60
) -> tuple[Subscription, list[Delivery]]:
    transport.send([message("t", queue, n) for n in range(number)])
    subscription = transport.subscribe([queue], lease=lease)
    return subscription, list(subscription.receive(limit=number, wait=0))


def mixture(deliveries: list[Delivery], key: str, cb: str) -> list[Settlement]:
    """One settlement of each kind for eight deliveries."""
    a, b, c, d, e, f, g, h = deliveries
    return [
        Settlement(a, Verdict.ACK),
        Settlement(b, Verdict.ACK, follow_up=message("f", cb, "b")),
        Settlement(c, Verdict.ACK, reply=Reply(key + "-c", "completed", result={"c": 1})),
        Settlement(d, Verdict.ACK, follow_up=message("f", cb, "d"), reply=Reply(key + "-d", "failed", error="e")),
        Settlement(e, Verdict.RETRY),
        Settlement(f, Verdict.RETRY, delay=60, reason="later"),
        Settlement(g, Verdict.BURY, reason="bad", result=[1]),
        Settlement(
            h, Verdict.BURY, follow_up=message("f", cb, "h", delay=60), reply=Reply(key + "-h", "failed", error="x")
        ),
    ]


def test_a_mixed_batch_is_one_statement(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """All rows that a batch writes have one transaction and one command, so that no crash can split it."""
    subscription, deliveries = held(postgres, queue, 8)
    assert subscription.settle(mixture(deliveries, queue, queue + "-cb")) == [True] * 8
    written = tables.rows(
        """SELECT 'message', queue_name, state, xmin::text, cmin::text FROM {messages}
           UNION ALL SELECT 'reply', task_id, status, xmin::text, cmin::text FROM {results}
           UNION ALL SELECT 'dead', queue_name, reason, xmin::text, cmin::text FROM {dead}"""
    )
    assert sorted(row[:3] for row in written) == sorted(
        [
            ("message", queue, "ready"),
            ("message", queue, "claimed"),
            ("message", queue + "-cb", "ready"),
            ("message", queue + "-cb", "ready"),
            ("message", queue + "-cb", "claimed"),
            ("reply", queue + "-c", "completed"),
            ("reply", queue + "-d", "failed"),
            ("reply", queue + "-h", "failed"),
            ("dead", queue, "bad"),
            ("dead", queue, ""),
        ]
    )
    assert len({row[3:] for row in written}) == 1
    subscription.close()


def test_batch_of_any_size_is_one_statement(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Four hundred settlements of every kind are one transaction and one command."""
    subscription, deliveries = held(postgres, queue, 400)
    kinds = [mixture(deliveries[n : n + 8], f"{queue}-{n}", queue + "-cb") for n in range(0, 400, 8)]
    assert subscription.settle([settlement for kind in kinds for settlement in kind]) == [True] * 400
    written = tables.rows(
        """SELECT xmin::text, cmin::text FROM {messages} UNION ALL SELECT xmin::text, cmin::text FROM {results}
           UNION ALL SELECT xmin::text, cmin::text FROM {dead}"""
    )
    assert len(written) == 50 * (5 + 3 + 2)
    assert len(set(written)) == 1
    subscription.close()


def test_lost_lease_has_no_effect_in_a_batch(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A message that another worker holds keeps its row; its reply, follow-up and dead letter are not written."""
    subscription, deliveries = held(postgres, queue, 8)
    lost = deliveries[1:8:2]
    tables.execute(
        "UPDATE {messages} SET read_ct = read_ct + 1 WHERE msg_id = ANY (%s)", [int(delivery.id) for delivery in lost]
    )
    settled = subscription.settle(mixture(deliveries, queue, queue + "-cb"))
    assert settled == [True, False] * 4
    left = tables.rows("SELECT msg_id::text, read_ct, state FROM {messages} WHERE queue_name = %s", queue)
    assert sorted(left) == sorted([(delivery.id, 2, "claimed") for delivery in lost] + [(deliveries[4].id, 1, "ready")])
    assert tables.count(queue + "-cb") == 0
    assert tables.rows("SELECT task_id FROM {results}") == [(queue + "-c",)]
    assert tables.rows("SELECT msg_id::text FROM {dead}") == [(deliveries[6].id,)]
    subscription.close()


def test_settlement_killed_while_waiting_changes_nothing(
    make_named: Make, tables: Tables, name: str, queue: str
) -> None:
    """If its connection ends during the statement, no row of the batch is changed or written."""
    transport = make_named()
    subscription, deliveries = held(transport, queue, 8)
    before = tables.rows("SELECT msg_id, read_ct, state, vt FROM {messages} ORDER BY 1")
    last = int(deliveries[-1].id)

    def settle() -> None:
        with pytest.raises(TransportUnavailable) as caught:
            subscription.settle(mixture(deliveries, queue, queue + "-cb"))
        assert caught.value.fate_unknown

    with tables.locked("SELECT 1 FROM {messages} WHERE msg_id = %s FOR UPDATE", last), in_background(settle):
        pid = tables.wait_for_lock(name)
        tables.rows("SELECT pg_terminate_backend(%s, 5000)", pid)
    assert tables.rows("SELECT msg_id, read_ct, state, vt FROM {messages} ORDER BY 1") == before
    assert tables.rows("SELECT 1 FROM {results} UNION ALL SELECT 1 FROM {dead}") == []
    assert subscription.settle(mixture(deliveries, queue, queue + "-cb")) == [True] * 8
    subscription.close()


def test_overtaken_settlement_changes_nothing(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """The fence is checked after the wait for a lock: the claim that held the lock wins."""
    transport = make_named()
    subscription, deliveries = held(transport, queue, 8)
    overtaken = deliveries[1]
    settled: list[bool] = []
    claim = "UPDATE {messages} SET read_ct = read_ct + 1, vt = now() + interval '60 s' WHERE msg_id = %s"
    batch = mixture(deliveries, queue, queue + "-cb")
    with (
        tables.locked(claim, int(overtaken.id)) as other,
        in_background(lambda: settled.extend(subscription.settle(batch))),
    ):
        tables.wait_for_lock(name)
        other.commit()
    assert settled == [True, False] + [True] * 6
    assert tables.rows("SELECT read_ct FROM {messages} WHERE msg_id = %s", int(overtaken.id)) == [(2,)]
    assert tables.rows("SELECT message -> 'args' ->> 0 FROM {messages} WHERE queue_name = %s", queue + "-cb") == [
        ("d",),
        ("h",),
    ]
    subscription.close()


@pytest.mark.parametrize("number", range(8), ids=["ack", "chain", "reply", "both", "retry", "later", "bury", "tell"])
def test_settlement_after_a_reaper_takes_effect(
    make_named: Make, tables: Tables, name: str, queue: str, number: int
) -> None:
    """A row that was only made ready again meanwhile is settled once, with all its effects."""
    transport = make_named()
    subscription, deliveries = held(transport, queue, 8)
    batch = [mixture(deliveries, queue, queue + "-cb")[number]]
    settled: list[bool] = []
    reap = "UPDATE {messages} SET state = 'ready' WHERE msg_id = %s"
    with (
        tables.locked(reap, int(deliveries[number].id)) as other,
        in_background(lambda: settled.extend(subscription.settle(batch))),
    ):
        tables.wait_for_lock(name)
        other.commit()
    assert settled == [True]
    gone = not tables.rows("SELECT 1 FROM {messages} WHERE msg_id = %s", int(deliveries[number].id))
    assert gone == (batch[0].verdict is not Verdict.RETRY)
    assert tables.count(queue + "-cb") == (batch[0].follow_up is not None)
    assert len(tables.rows("SELECT 1 FROM {results}")) == (batch[0].reply is not None)
    assert len(tables.rows("SELECT 1 FROM {dead}")) == (batch[0].verdict is Verdict.BURY)
    subscription.close()


def test_overlapping_settlements_do_not_deadlock(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Rows are locked in one order, so two workers that settle the same rows both get a result."""
    subscription, deliveries = held(postgres, queue, 200, lease=0.05)
    time.sleep(0.1)
    other = postgres.subscribe([queue], lease=60)
    again: list[Delivery] = []
    while len(again) < 200:
        again += other.receive(limit=200, wait=2)
    answers: dict[str, list[bool]] = {}

    def settle(who: str, by: Subscription, batch: list[Delivery]) -> None:
        answers[who] = list(
            by.settle([Settlement(delivery, Verdict.ACK, follow_up=message("f", queue + "-cb")) for delivery in batch])
        )

    with in_background(
        lambda: settle("late", subscription, deliveries), lambda: settle("now", other, list(reversed(again)))
    ):
        pass
    assert answers == {"late": [False] * 200, "now": [True] * 200}
    assert tables.count(queue + "-cb") == 200
    subscription.close()
    other.close()


def test_follow_ups_keep_the_settlement_order(postgres: PostgresTransport, queue: str) -> None:
    """Follow-ups of a batch are in the order of its settlements, for any order of its messages."""
    subscription, deliveries = held(postgres, queue, 50)
    order = deliveries[::-1]
    subscription.settle(
        [Settlement(delivery, Verdict.ACK, follow_up=message("f", queue + "-cb", delivery.id)) for delivery in order]
    )
    subscription.close()
    following = postgres.subscribe([queue + "-cb"], lease=60)
    got = [delivery.payload.args[0] for delivery in following.receive(limit=50, wait=0) if delivery.payload]
    assert got == [delivery.id for delivery in order]
    following.close()


def test_first_reply_of_a_batch_wins(postgres: PostgresTransport, queue: str) -> None:
    """The order of the settlements decides, not that of the rows."""
    subscription, deliveries = held(postgres, queue, 40)
    batch = [
        Settlement(delivery, Verdict.ACK, reply=Reply(f"{queue}-{n // 2}", "completed", result=n))
        for n, delivery in enumerate(deliveries[::-1])
    ]
    assert subscription.settle(batch) == [True] * 40
    for n in range(20):
        reply = postgres.reply(f"{queue}-{n}")
        assert reply is not None
        assert reply.result == 2 * n
    subscription.close()
