"""`PostgresTransport`: the producer's side, and the way to everything else."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import parse_qsl, quote, urlencode

import psycopg
from psycopg.rows import TupleRow, tuple_row

from transports.postgres.connections import Connector, Pool
from transports.postgres.dead_letters import PostgresDeadLetters
from transports.postgres.errors import mapped, translate
from transports.postgres.migrate import migrate
from transports.postgres.notifier import Channels, Notifier
from transports.postgres.replies import ReplyWaiter
from transports.postgres.session import Session
from transports.postgres.settling import message_columns, message_text
from transports.postgres.statements import Statements
from transports.postgres.subscription import PostgresSubscription
from unstract_core.errors import ConfigurationError, TransportClosed, TransportUnavailable
from unstract_core.transport import Capabilities, Message, QueueState, Reply, ReplyStatus, check_subscription
from unstract_core.values import normalise


class PostgresTransport:
    """A queue in the tables of one schema of a PostgreSQL database.

    `conninfo` is a libpq URL or key=value string. `listen=False` is for PgBouncer in transaction mode: nothing listens
    and nothing is prepared, and whoever waits polls every `poll_interval` seconds (as it does anyway, beside
    listening). `pool_size` connections at most serve `send` and `reply`; a caller waits `timeout` seconds for one.

    Connections are made at first use. Raises ConfigurationError for what cannot work.
    """

    capabilities = Capabilities(
        atomic_send=True,
        atomic_settle=True,
        transactional_send=True,
        delay=True,
        priority=True,
        replies=True,
        status=True,
        fencing=True,
        dead_letters=True,
        inspection=True,
    )

    def __init__(
        self,
        conninfo: str,
        schema: str = "unstract",
        listen: bool = True,
        *,
        poll_interval: float = 1.0,
        pool_size: int = 10,
        timeout: float = 10.0,
    ) -> None:
        if not (poll_interval > 0 and timeout > 0 and pool_size >= 1):
            raise ConfigurationError("poll_interval, timeout and pool_size must be positive")
        self._statements = Statements(schema)
        self._connector = Connector(conninfo, prepare=listen)
        self._pool = Pool(self._connector, size=pool_size, timeout=timeout)
        self._channels = Channels.of(schema)
        self._notifier = Notifier(self._pool, self._statements, self._channels)
        self._listen = listen
        self._poll_interval = poll_interval
        self._waiter = ReplyWaiter(
            self._connector,
            self._statements,
            self._channels.replies if listen else None,
            poll_interval=poll_interval,
        )
        self._subscriptions: weakref.WeakSet[PostgresSubscription] = weakref.WeakSet()
        self._closed = False
        _reset_when_forked(self)
        self.dead = PostgresDeadLetters(self._pool, self._statements, self._channels)

    def reset_after_fork(self) -> None:
        """Let go of what belongs to the parent process; called in a forked child, which can use this transport anew."""
        self._pool.reset()
        self._notifier.reset()
        self._waiter.reset()

    def migrate(self) -> list[str]:
        """Create what is missing in the schema, the schema included; return what was created. Safe to run at once."""
        self._check_open()
        return migrate(self._connector, self._statements.schema)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        self._check_open()
        if within is not None:
            return self._send_within(within, messages)
        if len(messages) == 1 and not messages[0].delay and self._notifier.announced_lately(messages[0].queue):
            return [self._send_one(messages[0])]
        ready = [message.queue for message in messages if not message.delay]
        wake = self._notifier.leading(ready)
        if messages:
            parameters = self._many(messages, wake)
            with self._pool.connection("send") as connection:
                ids = _ids(connection.execute(self._statements["send_many"], parameters).fetchall())
        else:
            return []
        self._notifier.trailing(set(ready).difference(wake))
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        deadline = time.monotonic() + timeout
        while True:
            self._check_open()
            reply = self._read(key, consume)
            if reply is not None or time.monotonic() >= deadline:
                return reply
            self._waiter.wait(key, deadline)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> PostgresSubscription:
        """Also checks that the tables are there and may be read: raises TransportNotReady where they are not."""
        self._check_open()
        names = check_subscription(queues, lease)
        session = Session(self._connector, self._channels.queues if self._listen else None)
        try:
            session.execute("look at the tables", self._statements["check_tables"], {})
        except BaseException:
            session.close()
            raise
        subscription = PostgresSubscription(
            session,
            self._statements,
            self._notifier,
            names,
            lease=lease,
            poll_interval=self._poll_interval,
            closed=lambda: self._closed,
        )
        self._subscriptions.add(subscription)
        return subscription

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        self._check_open()
        parameters = {"names": list(names or ()), "all": names is None}
        with self._pool.connection("look at the queues") as connection:
            return [QueueState(*row) for row in connection.execute(self._statements["queues"], parameters)]

    def close(self) -> None:
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.wake()
        self._waiter.close()
        self._notifier.close()
        self._pool.close()

    def _send_one(self, message: Message) -> str:
        text = message_text(message)
        connection = self._pool.take("send")
        try:
            parameters = (message.queue, text, message.org_id, message.priority)
            row = connection.kept.execute(self._statements["send_one"], parameters).fetchone()
        except Exception as exc:
            if (ours := translate(exc, "send")) is None:
                raise
            if isinstance(ours, TransportUnavailable):
                connection.close()
            raise ours from exc
        finally:
            self._pool.give_back(connection)
        self._notifier.trailing((message.queue,))
        return str(cast("tuple[int]", row)[0])

    def _send_within(self, cursor: Any, messages: Sequence[Message]) -> list[str]:
        if not callable(getattr(cursor, "execute", None)) or not callable(getattr(cursor, "fetchall", None)):
            raise ConfigurationError(f"within= takes an open DB-API cursor, not a {type(cursor).__name__}")
        if not messages:
            return []
        wake = dict.fromkeys(message.queue for message in messages if not message.delay)
        parameters = self._many(messages, list(wake))
        with mapped("send within the caller's transaction", committed_by_us=False):
            if isinstance(cursor, psycopg.Cursor):
                cursor = _beside(cursor)
            cursor.execute(self._statements.portable("send_many"), parameters)
            return _ids(cursor.fetchall())

    def _many(self, messages: Sequence[Message], wake: Sequence[str | None]) -> dict[str, Any]:
        return {**message_columns(messages), "channel": self._channels.queues, "wake": list(wake)}

    def _read(self, key: str, consume: bool) -> Reply | None:
        normalise(key, path="$.key")
        statement = self._statements["consume_reply" if consume else "read_reply"]
        with self._pool.connection("read a reply") as connection:
            row = connection.execute(statement, {"key": key}).fetchone()
        if row is None:
            return None
        status, result, error = row
        return Reply(key, cast(ReplyStatus, status), None if result is None else json.loads(result), error)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this PostgreSQL transport was closed")


def from_url(url: str) -> PostgresTransport:
    """Return a transport for a libpq URL. The options `schema`, `listen`, `poll_interval`, `pool_size` and `timeout`
    are ours and taken out of its query; the others are libpq's. Raises ConfigurationError for a bad value."""
    address, _, query = url.partition("?")
    ours: dict[str, Any] = {}
    libpq: list[tuple[str, str]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _OPTIONS:
            ours[name] = _option(name, value)
        else:
            libpq.append((name, value))
    return PostgresTransport(f"{address}?{urlencode(libpq, quote_via=quote)}" if libpq else address, **ours)


_in_this_process: weakref.WeakSet[PostgresTransport] = weakref.WeakSet()


def _reset_when_forked(transport: PostgresTransport) -> None:
    if not _in_this_process:
        os.register_at_fork(after_in_child=_reset_all)
    _in_this_process.add(transport)


def _reset_all() -> None:
    for transport in list(_in_this_process):
        transport.reset_after_fork()


def _option(name: str, value: str) -> Any:
    try:
        return _OPTIONS[name](value)
    except (ValueError, KeyError) as exc:
        raise ConfigurationError(f"the URL option {name}={value!r} is not understood") from exc


_OPTIONS: dict[str, Any] = {
    "schema": str,
    "listen": {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.__getitem__,
    "poll_interval": float,
    "pool_size": int,
    "timeout": float,
}


def _beside(cursor: psycopg.Cursor[Any]) -> psycopg.Cursor[TupleRow]:
    """Return a cursor in the same transaction whose rows are tuples, and leave the caller's results as they are."""
    if cursor.closed:
        raise psycopg.InterfaceError("the cursor is closed")
    return psycopg.Cursor(cursor.connection, row_factory=tuple_row)


def _ids(rows: Sequence[Any]) -> list[str]:
    """Return the ids in a cursor's rows, tuples or psycopg2's dicts, in the order of sending."""
    values = (row["msg_id"] if isinstance(row, Mapping) else row[0] for row in rows)
    return [str(value) for value in sorted(value for value in values if value is not None)]
