"""Dead letters: their content, and the operations of an operator."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from click.testing import CliRunner
from pg_tables import Tables
from postgres.support import in_background, on_one_server, transport_on
from queues import bury, receive_all

from contract_tests.messages import message, then
from transports.postgres import PostgresTransport, dead_letters
from unstract_core import Consumer, Settlement, TransportError, TransportUnavailable, Verdict, cli, to_wire
from unstract_core.cli.commands import dead_letters as dead
from unstract_core.transport import DeadLetter


def buried(transport: PostgresTransport, queue: str, number: int = 1) -> list[DeadLetter]:
    """Send messages to an empty queue and dead-letter them; return the dead letters, the oldest first."""
    transport.send([message("t", queue, n, priority=n % 10 + 1, org_id="org") for n in range(number)])
    bury(transport, queue)
    return list(transport.dead.find(queue=queue, limit=number))[::-1]


def fail_to_delete(tables: Tables, dead_id: str, state: str = "P0001") -> None:
    """Let the deletion of one dead letter fail with a SQLSTATE."""
    tables.execute(
        f"""CREATE FUNCTION {{schema}}.stop() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF OLD.dead_id = {dead_id} THEN RAISE EXCEPTION 'stop' USING ERRCODE = '{state}'; END IF;
            RETURN OLD; END $$;
            CREATE TRIGGER stop BEFORE DELETE ON {{dead}} FOR EACH ROW EXECUTE FUNCTION {{schema}}.stop()"""
    )


def test_dead_letter_holds_all_fields(postgres: PostgresTransport, queue: str) -> None:
    """A dead letter has the payload, reason, attempts, both times, organisation, priority and the result."""
    sent = message("t", queue, {"a": [1, 2.5, None]}, org_id="acme", priority=8, on_success=then("done", queue))
    before = datetime.datetime.now(datetime.UTC)
    postgres.send([sent])
    subscription = postgres.subscribe([queue], lease=60)
    for _ in range(2):
        (delivery,) = subscription.receive(limit=1, wait=0)
        subscription.settle([Settlement(delivery, Verdict.RETRY)])
    (delivery,) = subscription.receive(limit=1, wait=0)
    subscription.settle([Settlement(delivery, Verdict.BURY, reason="Type: text", result={"paid": 5})])
    subscription.close()
    (letter,) = postgres.dead.find(queue=queue)
    assert letter.message == to_wire(sent.payload)
    assert (letter.task_name, letter.queue, letter.reason, letter.attempts) == ("t", queue, "Type: text", 3)
    assert (letter.result, letter.org_id, letter.priority) == ({"paid": 5}, "acme", 8)
    minute = datetime.timedelta(minutes=1)
    assert before - minute < letter.enqueued_at <= letter.buried_at < before + minute
    assert postgres.dead.get([letter.id]) == [letter]


def test_dead_letters_keep_their_reasons(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Unreadable messages, unknown tasks, too many deliveries and raised errors each have their own reason."""
    tables.inject(queue, '{"task_name": 7}')
    often = tables.inject(queue, f'{{"task_name": "t", "queue": "{queue}"}}')
    tables.execute("UPDATE {messages} SET read_ct = 9 WHERE msg_id = %s", int(often))
    postgres.send([message("nobody", queue), message("raise", queue)])

    def fail() -> None:
        raise RuntimeError("broken")

    tasks = {"t": lambda: None, "raise": fail}
    Consumer(postgres, tasks, [queue], max_attempts=2, backoff=0).drain(timeout=10)
    reasons = {letter.reason.split(":")[0]: letter.attempts for letter in postgres.dead.find(queue=queue)}
    assert reasons == {"MalformedPayload": 1, "UnknownTask": 1, "TooManyAttempts": 10, "RuntimeError": 2}


def test_find_returns_the_newest_first(postgres: PostgresTransport, queue: str) -> None:
    """`find` returns at most `limit` dead letters, newest first, of one queue or of all."""
    letters = buried(postgres, queue, 5)
    others = buried(postgres, queue + "-2", 2)
    assert postgres.dead.find(queue=queue) == letters[::-1]
    assert postgres.dead.find() == [*others[::-1], *letters[::-1]]
    assert postgres.dead.find(limit=3) == [*others[::-1], letters[-1]]
    assert postgres.dead.find(queue="absent") == []


