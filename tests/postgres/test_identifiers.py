"""Hostile names of schema, task, organisation and id have no effect on the server.

test_migrate.py migrates schemas of any name, and test_queue_names.py uses queues of any name. The tests here check that
library and command touch nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

import psycopg
from cli.outcomes import the_one_line
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres.support import on_one_server, transport_on
from psycopg import sql
from queues import queue_name

from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from transports.postgres.statements import LONGEST_IDENTIFIER
from unstract_core import Consumer, cli
from unstract_core.codec import MAX_NAME_BYTES

PIECES = st.sampled_from(
    [
        *"\"'%{};.\\ \n\tA日é🧾/?#&=@:",
        "%s",
        "%%",
        "%(queue)s",
        "{messages}",
        "--",
        "/*",
        "$1",
        '"; DROP SCHEMA public; --',
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=9).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
)
SCHEMAS = TEXTS.filter(lambda name: len(name.encode()) <= LONGEST_IDENTIFIER and not name.startswith("pg_"))
NAMES = TEXTS.filter(lambda name: len(name.encode()) <= MAX_NAME_BYTES)


def elsewhere(tables: Tables, schema: str) -> list[tuple[object, ...]]:
    """Return every relation outside one schema, with the rows of our tables there."""
    relations = tables.rows(
        "SELECT n.nspname, c.relname, obj_description(c.oid, 'pg_class') FROM pg_class AS c"
        " JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname NOT IN (%s, 'pg_toast') AND n.nspname !~ '^pg_temp|^pg_toast_temp' ORDER BY 1, 2",
        schema,
    )
    return [*relations, *tables.rows("SELECT msg_id, message::text, vt, read_ct FROM {messages} ORDER BY 1")]


@on_one_server
@settings(max_examples=12)
@given(SCHEMAS, NAMES, NAMES, NAMES)
@example('a"b', "it's", '"; DROP SCHEMA public; --', "%s")
@example("x" * LONGEST_IDENTIFIER, "t" * MAX_NAME_BYTES, "o" * MAX_NAME_BYTES, "i" * MAX_NAME_BYTES)
@example("100% {messages}", "a\nb", "a b", "é")
def test_only_the_named_schema_is_touched(
    shared: tuple[PostgresTransport, Tables], schema: str, task: str, org: str, id: str
) -> None:
    """Library and command work with hostile names of schema, task, organisation and id, in this schema alone."""
    neighbour, tables = shared
    neighbour.send([message("t", "kept")])
    before = elsewhere(tables, schema)
    url = f"{tables.url}?schema={quote(schema, safe='')}"
    queue = queue_name()

    def run(*arguments: str) -> object:
        ended = CliRunner().invoke(cli.main, [*arguments, "--json", "--url", url])
        assert (ended.exit_code, ended.stderr) == (0, ""), ended.stderr
        return json.loads(ended.stdout)

    try:
        assert len(run("migrate")["created"]) == 10  # type: ignore[index]
        with transport_on(tables.url, schema) as transport:
            seen: list[str] = []
            with tables.connect(autocommit=False) as connection:
                transport.send([message("unknown" + task[:9], queue, org_id=org)], within=connection.cursor())
                connection.commit()
            transport.send([message(task, queue, org_id=org, task_id=id, on_success=then(f"{task[:9]}-done", queue))])
            tasks: dict[str, Callable[..., object]] = {task: lambda: "result", f"{task[:9]}-done": seen.append}
            assert Consumer(transport, tasks, [queue]).drain(timeout=60) == 2
            assert seen == ["result"]
            status = transport.reply(id)
            assert status is not None
            assert status.status == "completed"
            (letter,) = transport.dead.find()
            assert letter.org_id == org
        assert [state["queue"] for state in run("queues")] == [queue]  # type: ignore[attr-defined]
        assert run("migrate") == {"created": []}
        run("dead", "replay", letter.id)
        assert elsewhere(tables, schema) == before
    finally:
        with psycopg.connect(tables.url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def test_impossible_schema_is_a_one_line_error() -> None:
    """For a name that is empty or too long by a byte, the command prints one line and does not connect."""
    for schema, said in (("x" * 64, "64 bytes long; PostgreSQL keeps 63"), ("", "non-empty"), ("a%00b", "without NUL")):
        ended = CliRunner().invoke(
            cli.main, ["migrate", "--url", f"postgresql://nobody@127.0.0.1:1/db?schema={schema}"]
        )
        assert said in the_one_line(ended)
