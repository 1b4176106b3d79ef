"""Rows that other programs wrote: each unreadable row is reported and dead-lettered, the others run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from consumers import running
from hypothesis import given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Reply
from unstract_core.transport import DeadLetter

BAD: dict[str, str] = {
    "string": '"task"',
    "number": "7",
    "null": "null",
    "array": '[{"task_name": "t"}]',
    "empty object": "{}",
    "no task name": '{"args": [], "kwargs": {}, "queue": "q"}',
    "task name null": '{"task_name": null, "queue": "q"}',
    "task name empty": '{"task_name": "", "queue": "q"}',
    "task name a number": '{"task_name": 7, "queue": "q"}',
    "kwargs a string": '{"task_name": "t", "kwargs": "x", "queue": "q"}',
    "kwargs an array": '{"task_name": "t", "kwargs": [["k", 1]], "queue": "q"}',
    "args an object": '{"task_name": "t", "args": {"x": 1}, "queue": null}',
    "args a string": '{"task_name": "t", "args": "abc", "queue": "q"}',
    "on_success without a queue": '{"task_name": "t", "on_success": {"task_name": "t", "queue": null}}',
    "on_success a string": '{"task_name": "t", "queue": "q", "on_success": "done"}',
    "very deep": '{"task_name": "t", "queue": "q", "args": ' + "[" * 3000 + "]" * 3000 + "}",
    "very long number": '{"task_name": "t", "queue": "q", "args": [1e5000]}',
}


def consume(transport: PostgresTransport, queue: str, ran: list[Any]) -> Consumer:
    def note(*args: Any, **kwargs: Any) -> None:
        ran.append((args, kwargs))

    consumer = Consumer(transport, {"t": note, "failed": note}, [queue], prefetch=50, max_attempts=2, backoff=0)
    consumer.drain(timeout=10)
    return consumer


def only_letter(transport: PostgresTransport, queue: str) -> DeadLetter:
    (letter,) = transport.dead.find(queue=queue)
    return letter


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_unreadable_row_is_dead_lettered_alone(
    postgres: PostgresTransport, tables: Tables, queue: str, text: str
) -> None:
    """An unreadable row among valid ones is dead-lettered with its problem; the others run."""
    postgres.send([message("t", queue, "before")])
    tables.inject(queue, text)
    postgres.send([message("t", queue, "after")])
    ran: list[Any] = []
    consumer = consume(postgres, queue, ran)
    assert [args for args, _ in ran] == [("before",), ("after",)]
    assert (consumer.counters["buried"], consumer.counters["settled"]) == (1, 2)
    assert tables.count(queue) == 0
    kept = tables.rows("SELECT message = %s::jsonb, reason, attempts FROM {dead}", text)
    assert [(row[0], row[1].split(":")[0], row[2]) for row in kept] == [(True, "MalformedPayload", 1)]


EMPTY = ["null", "false", "0", '""', "[]", "{}"]
AS_THE_PRODUCT_READS: dict[str, list[str]] = {
    "queue": [*EMPTY, "7", '"another"'],
    "args": EMPTY,
    "kwargs": EMPTY,
    "fairness": [*EMPTY, '"high"', '{"org_id": 7}', '{"workload_type": null, "pipeline_priority": 11}'],
    "reply_key": EMPTY,
    "on_success": EMPTY,
    "on_error": EMPTY,
    "task_id": [*EMPTY, "7"],
    "headers": [*EMPTY, "7"],
}
"""For each key of a message what may stand there without keeping the product's consumer from running it."""


