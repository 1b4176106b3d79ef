"""The table of SQLSTATEs: each answer of a server is unavailable, not ready or refused on purpose."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import servers
from pg_tables import Tables
from postgres.support import on_one_server, transport_on
from psycopg import errors
from psycopg.conninfo import make_conninfo

from contract_tests.messages import message
from transports.postgres import PostgresTransport
from transports.postgres.error_mapping import translate
from transports.postgres.sqlstates import SQLSTATES, meaning_of
from unstract_core import (
    Settlement,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)
from unstract_core.errors import Meaning

EVERY_STATE = sorted(
    {
        state
        for error in vars(errors).values()
        if inspect.isclass(error) and isinstance(state := getattr(error, "sqlstate", None), str)
    }
)
KINDS = {
    Meaning.UNAVAILABLE: TransportUnavailable,
    Meaning.IN_DOUBT: TransportUnavailable,
    Meaning.NOT_READY: TransportNotReady,
    Meaning.REFUSED: TransportRefused,
}
PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.mark.parametrize("state", EVERY_STATE)
def test_every_sqlstate_has_a_deliberate_meaning(state: str) -> None:
    """Each SQLSTATE that psycopg knows is in the table, by itself or by its class."""
    assert any(key in (state, state[:2]) for answer in SQLSTATES for key in answer.keys)
    error = translate(errors.lookup(state)("no"), "send")
    assert isinstance(error, KINDS[meaning_of(state).meaning])


def test_docs_table_equals_code() -> None:
    """docs/errors.md lists the same SQLSTATEs, causes and meanings, in the same order."""
    _, _, section = PAGE.read_text().partition("\n## SQLSTATEs\n")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|", section.partition("\n#")[0], re.M)
    assert rows == [
        (", ".join(f"`{key}`" for key in answer.keys), answer.cause, answer.meaning.value) for answer in SQLSTATES
    ]


def raising(tables: Tables, state: str) -> None:
    """Let a trigger raise an error of this SQLSTATE for each message."""
    tables.execute(
        f"""CREATE FUNCTION {{schema}}.fail() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$;
            CREATE TRIGGER fail BEFORE INSERT ON {{messages}} FOR EACH ROW EXECUTE FUNCTION {{schema}}.fail()"""
    )


RAISED = ["25006", "40001", "40P01", "53100", "53200", "53300", "53400", "54000", "55P03", "57014", "58030", "XX000"]


@on_one_server
@pytest.mark.parametrize("state", RAISED)
def test_answer_that_can_pass_is_unavailable_and_known(
    postgres: PostgresTransport, tables: Tables, queue: str, state: str
) -> None:
    """The server has rolled the statement back: a sender may send again, and a settlement is kept."""
    postgres.send([message("t", queue)])
    subscription = postgres.subscribe([queue], lease=60)
    (delivery,) = subscription.receive(limit=1, wait=5)
    raising(tables, state)
    with pytest.raises(TransportUnavailable) as caught:
        postgres.send([message("t", queue)])
    assert not caught.value.fate_unknown
    follow_up = Settlement(delivery, Verdict.ACK, follow_up=message("f", queue))
    with pytest.raises(TransportUnavailable) as caught:
        subscription.settle([follow_up])
    assert not caught.value.fate_unknown
    tables.execute("DROP TRIGGER fail ON {messages}")
    assert subscription.settle([follow_up]) == [True]
    subscription.close()


@pytest.mark.parametrize("source", ["varsup.c", "multixact.c", "xact.c", "bufmgr.c", ""])
def test_server_limits_are_unavailable(source: str) -> None:
    """They pass after a vacuum or in another transaction; also if a server or pooler names no source."""
    assert meaning_of("54000", source).meaning is Meaning.UNAVAILABLE


@on_one_server
def test_value_that_is_too_large_is_refused(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A value that no index can hold has the SQLSTATE of wraparound protection, and another cause."""
    tables.execute("CREATE INDEX large ON {messages} ((message #>> '{{args, 0}}'))")
    with pytest.raises(TransportRefused, match="54000"):
        postgres.send([message("t", queue, os.urandom(10_000).hex())])


