"""Queue names of any kind: they work, or they are refused with their path before any message is sent."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable

import pytest
from cli.outcomes import the_one_line
from cli.records import EveryRecord
from click.testing import CliRunner
from consumers import running
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pg_tables import Tables
from postgres.support import AT_ONCE, LONG_POLL, transport_on

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from contract_tests.time_limits import start
from transports.postgres import PostgresTransport
from unstract_core import Consumer, PayloadError, cli
from unstract_core.codec import MAX_NAME_BYTES

Shared = tuple[PostgresTransport, Tables]

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
HOSTILE = st.sampled_from(
    [
        *" '\"%{};\\\n\r\t\x1b\u2028\u202e",
        "%s",
        "%(queue)s",
        "{messages}",
        "--",
        "$1",
        "$$",
        "''",
        "'; DROP TABLE x; --",
        "💥",
        "e\u0301",
    ]
)
NAMES = (st.text(LETTERS, min_size=1, max_size=64) | st.lists(HOSTILE, min_size=1, max_size=12).map("".join)).filter(
    lambda name: len(name.encode()) <= MAX_NAME_BYTES
)
SCRIPTS = "räkning счёт فاتورة חשבונית 請求書 청구서 चालान ใบแจ้งหนี้ τιμολόγιο ინვოისი 𓀀𓁐 🧾"
LONGEST = "é" * (MAX_NAME_BYTES // 2)


@settings(max_examples=20)
@given(NAMES)
@example("with spaces and 'quotes' and \"more\"")
@example("100%")
@example("two\nlines\r\n")
@example(" ")
@example("-")
@example("--queue")
@example("x" * MAX_NAME_BYTES)
@example(LONGEST)
@example(SCRIPTS)
def test_queue_of_any_name_works(shared: Shared, name: str) -> None:
    """Messages can be sent, claimed, retried, dead-lettered, replayed and purged, and no other queue is touched."""
    transport, tables = shared
    other = f"{name}x" if len(name) < 64 else "x"
    transport.send([message("t", other)])
    transport.send([message("t", name, on_success=then("done", name))])
    transport.send([message("unknown", name), message("done", name, None)])
    with EveryRecord() as records:
        consumer = Consumer(transport, {"t": lambda: 1, "done": lambda result: None}, [name])
        assert consumer.drain(timeout=60) == 3
    lines = [line for line in records.text().split("\n") if "message_rejected" in line]
    assert len(lines) == 1
    (state,) = transport.queues([name])
    assert (state.queue, state.ready, state.in_flight, state.dead) == (name, 0, 0, 1)
    assert name in [state.queue for state in transport.queues()]
    (letter,) = transport.dead.find(queue=name)
    assert letter.queue == name
    assert transport.dead.replay(queue=name) == [letter.id]
    assert (tables.count(name), tables.count(other)) == (1, 1)
    assert transport.dead.purge(queue=name) == 0
    tables.execute("TRUNCATE {messages}")


@settings(max_examples=5)
@given(NAMES)
@example("two\nlines")
@example("x" * MAX_NAME_BYTES)
@example(LONGEST)
@example(SCRIPTS)
def test_queue_of_any_name_wakes_its_worker(shared: Shared, name: str) -> None:
    """The name fits into a notification, so a message in an idle queue is claimed at once."""
    transport, tables = shared
    with transport_on(tables.url, tables.schema, poll_interval=LONG_POLL) as waiting:
        subscription = waiting.subscribe([name], lease=60)
        wait, waits = subscription._listener.wait, threading.Event()

        def wait_and_report(seconds: float) -> bool:
            waits.set()
            return wait(seconds)

        subscription._listener.wait = wait_and_report  # type: ignore[method-assign]
        try:
            taken = start(lambda: subscription.receive(limit=1, wait=LONG_POLL))
            assert waits.wait(60)
            transport.send([message("t", name)])
            assert [delivery.queue for delivery in taken(AT_ONCE * 5)] == [name]
        finally:
            subscription.close()
    tables.execute("TRUNCATE {messages}")


@pytest.mark.parametrize("name", ["x" * 300, "é" * 129, "", "nul\0", "\ud800"])
@pytest.mark.parametrize("act", ["send", "send many", "within", "follow-up", "subscribe"])
def test_impossible_queue_name_is_refused_with_path(shared: Shared, name: str, act: str) -> None:
    """300 characters, empty, NUL, a lone surrogate: PayloadError with the path, and nothing is sent."""
    transport, tables = shared
    with tables.connect(autocommit=False) as connection:
        acts: dict[str, Callable[[], object]] = {
            "send": lambda: transport.send([message("t", name)]),
            "send many": lambda: transport.send([message("t", "fine"), message("t", name)]),
            "within": lambda: transport.send([message("t", name)], within=connection.cursor()),
            "follow-up": lambda: transport.send([message("t", "fine", on_success=then("done", name))]),
            "subscribe": lambda: transport.subscribe(["fine", name], lease=1),
        }
        with pytest.raises(PayloadError) as caught:
            acts[act]()
    assert caught.value.path == ("$.on_success.queue" if act == "follow-up" else "$.queue")
    assert str(caught.value).startswith(caught.value.path)
    assert tables.rows("SELECT count(*) FROM {messages}") == [(0,)]


def test_command_refuses_a_too_long_queue(shared: Shared) -> None:
    """The worker does not start, and one line says what the limit is."""
    _, tables = shared
    arguments = ["worker", "--app", "cli.shared:tasks", "--queue", "x" * 300, "--log-level", "ERROR"]
    ended = CliRunner().invoke(cli.main, [*arguments, "--url", f"{tables.url}?schema={tables.schema}"])
    line = the_one_line(ended)
    assert "$.queue: " in line
    assert f"longer than {MAX_NAME_BYTES} bytes" in line


@settings(max_examples=10)
@given(NAMES.filter(lambda name: not name.startswith("-")))
@example("two\nlines")
@example('it\'s "quoted", 100 %')
@example(SCRIPTS)
def test_command_accepts_and_lists_any_queue(shared: Shared, name: str) -> None:
    """An option takes the name as typed; a column keeps it on one line, and JSON has it whole."""
    transport, tables = shared
    url = f"{tables.url}?schema={tables.schema}"

    def run(*arguments: str) -> str:
        ended = CliRunner().invoke(cli.main, [*arguments, "--url", url])
        assert (ended.exit_code, ended.stderr) == (0, ""), ended.stderr
        return str(ended.stdout)

    transport.send([message("unknown", name)])
    Consumer(transport, {"t": print}, [name]).drain(timeout=60)
    assert [state["queue"] for state in json.loads(run("queues", "--queue", name, "--json"))] == [name]
    for listing in (run("queues", "--queue", name), run("dead", "list", "--queue", name)):
        lines = listing.removesuffix("\n").split("\n")
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)
    assert "1" in run("dead", "replay", "--queue", name, "--all")
    assert tables.count(name) == 1
    tables.execute("TRUNCATE {messages}")


def test_log_lines_stay_single_lines(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """With any queue name, an event is one line, in which the name cannot pass for a field."""
    transport, _ = shared
    name = "q\nwire.worker_started pid=1 queue='x' \x1b[2J"
    transport.send([message("unknown", name)])
    with caplog.at_level(logging.DEBUG), running(Consumer(transport, {"t": print}, [name])):
        wait_until(lambda: any("message_rejected" in text for text in caplog.messages), what="the burial")
    for text in caplog.messages:
        assert text.isprintable(), text
        assert "pid=1" not in re.sub(r'"(?:\\.|[^"\\])*"', "", text)  # but between quotes
    transport.dead.purge(queue=name)
