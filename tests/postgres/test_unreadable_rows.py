"""Rows whose content PostgreSQL cannot return: each is dead-lettered unread, and every other message runs."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres.support import on_one_server, transport_on
from psycopg import sql
from queues import queue_name

from contract_tests.kit import retry_outages, wait_until
from contract_tests.messages import first, message
from transports.postgres import PostgresTransport, dead_letters, unread
from transports.postgres.subscription import PostgresSubscription
from transports.postgres.unread import UnreadMessages
from unstract_core import Consumer, Delivery, Reply, Settlement, TransportError, Verdict, cli

pytestmark = on_one_server

# Reading a message as text takes the seconds of its key `takes`, and fails with the SQLSTATE of its key `fails`.
FAILING_CAST = """
CREATE FUNCTION failing(message jsonb) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    IF message ? 'takes' THEN PERFORM pg_sleep((message ->> 'takes')::float8); END IF;
    IF message ? 'fails' THEN RAISE EXCEPTION 'this row fails' USING ERRCODE = message ->> 'fails'; END IF;
    RETURN format('%s', message);
END $$;
CREATE CAST (jsonb AS text) WITH FUNCTION failing(jsonb) AS ASSIGNMENT;
"""
OF_THE_ROW = ["54000", "XX000", "XX001", "22P05", "22021", "P0001"]
OTHERS = {"other": lambda: None}
MAY_PASS = ["53200", "57014"]


@pytest.fixture(scope="module")
def failing(postgres_url: str) -> Iterator[tuple[PostgresTransport, Tables]]:
    """A transport on a database of its own in which some rows cannot be read as text, and its tables."""
    database = f"wire_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        try:
            url = urlsplit(postgres_url)._replace(path=f"/{database}").geturl()
            with psycopg.connect(url, autocommit=True) as inside:
                inside.execute(FAILING_CAST)
            with transport_on(url, "unstract") as transport:
                transport.migrate()
                yield transport, Tables(url, "unstract")
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))


def row(queue: str, number: int, state: str | None = None, **members: Any) -> str:
    wire = {"task_name": "t", "args": [number], "kwargs": {}, "queue": queue, "fairness": None, **members}
    return json.dumps(wire if state is None else {**wire, "fails": state})


def inject_four(tables: Tables, queue: str, state: str) -> None:
    """Store four messages, of which the second cannot be read and fails with a SQLSTATE."""
    for number in range(4):
        tables.inject(queue, row(queue, number, state if number == 1 else None))


def partly_read(transport: PostgresTransport, tables: Tables, queue: str) -> PostgresSubscription:
    """Return a subscription that has claimed four messages and read none, because the second one failed."""
    inject_four(tables, queue, "53200")
    subscription = transport.subscribe([queue], lease=60)
    with pytest.raises(TransportError):
        subscription.receive(limit=4, wait=0)
    assert tables.rows("SELECT sum(read_ct) FROM {messages} WHERE queue_name = %s", queue) == [(4,)]
    return subscription


def drained(transport: PostgresTransport, queue: str, *, lease: float = 60) -> list[Delivery]:
    """Return all deliveries of a subscription until the queue is empty, despite its errors."""
    subscription = transport.subscribe([queue], lease=lease)
    received: list[Delivery] = []
    while more := retry_outages(lambda: subscription.receive(limit=10, wait=0)):
        received += more
    subscription.close()
    return received


@settings(max_examples=15)
@given(states=st.lists(st.none() | st.sampled_from(OF_THE_ROW), min_size=1, max_size=9), limit=st.integers(1, 10))
def test_unreadable_rows_stop_no_other_message(
    failing: tuple[PostgresTransport, Tables], states: list[str | None], limit: int
) -> None:
    """Unreadable rows with any error, at any place and in any number, are dead-lettered; the others run once."""
    transport, tables = failing
    queue = queue_name()
    for number, state in enumerate(states):
        tables.inject(queue, row(queue, number, state))
    ran: list[int] = []
    consumer = Consumer(transport, {"t": ran.append}, [queue], prefetch=limit, concurrency=1)
    consumer.drain(timeout=30)
    assert sorted(ran) == [number for number, state in enumerate(states) if state is None]
    letters = tables.rows("SELECT reason, attempts, message->>'fails' FROM {dead} WHERE queue_name = %s", queue)
    assert [letter[2] for letter in letters] == [state for state in states if state is not None]
    assert all(f"this row fails (SQLSTATE {state})" in reason and attempts == 1 for reason, attempts, state in letters)
    assert tables.count(queue) == 0


def test_sender_of_unreadable_row_gets_the_error(failing: tuple[PostgresTransport, Tables]) -> None:
    """The row's reply_key, on_error and organisation are read without the rest."""
    transport, tables = failing
    queue = queue_name()
    spec = {"task_name": "failed", "kwargs": {"k": 1}, "queue": queue}
    tables.inject(queue, row(queue, 1, "54000", reply_key=f"{queue}-reply"))
    tables.inject(queue, row(queue, 2, "54000", on_error=spec, task_id=f"{queue}-id"))
    called: list[tuple[Any, ...]] = []
    tasks = {"t": lambda n: None, "failed": lambda *args, **kwargs: called.append((args, kwargs["k"]))}
    Consumer(transport, tasks, [queue], prefetch=10).drain(timeout=30)
    assert called == [((f"{queue}-id",), 1)]
    replies = [transport.reply(f"{queue}-{name}") for name in ("reply", "id")]
    assert [(reply.status, "this row fails" in reply.error) for reply in replies if reply] == [("failed", True)] * 2