def test_replayed_letter_is_a_new_message(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A replayed message has a new id and its first attempt, is last in its queue, and leaves the dead letters."""
    (letter,) = buried(postgres, queue)
    postgres.send([message("waiting", queue, priority=letter.priority)])
    assert postgres.dead.replay([letter.id]) == [letter.id]
    assert postgres.dead.find(queue=queue) == []
    first, second = receive_all(postgres, queue)
    assert first.payload is not None
    assert first.payload.task_name == "waiting"
    assert (second.attempt, second.org_id, second.priority) == (1, "org", letter.priority)
    assert int(second.id) > int(first.id)
    assert tables.rows("SELECT message FROM {messages} WHERE msg_id = %s", int(second.id)) == [(letter.message,)]


def test_replay_keeps_the_order_of_dead_letters(postgres: PostgresTransport, queue: str) -> None:
    """The order of the given ids does not matter, and ids that do not exist are ignored."""
    letters = buried(postgres, queue, 10)
    ids = [letter.id for letter in letters]
    assert postgres.dead.replay([*ids[::-1], "999999999", "x", "-1", "", "9" * 40, ids[0]]) == ids
    replayed = sorted(receive_all(postgres, queue), key=lambda delivery: int(delivery.id))
    assert [delivery.payload.args for delivery in replayed if delivery.payload] == [
        letter.message["args"] for letter in letters if isinstance(letter.message, dict)
    ]
    assert postgres.dead.replay(ids) == []


def test_refused_replay_keeps_the_dead_letters(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A batch is replayed as a whole or not at all."""
    letters = buried(postgres, queue, 3)
    tables.execute("ALTER TABLE {messages} ADD CHECK (message -> 'args' <> '[1]')")
    with pytest.raises(Exception, match="check constraint"):
        postgres.dead.replay([letter.id for letter in letters])
    assert list(postgres.dead.find(queue=queue))[::-1] == letters


def test_purge_removes_exactly_the_filtered_letters(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """Filters are ids, queue and age, also combined; without a filter, all dead letters are removed."""
    first, second, third = buried(postgres, queue, 3)
    (other,) = buried(postgres, queue + "-2")
    tables.execute("UPDATE {dead} SET buried_at = now() - interval '1 hour' WHERE dead_id = %s", int(second.id))
    assert postgres.dead.purge(ids=[]) == 0
    assert postgres.dead.purge(ids=["x", "999999999"]) == 0
    assert postgres.dead.purge(queue="absent") == 0
    assert postgres.dead.purge(older_than=7200) == 0
    assert postgres.dead.purge(ids=[other.id], queue=queue) == 0
    assert postgres.dead.purge(ids=[first.id, second.id], queue=queue, older_than=1800) == 1
    assert {letter.id for letter in postgres.dead.find()} == {first.id, third.id, other.id}
    assert postgres.dead.purge(ids=[first.id]) == 1
    assert postgres.dead.purge(queue=queue) == 1
    assert postgres.dead.purge() == 1
    assert postgres.dead.find() == []


@pytest.mark.parametrize(
    "text",
    ['{"a": ' + "[" * 3000 + "]" * 3000 + "}", '{"a": 1e5000}', '"text"', "null", "[]"],
    ids=["very deep", "very long number", "string", "null", "array"],
)
def test_unparsable_letter_hides_no_other(postgres: PostgresTransport, tables: Tables, queue: str, text: str) -> None:
    """Dead letters with any JSON can be listed, shown, replayed and purged."""
    tables.inject(queue, text)
    Consumer(postgres, {"t": lambda: None}, [queue]).drain(timeout=10)
    (other,) = buried(postgres, queue + "-2")
    newest, oldest = postgres.dead.find()
    assert newest == other
    assert [letter.id for letter in postgres.dead.get([oldest.id])] == [oldest.id]
    assert oldest.reason.startswith("MalformedPayload")
    assert postgres.dead.replay([oldest.id]) == [oldest.id]
    assert tables.rows("SELECT message = %s::jsonb FROM {messages} WHERE queue_name = %s", text, queue) == [(True,)]
    assert postgres.dead.purge() == 1


@pytest.mark.parametrize("id", [10**18, 2**63 - 1])
def test_dead_letter_of_any_id_works(postgres: PostgresTransport, tables: Tables, queue: str, id: int) -> None:
    """An id is any number that PostgreSQL can hand out; a larger one does not exist."""
    uses: list[Callable[[], Sequence[str]]] = [
        lambda: postgres.dead.replay([str(id)]),
        lambda: [str(id)] * postgres.dead.purge(ids=[str(id)]),
    ]
    for use in uses:
        buried(postgres, queue)
        tables.execute("UPDATE {dead} SET dead_id = %s", id)
        assert [letter.id for letter in postgres.dead.get([str(id), str(2**63), "9" * 19])] == [str(id)]
        assert use() == [str(id)]
        receive_all(postgres, queue)


def test_replay_and_purge_work_in_batches(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is one commit, the oldest first; dead letters that arrive meanwhile stay."""
    monkeypatch.setattr(dead_letters, "_BATCH", 4)
    letters = buried(postgres, queue, 10)
    other = buried(postgres, queue + "-2", 1)
    seen: list[tuple[list[str], int]] = []
    for batch in postgres.dead.replay_in_batches(queue=queue):
        left = tables.rows("SELECT count(*) FROM {dead} WHERE queue_name = %s", queue)
        seen.append((list(batch), int(left[0][0]) - len(seen)))
        tables.execute("UPDATE {messages} SET priority = 10 WHERE queue_name = %s", queue)
        subscription = postgres.subscribe([queue], lease=60)
        (delivery,) = subscription.receive(limit=1, wait=5)
        assert subscription.settle([Settlement(delivery, Verdict.BURY, reason="again")]) == [True]
        subscription.close()
    ids = [letter.id for letter in letters]
    assert seen == [(ids[:4], 6), (ids[4:8], 2), (ids[8:], 0)]
    assert [letter.reason for letter in postgres.dead.find(queue=queue)] == ["again"] * 3
    assert list(postgres.dead.purge_in_batches()) == [4]
    assert postgres.dead.find() == []
    assert other[0].queue == queue + "-2"


def test_concurrent_replays_send_each_letter_once(
    make_postgres: Callable[..., PostgresTransport], queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead letter that one operator has replayed is not replayed by another."""
    monkeypatch.setattr(dead_letters, "_BATCH", 5)
    first, second = make_postgres(), make_postgres()
    ids = [letter.id for letter in buried(first, queue, 60)]
    replayed: list[str] = []
    with in_background(
        *(lambda operator=operator: replayed.extend(operator.dead.replay(queue=queue)) for operator in (first, second))
    ):
        pass
    assert sorted(replayed, key=int) == ids
    assert len(receive_all(first, queue)) == 60


@on_one_server
@pytest.mark.parametrize("state", ["P0001", "53200"])
@pytest.mark.parametrize("doing", ["replay", "purge"])
def test_replay_error_counts_earlier_batches(
    postgres: PostgresTransport,
    tables: Tables,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
    doing: str,
    state: str,
) -> None:
    """The error of a later batch contains the number of dead letters before it; that of the first batch has none."""
    monkeypatch.setattr(dead_letters, "_BATCH", 2)
    ids = [letter.id for letter in buried(postgres, queue, 8)]
    fail_to_delete(tables, ids[4], state)
    use: Callable[[], object] = partial(getattr(postgres.dead, doing), queue=queue)
    with pytest.raises(TransportError, match=f"4 dead letters were {doing}e?d; .*stop") as caught:
        use()
    assert getattr(caught.value, "fate_unknown", True)
    assert "nothing took effect" not in str(caught.value)
    assert [letter.id for letter in postgres.dead.find(queue=queue)] == ids[:3:-1]
    with pytest.raises(TransportError) as caught:
        use()
    assert "dead letters were" not in str(caught.value)
    assert not getattr(caught.value, "fate_unknown", False)


@on_one_server
def test_earlier_batches_are_kept_after_failure(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The iterator yields each finished batch; its error counts them, and `fate_unknown` is about the failed one."""
    monkeypatch.setattr(dead_letters, "_BATCH", 2)
    ids = [letter.id for letter in buried(postgres, queue, 6)]
    fail_to_delete(tables, ids[5], "53200")
    batches: list[list[str]] = []
    with pytest.raises(
        TransportUnavailable, match=r"4 dead letters were replayed; .*nothing of it took effect"
    ) as caught:
        batches.extend(map(list, postgres.dead.replay_in_batches(queue=queue)))
    assert batches == [ids[:2], ids[2:4]]
    assert not caught.value.fate_unknown


@on_one_server
def test_slow_batch_is_repeated_with_fewer_letters(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit of a statement bounds the batch and not the command."""
    monkeypatch.setattr(dead_letters, "_BATCH", 8)
    buried(postgres, queue, 9)
    tables.execute(
        """CREATE FUNCTION {schema}.slow() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN PERFORM pg_sleep(0.15); RETURN OLD; END $$;
           CREATE TRIGGER slow BEFORE DELETE ON {dead} FOR EACH ROW EXECUTE FUNCTION {schema}.slow()"""
    )
    with transport_on(tables.url, tables.schema, statement_timeout=0.8) as transport:
        assert len(transport.dead.replay(queue=queue)) == 9
    assert len(receive_all(postgres, queue)) == 9


@on_one_server
def test_long_commands_report_progress(
    postgres: PostgresTransport, tables: Tables, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`replay --all` and `purge` report progress on stderr, also if the database fails on the way."""
    monkeypatch.setattr(dead_letters, "_BATCH", 2)
    monkeypatch.setattr(dead, "_PROGRESS", 0.0)
    url = f"{tables.url}?schema={tables.schema}"
    ids = [letter.id for letter in buried(postgres, queue, 6)]
    ended = CliRunner().invoke(cli.main, ["dead", "replay", "--queue", queue, "--all", "--url", url])
    assert ended.stdout.splitlines() == ["replayed 6", *ids]
    assert [f"replayed {n} so far" in ended.stderr for n in (2, 4, 6)] == [True] * 3
    tables.execute("DELETE FROM {messages}")
    ids = [letter.id for letter in buried(postgres, queue, 6)]
    fail_to_delete(tables, ids[4])
    ended = CliRunner().invoke(cli.main, ["dead", "purge", "--queue", queue, "--yes", "--url", url])
    assert ended.exit_code != 0
    assert "purged 4 before this ended" in ended.stderr
    assert [letter.id for letter in postgres.dead.find(queue=queue)] == ids[:3:-1]
