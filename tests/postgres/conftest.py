"""Fixtures of the tests of what only PostgreSQL promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import servers
from harness import queue_name
from pg_tables import Tables
from postgres.support import application, named

from transports.postgres import PostgresTransport
from transports.postgres.session import Session


@pytest.fixture
def tables(embedded_url: str, schema: str) -> Tables:
    """The tables of the test's own schema, behind the transport's back."""
    return Tables(embedded_url, schema)


@pytest.fixture
def queue() -> str:
    return queue_name()


@pytest.fixture
def name() -> str:
    """An application name, by which the connections of one transport are found on the server."""
    return application()


@pytest.fixture
def make_named(embedded_url: str, schema: str, name: str) -> Iterator[Callable[..., PostgresTransport]]:
    """A factory of transports on the test's own schema whose connections carry `name`; closes what it made."""
    made: list[PostgresTransport] = []

    def make(**options: object) -> PostgresTransport:
        transport = PostgresTransport(named(embedded_url, name), schema, **options)  # type: ignore[arg-type]
        made.append(transport)
        transport.migrate()
        return transport

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What subscriptions and waiting callers have asked the server from here on, one entry for each statement."""
    asked: list[str] = []
    execute = Session.execute

    def counted(session: Session, doing: str, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        asked.append(doing)
        return execute(session, doing, statement, parameters)

    monkeypatch.setattr(Session, "execute", counted)
    return asked


@pytest.fixture(scope="module")
def private() -> Iterator[servers.PrivateServer]:
    """A server that the tests of one module may stop and freeze; each leaves it running."""
    with servers.private_server() as server:
        yield server
