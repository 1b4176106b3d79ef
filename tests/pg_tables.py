"""The transport's tables, accessed directly, as another program would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import attrs
import psycopg
from psycopg import sql

from contract_tests.kit import wait_until


@attrs.frozen
class Tables:
    """The tables of one schema. Statements name them as {messages}, {results} and {dead}."""

    url: str
    schema: str

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, **{"autocommit": True, **options})

    def sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(
            schema=sql.Identifier(self.schema),
            messages=sql.Identifier(self.schema, "pg_queue_message"),
            results=sql.Identifier(self.schema, "pg_task_result"),
            dead=sql.Identifier(self.schema, "pg_queue_dead_letter"),
        )

    def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            return connection.execute(self.sql(statement), parameters or None).fetchall()

    def execute(self, statement: str, *parameters: Any) -> None:
        with self.connect() as connection:
            connection.execute(self.sql(statement), parameters or None)

    def count(self, queue_name: str) -> int:
        (row,) = self.rows("SELECT count(*) FROM {messages} WHERE queue_name = %s", queue_name)
        return int(row[0])

    def inject(self, queue_name: str, text: str, *, priority: int = 5, read_ct: int = 0) -> str:
        """Insert a message with JSON text, as if it had been claimed `read_ct` times; return its id."""
        (row,) = self.rows(
            "INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)"
            " VALUES (%s, %s::jsonb, '', now(), now(), %s, %s, 'ready') RETURNING msg_id",
            queue_name,
            text,
            read_ct,
            priority,
        )
        return str(row[0])

    @contextlib.contextmanager
    def locked(self, statement: str, *parameters: Any) -> Iterator[psycopg.Connection[Any]]:
        """Hold the locks of a statement, in a transaction that is rolled back unless the test commits it."""
        with self.connect(autocommit=False) as connection:
            connection.execute(self.sql(statement), parameters or None)
            try:
                yield connection
            finally:
                connection.rollback()

    def backends(self, name: str) -> list[tuple[int, str, str]]:
        """Return (pid, wait event type, query) of each connection with this application name."""
        return [
            (row[0], row[1], row[2])
            for row in self.rows(
                "SELECT pid, coalesce(wait_event_type, ''), query FROM pg_stat_activity WHERE application_name = %s",
                name,
            )
        ]

    def wait_for_lock(self, name: str) -> int:
        """Wait until a connection of this name waits for a lock; return its pid."""
        waiting: list[int] = []

        def found() -> bool:
            waiting[:] = [pid for pid, event, _ in self.backends(name) if event == "Lock"]
            return bool(waiting)

        wait_until(found, what=f"a statement of {name} that waits for a lock")
        return waiting[0]

    def terminate(self, name: str) -> int:
        """End every connection of this name, and wait until they are gone; return how many there were."""
        pids = [pid for pid, _, _ in self.backends(name)]
        self.rows("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", pids)
        wait_until(lambda: not {pid for pid, _, _ in self.backends(name)}.intersection(pids), what="backends to end")
        return len(pids)
