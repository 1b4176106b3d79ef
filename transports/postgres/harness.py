"""`PostgresHarness`: runs the conformance kit on a new schema, which is dropped at the end."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql

from contract_tests.harness import Harness
from transports.postgres.transport import PostgresTransport
from transports.postgres.url import from_url
from unstract_core.errors import ConfigurationError


class PostgresHarness(Harness):
    """The kit's access to one database.

    Args:
        url: a URL of the transport, without `schema`.
    """

    capabilities = PostgresTransport.capabilities

    def __init__(self, url: str) -> None:
        if "schema=" in url:
            raise ConfigurationError("the kit creates a schema of its own and drops it: give the URL without schema=")
        token = uuid.uuid4().hex[:12]
        self._schema = f"wire_kit_{token}"
        self._application = f"wire-kit-{token}"
        self._url = f"{url}{'&' if '?' in url else '?'}schema={self._schema}&application_name={self._application}"
        if "poll_interval=" not in url:
            self._url += "&poll_interval=0.2"
        self.name = "postgresql-polling" if "listen=false" in url else "postgresql"
        with contextlib.closing(from_url(self._url)) as transport:
            self._conninfo = transport._connector.conninfo

    def __enter__(self) -> Self:
        with self.transport() as transport:
            transport.migrate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("DROP SCHEMA IF EXISTS {schema} CASCADE")

    def transport(self) -> contextlib.closing[PostgresTransport]:
        return contextlib.closing(from_url(self._url))

    def inject(self, transport: PostgresTransport, queue: str, text: str) -> None:
        self._run(
            "INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)"
            " VALUES (%s, %s::jsonb, '', now(), now(), 0, 5, 'ready')",
            queue,
            text,
        )

    def expire(self, transport: PostgresTransport, queue: str) -> None:
        self._run(
            "UPDATE {messages} SET vt = now() - interval '1 second' WHERE queue_name = %s AND state = 'claimed'", queue
        )

    def reissue(self, transport: PostgresTransport, id: str, as_id: str) -> bool:
        self._run("DELETE FROM {messages} WHERE msg_id = %s", int(as_id))
        self._run("UPDATE {messages} SET msg_id = %s WHERE msg_id = %s", int(as_id), int(id))
        return True

    def stored(self, transport: PostgresTransport, queue: str) -> Sequence[str]:
        rows = self._run("SELECT message::text FROM {messages} WHERE queue_name = %s ORDER BY msg_id", queue)
        return [row[0] for row in rows]

    def sever(self, transport: PostgresTransport) -> bool:
        self._run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", self._application
        )
        return True

    @contextlib.contextmanager
    def caller(self, transport: PostgresTransport) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self._conninfo, application_name="caller") as connection:
            yield connection

    def _run(self, statement: str, *parameters: Any) -> list[Any]:
        named = sql.SQL(statement).format(
            schema=sql.Identifier(self._schema), messages=sql.Identifier(self._schema, "pg_queue_message")
        )
        with psycopg.connect(self._conninfo, autocommit=True, application_name="harness") as connection:
            cursor = connection.execute(named, parameters or None)
            return cursor.fetchall() if cursor.description else []


def harness(url: str | None = None) -> PostgresHarness:
    """Return the harness of `--transport postgresql://user@host/database`."""
    if url is None:
        raise ConfigurationError("--transport needs a URL here: postgresql://user@host/database")
    return PostgresHarness(url)