def test_huge_numbers_in_small_parts_are_skipped(failing: tuple[PostgresTransport, Tables]) -> None:
    """A small part of a message whose text would be huge is left out, and the others are read."""
    transport, tables = failing
    queue = queue_name()
    for number in ("1e131071", "-1e131071", "1e-16000"):
        text = row(queue, 1, "54000", task_id="the id", reply_key="x" * 3000)
        on_error = f'{{"task_name": "failed", "queue": "q", "kwargs": {{"a": [{{"b": [{number}]}}]}}}}'
        tables.inject(queue, f'{text[:-1]}, "on_error": {on_error}}}')
        (delivery,) = drained(transport, queue)
        assert json.loads(str(delivery.raw)) == {"task_name": "t", "task_id": "the id"}


@pytest.mark.parametrize("state", MAY_PASS)
def test_temporarily_unreadable_row_is_read_three_times(failing: tuple[PostgresTransport, Tables], state: str) -> None:
    """After too little memory or time the other rows run at once; the third failure counts, and no attempt does."""
    transport, tables = failing
    queue = queue_name()
    inject_four(tables, queue, state)
    received: list[Delivery] = []
    failures: list[TransportError] = []

    def receive() -> bool:
        try:
            received.extend(subscription.receive(limit=10, wait=0.05))
        except TransportError as exc:
            failures.append(exc)
        if len(received) == 3:
            tables.execute("UPDATE {messages} SET vt = now() WHERE queue_name = %s AND read_ct = 0", queue)
        return len(received) == 4

    subscription = transport.subscribe([queue], lease=60)
    wait_until(receive, timeout=60, what="all four deliveries")
    subscription.close()
    assert failures
    assert {str(delivery.payload.args[0]) for delivery in received[:3] if delivery.payload} == {"0", "2", "3"}
    assert (received[3].attempt, received[3].payload) == (1, None)


