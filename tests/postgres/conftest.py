"""Fixtures for the guarantees of PostgreSQL. Each test runs on both servers unless it says otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import servers
from pg_tables import Tables
from postgres.support import application, named, second_server
from psycopg.conninfo import make_conninfo
from queues import queue_name

from transports.postgres import PostgresTransport
from transports.postgres.connection import Rows
from transports.postgres.listener import Listener
from transports.postgres.statement import Statement


@pytest.fixture(scope="session", params=["embedded", pytest.param("server", marks=second_server)])
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The URL of each server in turn: the embedded one and the machine's, which differ in their major version."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def schema(postgres_url: str) -> Iterator[str]:
    """A schema on the server, not created yet."""
    with servers.fresh_schema(postgres_url) as name:
        yield name


@pytest.fixture
def tables(postgres_url: str, schema: str) -> Tables:
    """The tables of the test's own schema, accessed without the transport."""
    return Tables(postgres_url, schema)


@pytest.fixture
def queue() -> str:
    return queue_name()


@pytest.fixture
def name() -> str:
    """An application name, by which the connections of one transport are found on the server."""
    return application()


@contextlib.contextmanager
def _making(url: str, schema: str) -> Iterator[Callable[..., PostgresTransport]]:
    with contextlib.ExitStack() as made:

        def make(**options: Any) -> PostgresTransport:
            transport = PostgresTransport(url, schema, **options)
            made.callback(transport.close)
            transport.migrate()
            return transport

        yield make


@pytest.fixture
def make_postgres(postgres_url: str, schema: str) -> Iterator[Callable[..., PostgresTransport]]:
    """A factory of transports on the test's own migrated schema; it closes them at the end."""
    with _making(postgres_url, schema) as make:
        yield make


@pytest.fixture
def make_named(postgres_url: str, schema: str, name: str) -> Iterator[Callable[..., PostgresTransport]]:
    """A factory as `make_postgres`, of transports whose connections carry `name`."""
    with _making(named(postgres_url, name), schema) as make:
        yield make


@pytest.fixture
def postgres(make_postgres: Callable[..., PostgresTransport]) -> PostgresTransport:
    """A migrated transport on a schema of its own."""
    return make_postgres()


@pytest.fixture(scope="module")
def shared(postgres_url: str) -> Iterator[tuple[PostgresTransport, Tables]]:
    """A transport, and its tables, for all tests of a module, which use queues of their own."""
    with servers.fresh_schema(postgres_url) as schema, _making(postgres_url, schema) as make:
        yield make(), Tables(postgres_url, schema)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of subscriptions and waiting callers from now on, one entry for each statement."""
    asked: list[str] = []
    execute = Listener.execute

    def counted(listener: Listener, operation: str, statement: Statement, parameters: dict[str, Any]) -> Rows:
        asked.append(operation)
        return execute(listener, operation, statement, parameters)

    monkeypatch.setattr(Listener, "execute", counted)
    return asked


@pytest.fixture
def limited(postgres_url: str, postgres: PostgresTransport, tables: Tables) -> Iterator[tuple[str, str]]:
    """A conninfo whose role has all rights on the tables until a test revokes some, and the role."""
    role = application().replace("-", "_")
    tables.execute(
        f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {{schema}} TO {role};"
        f" GRANT ALL ON ALL TABLES IN SCHEMA {{schema}} TO {role};"
        f" GRANT ALL ON ALL SEQUENCES IN SCHEMA {{schema}} TO {role}"
    )
    yield make_conninfo(postgres_url, user=role), role
    tables.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture(scope="module")
def private() -> Iterator[servers.PrivateServer]:
    """A server that the tests of one module may stop and freeze. Each test leaves it running."""
    with servers.private_server() as server:
        yield server