@settings(max_examples=25)
@given(data=st.data())
def test_every_row_of_the_product_runs(shared: tuple[PostgresTransport, Tables], data: st.DataObject) -> None:
    """Every key of a message except the task name may be missing, null or empty; the message runs once."""
    transport, tables = shared
    queue, rows = queue_name(), []
    for _ in range(8):
        keys = data.draw(st.sets(st.sampled_from(sorted(AS_THE_PRODUCT_READS))))
        members = [f'"{key}": {data.draw(st.sampled_from(AS_THE_PRODUCT_READS[key]))}' for key in sorted(keys)]
        rows.append("{" + ", ".join(['"task_name": "t"', *members]) + "}")
        tables.inject(queue, rows[-1])
    ran: list[Any] = []
    consume(transport, queue, ran)
    assert transport.dead.find(queue=queue) == []
    assert ran == [((), {})] * len(rows), rows


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_product_dispatch_without_queue_sends_its_callback(
    postgres: PostgresTransport, tables: Tables, queue: str, raises: bool
) -> None:
    """A row with `"queue": null` sends its callback to the callback's queue and has a status."""
    callbacks = {
        key: {"task_name": key, "kwargs": None, "queue": f"{queue}-callbacks"} for key in ("on_success", "on_error")
    }
    row = {"task_name": "t", "args": [raises], "kwargs": None, "queue": None, "task_id": f"d-{queue}", **callbacks}
    tables.inject(queue, json.dumps(row))
    Consumer(postgres, {"t": lambda fails: 1 / 0 if fails else "paid"}, [queue]).drain(timeout=60)
    ((stored_in, text),) = tables.rows("SELECT queue_name, message FROM {messages}")
    kind, first = ("on_error", f"d-{queue}") if raises else ("on_success", "paid")
    assert (stored_in, text["queue"]) == (f"{queue}-callbacks", f"{queue}-callbacks")
    assert (text["task_name"], text["args"], text["kwargs"]) == (kind, [first], {})
    status = postgres.reply(f"d-{queue}")
    assert status is not None
    assert status.status == ("failed" if raises else "completed")


@pytest.mark.parametrize("text", ['{"task_name": 7, %s}', '{"task_name": "t", "kwargs": "x", "queue": null, %s}'])
def test_caller_of_unreadable_message_gets_the_error(
    postgres: PostgresTransport, tables: Tables, queue: str, text: str
) -> None:
    """The reply under the message's reply_key is failed, with the reason."""
    tables.inject(queue, text % f'"reply_key": "{queue}"')
    consume(postgres, queue, [])
    letter = only_letter(postgres, queue)
    assert postgres.reply(queue) == Reply(queue, "failed", error=letter.reason)


@pytest.mark.parametrize("text", ['{"task_name": 7, %s}', '{"task_name": "t", "kwargs": "x", "queue": null, %s}'])
def test_unreadable_message_runs_its_on_error(
    postgres: PostgresTransport, tables: Tables, queue: str, text: str
) -> None:
    """The on_error callback of an unreadable message gets the dispatch id and the reason; the status is failed."""
    spec = {"task_name": "failed", "kwargs": {"callback_kwargs": {"k": 1}}, "queue": queue}
    tables.inject(queue, text % f'"task_id": "the-id-{queue}", "on_error": {json.dumps(spec)}')
    ran: list[Any] = []
    consume(postgres, queue, ran)
    letter = only_letter(postgres, queue)
    assert ran == [((f"the-id-{queue}",), {"callback_kwargs": {"k": 1, "error": letter.reason}})]
    assert postgres.reply(f"the-id-{queue}") == Reply(f"the-id-{queue}", "failed", error=letter.reason, ttl=86400)