def test_slow_row_runs_with_never_rerun(
    failing: tuple[PostgresTransport, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that was claimed and could not be read was never started: its next delivery is its first."""
    monkeypatch.setattr(unread, "_REST", 0.01, raising=False)
    transport, tables = failing
    queue = queue_name()
    tables.inject(queue, row(queue, 1, "57014"))
    subscription = transport.subscribe([queue], lease=60)
    for _ in range(2):  # the claim, and the read
        with pytest.raises(TransportError):
            subscription.receive(limit=4, wait=0)
    subscription.close()
    tables.execute("UPDATE {messages} SET message = message - 'fails', vt = now() WHERE queue_name = %s", queue)
    ran: list[int] = []
    Consumer(transport, {"t": ran.append}, [queue], never_rerun=True).drain(timeout=30)
    assert ran == [1]
    assert transport.dead.find(queue=queue) == []


def test_remembered_read_failures_are_bounded(
    failing: tuple[PostgresTransport, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription remembers the failures of the latest rows, and forgets older ones."""
    monkeypatch.setattr(unread, "_MOST_KNOWN", 2)
    transport, tables = failing
    queue = queue_name()
    for number in range(4):
        tables.inject(queue, row(queue, number, "53200"))
    subscription = transport.subscribe([queue], lease=60)
    released = "SELECT count(*) FROM {messages} WHERE queue_name = %s AND read_ct = 0"

    def receive() -> bool:
        with pytest.raises(TransportError):
            subscription.receive(limit=4, wait=0)
        return tables.rows(released, queue) == [(4,)]

    wait_until(receive, timeout=30, what="the release of all four")
    assert subscription.unread.remembered_failures == 2
    subscription.close()


def test_row_claimed_by_others_is_not_delivered(failing: tuple[PostgresTransport, Tables]) -> None:
    """The fence holds between the claim and the reading of the content."""
    transport, tables = failing
    queue = queue_name()
    subscription = partly_read(transport, tables, queue)
    taken = "UPDATE {messages} SET read_ct = read_ct + 1 WHERE queue_name = %s AND message @> %s::jsonb"
    for number in (0, 2):
        tables.execute(taken, queue, json.dumps({"args": [number]}))
    received = retry_outages(lambda: subscription.receive(limit=4, wait=0))
    assert list(map(first, received)) == [3]
    subscription.close()


def test_unread_messages_keep_their_lease(failing: tuple[PostgresTransport, Tables], asked: list[str]) -> None:
    """A claimed and unread message is renewed in time, and delivered later."""
    transport, tables = failing
    queue = queue_name()
    subscription = partly_read(transport, tables, queue)
    claimed = "SELECT min(vt) FROM {messages} WHERE queue_name = %s AND read_ct > 0"
    vt = tables.rows(claimed, queue)
    subscription.unread.since -= 30
    received = retry_outages(lambda: subscription.receive(limit=4, wait=0))
    assert asked.count("renew leases") == 1
    assert list(map(first, received)) == [0]
    assert tables.rows(claimed, queue) > vt
    assert list(map(first, retry_outages(lambda: subscription.receive(limit=4, wait=0)))) == [2, 3]
    subscription.close()


def test_readable_messages_come_with_a_fresh_lease(
    failing: tuple[PostgresTransport, Tables],
) -> None:
    """With slow unreadable rows beside it, a healthy message is delivered once, early in its lease."""
    transport, tables = failing
    queue = queue_name()
    lease = 2.0
    for number in range(16):
        bad: dict[str, Any] = {"state": "54000", "takes": 0.12} if number % 2 else {}
        tables.inject(queue, row(queue, number, **bad))
    subscription = transport.subscribe([queue], lease=lease)
    numbers: list[Any] = []
    left: list[float] = []

    def receive() -> bool:
        for delivery in retry_outages(lambda: subscription.receive(limit=16, wait=0)):
            seconds = "SELECT extract(epoch FROM vt - clock_timestamp())::float8 FROM {messages} WHERE msg_id = %s"
            left.extend(tables.rows(seconds, int(delivery.id))[0])
            numbers.extend(delivery.payload.args if delivery.payload else [])
            assert subscription.settle([Settlement(delivery, Verdict.ACK)]) == [True]
        return len(left) >= 16

    wait_until(receive, timeout=30, what="all deliveries")
    subscription.close()
    assert sorted(numbers) == list(range(0, 16, 2))
    assert min(left) > lease / 2


def test_message_lost_during_reads_is_not_returned(
    failing: tuple[PostgresTransport, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If reading the others took long, messages that were read are renewed before they are returned."""
    transport, tables = failing
    queue = queue_name()
    inject_four(tables, queue, "54000")
    subscription = transport.subscribe([queue], lease=60)
    texts = UnreadMessages._texts

    def slow(self: UnreadMessages, group: list[Delivery]) -> Any:
        read = texts(self, group)
        if len(group) == 1:
            taken = "UPDATE {messages} SET read_ct = 2 WHERE queue_name = %s AND message @> %s::jsonb"
            tables.execute(taken, queue, json.dumps({"args": [0]}))
            self.since -= 10
        return read

    monkeypatch.setattr(UnreadMessages, "_texts", slow)
    received = retry_outages(lambda: subscription.receive(limit=4, wait=0))
    assert [first(delivery) if delivery.payload else None for delivery in received] == [None, 2, 3]
    subscription.close()


def test_close_releases_unread_messages(failing: tuple[PostgresTransport, Tables]) -> None:
    """A stopping worker releases the messages that it has claimed and not read, and the attempt does not count."""
    transport, tables = failing
    queue = queue_name()
    partly_read(transport, tables, queue).close()
    states = tables.rows("SELECT DISTINCT state, read_ct FROM {messages} WHERE queue_name = %s", queue)
    assert states == [("ready", 0)]


def test_unread_messages_delay_no_exit(failing: tuple[PostgresTransport, Tables], asked: list[str]) -> None:
    """A process that exits at once, as at a second signal, runs no further statement."""
    transport, tables = failing
    queue = queue_name()
    subscription = partly_read(transport, tables, queue)
    asked.clear()
    with pytest.raises(SystemExit), contextlib.closing(subscription):
        raise SystemExit(143)
    assert asked == []


@pytest.mark.parametrize("with_a_delivery", [False, True])
def test_unread_messages_are_renewed_without_room(
    failing: tuple[PostgresTransport, Tables], with_a_delivery: bool
) -> None:
    """A worker without free threads renews its unread messages as it renews its deliveries."""
    transport, tables = failing
    queue = queue_name()
    subscription = partly_read(transport, tables, queue)
    held = list(retry_outages(lambda: subscription.receive(limit=1, wait=0))) if with_a_delivery else []
    old = tables.rows("SELECT max(vt) FROM {messages} WHERE queue_name = %s", queue)
    subscription.unread.since -= 30
    if with_a_delivery:
        assert subscription.renew(held) == [True]
    else:
        assert subscription.receive(limit=0, wait=0) == ()
    assert tables.rows("SELECT min(vt) FROM {messages} WHERE queue_name = %s", queue) > old
    subscription.close()


def test_close_ignores_a_failed_release(failing: tuple[PostgresTransport, Tables]) -> None:
    """`close` raises no error if the server does not take the release."""
    transport, tables = failing
    queue = queue_name()
    subscription = partly_read(transport, tables, queue)
    tables.execute("ALTER TABLE {messages} ADD CONSTRAINT no_release CHECK (state <> 'ready') NOT VALID")
    try:
        subscription.close()
    finally:
        tables.execute("ALTER TABLE {messages} DROP CONSTRAINT no_release")
    assert tables.rows("SELECT sum(read_ct) FROM {messages} WHERE queue_name = %s", queue) == [(4,)]


def test_dead_letters_with_any_content_are_listed(failing: tuple[PostgresTransport, Tables]) -> None:
    """Lists and `get` return readable dead letters whole, and the others with the reason."""
    transport, tables = failing
    queue = queue_name()
    for number, state in enumerate([None, "54000", None, "XX000"]):
        tables.inject(queue, row(queue, number, state))
    Consumer(transport, OTHERS, [queue], prefetch=10).drain(timeout=30)
    letters = transport.dead.find(queue=queue)
    assert [letter.task_name for letter in letters] == ["t"] * 4
    assert [
        letter.message["args"] for letter in letters if isinstance(letter.message, dict) and not letter.omitted
    ] == [[2], [0]]
    assert ["SQLSTATE" in letter.omitted for letter in letters] == [True, False, True, False]
    assert list(transport.dead.get([letter.id for letter in letters])) == letters[::-1]
    listed = CliRunner().invoke(cli.main, ["dead", "list", "--queue", queue, "--url", f"{tables.url}?schema=unstract"])
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [
        [letter.id, queue, "t"] for letter in letters
    ]
    shown = CliRunner().invoke(cli.main, ["dead", "show", letters[0].id, "--url", f"{tables.url}?schema=unstract"])
    assert "cannot return it: this row fails (SQLSTATE XX000)" in shown.stdout
    assert transport.dead.replay([letters[0].id]) == [letters[0].id]
    assert transport.dead.purge(queue=queue) == 3


def test_dead_letter_lists_read_bounded_content(
    failing: tuple[PostgresTransport, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest dead letters come whole up to the limit, older ones with their task's name; `get` has them whole."""
    monkeypatch.setattr(dead_letters, "_MOST_LISTED", 5000)
    transport, tables = failing
    queue = queue_name()
    for number in range(4):
        tables.inject(queue, row(queue, number, kwargs={"text": "x" * 2000}))
    Consumer(transport, OTHERS, [queue], prefetch=10).drain(timeout=30)
    letters = transport.dead.find(queue=queue)
    assert [bool(letter.omitted) for letter in letters] == [False, False, True, True]
    assert [letter.message for letter in letters[2:]] == [{"task_name": "t"}] * 2
    assert not any(letter.omitted for letter in transport.dead.get([letter.id for letter in letters]))


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "4713-01-01 BC", "294276-01-01"])
def test_dead_letter_with_any_time_is_listed(failing: tuple[PostgresTransport, Tables], moment: str) -> None:
    """A time that a client cannot hold is shown as the nearest possible one."""
    transport, tables = failing
    queue = queue_name()
    transport.send([message("t", queue)])
    Consumer(transport, OTHERS, [queue]).drain(timeout=30)
    tables.execute("UPDATE {dead} SET enqueued_at = %s, buried_at = %s WHERE queue_name = %s", moment, moment, queue)
    (letter,) = transport.dead.find(queue=queue)
    assert letter.buried_at.year in (1, 9999)
    assert transport.dead.get([letter.id]) == [letter]


def test_huge_names_stop_no_queue(failing: tuple[PostgresTransport, Tables]) -> None:
    """A message with an organisation name of a megabyte runs with the beginning of the name, and can be listed."""
    transport, tables = failing
    queue = queue_name()
    transport.send([message("t", queue), message("unknown", queue), message("t", queue)])
    tables.execute("UPDATE {messages} SET org_id = repeat('o', 1000000) WHERE queue_name = %s", queue)
    ran: list[int] = []
    Consumer(transport, {"t": lambda: ran.append(1)}, [queue]).drain(timeout=30)
    assert ran == [1, 1]
    (letter,) = transport.dead.find(queue=queue)
    assert len(letter.org_id) == 65536


@pytest.mark.slow(reason="The server writes a message of more than a gigabyte.")
def test_gigabyte_of_digits_is_dead_lettered(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """PostgreSQL cannot build the text of this small row: its sender gets a failure, and the other message runs."""
    numbers = ",".join(["1e131071"] * 8300)
    tables.inject(queue, f'{{"task_name": "t", "queue": "q", "args": [{numbers}], "reply_key": "{queue}"}}')
    postgres.send([message("t", queue, 1)])
    ran: list[Any] = []
    consumer = Consumer(postgres, {"t": lambda n: ran.append(n)}, [queue], prefetch=10)
    consumer.drain(timeout=60)
    (letter,) = postgres.dead.summaries(queue=queue)
    assert ran == [1]
    assert letter.message == {"task_name": "t", "reply_key": queue}
    assert "SQLSTATE 54000" in letter.reason
    assert postgres.reply(queue) == Reply(queue, "failed", error=letter.reason)