@pytest.mark.parametrize("behind", [1, 40, 5000])
@pytest.mark.parametrize("many", [1, 3])
def test_existing_ids_fail_no_send_or_settlement(
    postgres: PostgresTransport, tables: Tables, queue: str, behind: int, many: int
) -> None:
    """After a restore, or with forged ids, sends, follow-ups and dead letters take the next free ids."""
    postgres.send([message("t", queue), message("t", queue)])
    subscription = postgres.subscribe([queue], lease=60)
    first, second = subscription.receive(limit=2, wait=5)
    tables.execute(
        "INSERT INTO {messages} SELECT last_value + n, 'forged', '{{}}', '', now(), now(), 0, 5, 'ready'"
        " FROM {schema}.pg_queue_message_msg_id_seq, generate_series(1, %s) AS n",
        behind,
    )
    tables.execute(
        "INSERT INTO {dead} SELECT n, 1, 'forged', '{{}}', '', 5, 1, '', NULL, now(), now()"
        " FROM generate_series(1, %s) AS n",
        behind,
    )
    assert len(postgres.send([message("t", queue)] * many)) == many
    assert postgres.send([message("t", queue)])
    follow_up = Settlement(first, Verdict.ACK, follow_up=message("f", queue))
    assert subscription.settle([follow_up, Settlement(second, Verdict.BURY, reason="r")]) == [True, True]
    assert tables.count(queue) == many + 2
    subscription.close()


def test_another_unique_key_refuses(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A unique index of the operator's says no for good: the same message can never be sent."""
    tables.execute("CREATE UNIQUE INDEX once ON {messages} (queue_name)")
    postgres.send([message("t", queue)])
    with pytest.raises(TransportRefused):
        postgres.send([message("t", queue)])


@on_one_server
def test_existing_id_within_is_unavailable(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """The error says that the caller may run its transaction again, which then succeeds."""
    postgres.send([message("t", queue)])
    tables.execute(
        "INSERT INTO {messages} SELECT last_value + 1, 'forged', '{{}}', '', now(), now(), 0, 5, 'ready'"
        " FROM {schema}.pg_queue_message_msg_id_seq"
    )
    with tables.connect(autocommit=False) as connection:
        with pytest.raises(TransportUnavailable) as caught:
            postgres.send([message("t", queue)], within=connection.cursor())
        assert not caught.value.fate_unknown
        connection.rollback()
        postgres.send([message("t", queue)], within=connection.cursor())
    assert tables.count(queue) == 2


@on_one_server
def test_error_at_commit_refuses_the_send(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """A deferred constraint fails after the rows were returned: the send is refused, prepared or not."""
    for _ in range(3):
        postgres.send([message("t", queue)])
    tables.execute(
        """CREATE FUNCTION {schema}.late() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN RAISE EXCEPTION 'no'; END $$;
           CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {messages} DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION {schema}.late()"""
    )
    for _ in range(3):
        postgres._notifier._last[queue] = float("inf")
        with pytest.raises(TransportRefused):
            postgres.send([message("t", queue)])
    assert tables.count(queue) == 3


@on_one_server
def test_sequence_at_its_end_is_not_ready(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """An operator can raise its maximum, so nothing is refused for good."""
    postgres.send([message("t", queue), message("t", queue)])
    tables.execute("ALTER SEQUENCE {schema}.pg_queue_message_msg_id_seq MAXVALUE 2")
    with pytest.raises(TransportNotReady, match="MAXVALUE"):
        postgres.send([message("t", queue)])


@pytest.fixture(scope="module")
def standby_away() -> Iterator[servers.PrivateServer]:
    """A primary whose synchronous standby does not answer."""
    with servers.private_server() as server:
        with transport_on(server.url, "unstract") as transport:
            transport.migrate()
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
            connection.execute("SELECT pg_reload_conf()")
        yield server


@pytest.mark.parametrize("hidden", [False, True], ids=["warning", "warnings hidden"])
def test_send_that_was_not_replicated_is_in_doubt(
    standby_away: servers.PrivateServer, queue: str, hidden: bool
) -> None:
    """With the synchronous standby away a send does not return an id that a failover would take back."""
    url = standby_away.url
    if hidden:
        url = make_conninfo(url, options="-c client_min_messages=error")
    with transport_on(url, "unstract", statement_timeout=0.3) as transport:
        for _ in range(3):  # with a notification, without one, and prepared
            with pytest.raises(TransportUnavailable, match="replicated") as caught:
                transport.send([message("t", queue)])
            assert caught.value.fate_unknown
        (finding,) = [finding for finding in transport.check_up() if finding.name == "durability"]
        assert (finding.level, "synchronous_standby_names" in finding.what) == ("warning", True)
