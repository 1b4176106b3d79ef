"""Addresses that cannot work, and missing tables: a clear error at once, and never a password in it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from pg_tables import Tables
from postgres.support import AT_ONCE, on_one_server, transport_on
from psycopg.conninfo import make_conninfo
from servers import free_port

from contract_tests.messages import message
from transports.postgres import PostgresTransport, from_url
from unstract_core import (
    ConfigurationError,
    Consumer,
    Settlement,
    TransportNotReady,
    TransportUnavailable,
    Verdict,
)

PASSWORD = "s3cr%25et-of-mine"  # noqa: S105 - a made-up one

NOWHERE = "postgresql://user@host/database"

ACTS: dict[str, Callable[[PostgresTransport], Any]] = {
    "migrate": lambda transport: transport.migrate(),
    "send": lambda transport: transport.send([message("t", "q")]),
    "send many": lambda transport: transport.send([message("t", "q")] * 2),
    "reply": lambda transport: transport.reply("key"),
    "waiting reply": lambda transport: transport.reply("key", timeout=5),
    "subscribe": lambda transport: transport.subscribe(["q"], lease=1),
    "consumer": lambda transport: Consumer(transport, {"t": print}, ["q"]).run(),
    "queues": lambda transport: transport.queues(),
    "dead letters": lambda transport: transport.dead.find(),
    "replay": lambda transport: transport.dead.replay(["1"]),
    "purge": lambda transport: transport.dead.purge(),
}


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://user:s3cr%zzet-of-mine@host/db",
        "postgresql://user:s3cret-of-mine@host/db?unheard_of=1",
        "host=h password=s3cret-of-mine unheard_of=1",
        "s3cret-of-mine",
        "host='s3cret-of-mine",
    ],
)
def test_unreadable_conninfo_is_refused_without_quoting_it(conninfo: str) -> None:
    """A conninfo that cannot be parsed raises ConfigurationError; neither its text nor its traceback contains a
    password.
    """
    with pytest.raises(ConfigurationError, match="conninfo") as caught:
        PostgresTransport(conninfo)
    shown, error = [], caught.value
    while error is not None:
        shown.append(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)  # type: ignore[assignment]
    assert "of-mine" not in " ".join(shown)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_unreachable_address_fails_at_once(act: Callable[[PostgresTransport], Any]) -> None:
    """TransportUnavailable contains the network's message and the address, and no password."""
    address = f"postgresql://user:{PASSWORD}@127.0.0.1:{free_port()}/db"
    started = time.monotonic()
    with transport_on(address, "unstract") as transport, pytest.raises(TransportUnavailable, match="refused") as caught:
        act(transport)
    assert time.monotonic() - started < AT_ONCE
    assert "127.0.0.1" in str(caught.value)
    assert not caught.value.fate_unknown
    assert "of-mine" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_missing_database_is_named_at_once(postgres_url: str, act: Callable[[PostgresTransport], Any]) -> None:
    """The error contains the server's message about the address."""
    address = make_conninfo(postgres_url, dbname="absent_database", password=PASSWORD)
    started = time.monotonic()
    with (
        transport_on(address, "unstract") as transport,
        pytest.raises(TransportUnavailable, match='"absent_database" does not exist') as caught,
    ):
        act(transport)
    assert time.monotonic() - started < AT_ONCE
    assert "of-mine" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", [name for name in ACTS if name != "migrate"])
def test_missing_tables_raise_an_error_with_remedy(postgres_url: str, schema: str, name: str) -> None:
    """TransportNotReady names `unstract-wire migrate`; once the tables exist, the same transport works."""
    with transport_on(postgres_url, schema) as transport:
        with pytest.raises(TransportNotReady, match="unstract-wire migrate") as caught:
            ACTS[name](transport)
        assert caught.value.__cause__ is not None
        transport.migrate()
        transport.send([message("t", "q")])
        subscription = transport.subscribe(["q"], lease=5)
        assert len(subscription.receive(limit=1, wait=0)) == 1
        subscription.close()


@pytest.mark.parametrize("table", ["messages", "results", "dead"])
def test_consumer_does_not_start_without_a_table(postgres: PostgresTransport, tables: Tables, table: str) -> None:
    """Misconfiguration fails at the start, not at the first message that needs the table."""
    tables.execute(f"DROP TABLE {{{table}}}")
    with pytest.raises(TransportNotReady, match="unstract-wire migrate"):
        Consumer(postgres, {"t": print}, ["q"]).run()


def test_worker_waits_for_tables_that_were_dropped(postgres: PostgresTransport, tables: Tables, queue: str) -> None:
    """An operator who recreates the schema need not restart the workers."""
    subscription = postgres.subscribe([queue], lease=60)
    for _ in range(8):
        subscription.receive(limit=1, wait=0)
    tables.execute("DROP SCHEMA {schema} CASCADE")
    for _ in range(3):
        with pytest.raises(TransportNotReady, match="unstract-wire migrate"):
            subscription.receive(limit=1, wait=0)
    postgres.migrate()
    postgres.send([message("t", queue)])
    (delivery,) = subscription.receive(limit=1, wait=0)
    assert subscription.settle([Settlement(delivery, Verdict.ACK)]) == [True]
    subscription.close()


@pytest.mark.parametrize(
    "options",
    [{"poll_interval": 0}, {"poll_interval": -1}, {"timeout": 0}, {"pool_size": 0}, {"poll_interval": float("nan")}],
)
def test_invalid_settings_raise_configuration_errors(options: dict[str, Any]) -> None:
    """An argument that cannot work raises ConfigurationError in the constructor."""
    with pytest.raises(ConfigurationError):
        PostgresTransport(NOWHERE, **options)


@on_one_server
def test_url_options_reach_transport_or_driver(postgres_url: str, schema: str) -> None:
    """`schema` and `poll_interval` go to the transport, `application_name` to the connection."""
    url = f"{postgres_url}?schema={schema}&poll_interval=0.5&listen=no&application_name=wire%20{schema}"
    transport = from_url(url)
    try:
        assert transport.migrate()[0] == f"schema {schema}"
        transport.send([message("t", "q")])
        assert Tables(postgres_url, schema).backends(f"wire {schema}")
    finally:
        transport.close()


@pytest.mark.parametrize(
    "query", ["poll_interval=soon", "listen=maybe", "pool_size=1.5", "schema=", "schema=" + "x" * 64]
)
def test_unknown_url_option_is_refused(query: str) -> None:
    """An option that cannot be understood raises ConfigurationError at once."""
    with pytest.raises(ConfigurationError):
        from_url(f"{NOWHERE}?{query}")