def test_row_with_two_senders_informs_both(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A row with a reply_key and an on_error is malformed; both get the error."""
    spec = {"task_name": "failed", "kwargs": {}, "queue": queue}
    row: dict[str, Any] = {"task_name": "t", "args": [], "kwargs": {}, "queue": queue, "fairness": None}
    tables.inject(queue, json.dumps({**row, "reply_key": queue, "on_error": spec}))
    ran: list[Any] = []
    consume(postgres, queue, ran)
    letter = only_letter(postgres, queue)
    assert letter.reason.startswith("MalformedPayload")
    assert "reply_key" in letter.reason
    reply = postgres.reply(queue)
    assert reply is not None
    assert (reply.status, reply.error) == ("failed", letter.reason)
    assert [(args[0],) for args, _ in ran] == tables.rows("SELECT msg_id::text FROM {dead}")


@pytest.mark.parametrize(
    "extra",
    [
        '"newer": {"x": [1]}',
        '"fairness": {"org_id": "o", "newer": 1}',
        '"on_error": null, "reply_key": null, "task_id": null',
    ],
)
def test_unknown_keys_are_ignored(postgres: PostgresTransport, tables: Tables, queue: str, extra: str) -> None:
    """Unknown keys, at any level, and keys with null do not stop a task."""
    tables.inject(queue, f'{{"task_name": "t", "args": [1], "kwargs": {{"k": 2}}, "queue": "{queue}", {extra}}}')
    ran: list[Any] = []
    consume(postgres, queue, ran)
    assert ran == [((1,), {"k": 2})]
    assert postgres.dead.find() == []


def test_too_many_attempts_end_in_failed_reply(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A message that keeps killing its workers gets a failed reply and is dead-lettered."""
    postgres.send([message("t", queue, reply_key=queue)])
    tables.execute("UPDATE {messages} SET read_ct = 2")
    ran: list[Any] = []
    consume(postgres, queue, ran)
    assert ran == []
    reply = postgres.reply(queue)
    assert reply is not None
    assert reply.error.startswith("TooManyAttempts")
    assert only_letter(postgres, queue).attempts == 3


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
specs = st.fixed_dictionaries({}, optional={"task_name": anything, "kwargs": anything, "queue": anything}) | anything
rows = (
    st.fixed_dictionaries(
        {},
        optional={
            "task_name": st.just("t") | anything,
            "args": anything,
            "kwargs": anything,
            "queue": st.just("q") | anything,
            "fairness": anything,
            "reply_key": anything,
            "task_id": anything,
            "on_error": specs,
            "on_success": specs,
        },
    )
    | anything
)


@settings(max_examples=60)
@given(batch=st.lists(rows, min_size=1, max_size=5))
def test_no_json_stops_a_consumer(shared: tuple[PostgresTransport, Tables], batch: list[Any]) -> None:
    """After any rows, the queue is empty, each readable row has run, and the others are dead letters."""
    transport, tables = shared
    queue = queue_name()
    for row in batch:
        tables.inject(queue, json.dumps(row))
    transport.send([message("t", queue, "sentinel")])
    ran: list[Any] = []
    tasks: dict[str, Callable[..., Any]] = {"t": lambda *args, **kwargs: ran.append(args)}
    consumer = Consumer(transport, tasks, [queue], prefetch=20, max_attempts=1, lease=5)
    consumer.drain(timeout=10)
    assert ran[-1] == ("sentinel",)
    assert tables.count(queue) == 0
    letters = tables.rows("SELECT 1 FROM {dead} WHERE queue_name = %s", queue)
    assert consumer.counters["settled"] + len(letters) == len(batch) + 1
    assert consumer.counters["refused"] == 0


STRANGE = {
    "parked for ever": "UPDATE {messages} SET vt = 'infinity', state = 'claimed' WHERE queue_name = %s",
    "sent before all time": "UPDATE {messages} SET enqueued_at = '-infinity' WHERE queue_name = %s",
    "counted to the end": "UPDATE {messages} SET read_ct = 2147483647 WHERE queue_name = %s",
    "due before all time": "UPDATE {messages} SET vt = '-infinity' WHERE queue_name = %s",
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_extreme_time_or_count_stops_no_queue(
    postgres: PostgresTransport, tables: Tables, queue: str, strange: str
) -> None:
    """A row with an extreme time or count does not stop the others, and the queues can be inspected."""
    postgres.send([message("t", queue)])
    tables.execute(strange, queue)
    ids = postgres.send([message("t", queue) for _ in range(5)])
    consumer = Consumer(postgres, {"t": lambda: None}, [queue])
    with running(consumer):
        wait_until(lambda: not set(ids) & {str(id) for (id,) in tables.rows("SELECT msg_id FROM {messages}")})
        assert len(postgres.queues([queue])) == 1
