"""`SqliteTransport`: the producer's side, and the factory of subscriptions."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from unstract_core import Capabilities, ConfigurationError, Message, QueueState, Reply, normalise
from unstract_core.transport import ReplyStatus, check_subscription

from wire_sqlite.database import Database
from wire_sqlite.dead_letters import SqliteDeadLetters
from wire_sqlite.errors import mapped
from wire_sqlite.messages import insert, written
from wire_sqlite.statements import statement
from wire_sqlite.subscription import SqliteSubscription
from wire_sqlite.within import cursor_beside

_LONGEST = 86400


class SqliteTransport:
    """A queue in one SQLite file, which is created if it does not exist. Thread-safe, also in a forked child.

    Guarantee: when `send` returns, its messages are on disk. A settlement takes effect completely and
    once, or not at all.

    Args:
        path: The file.
        timeout: The longest wait for another writer in seconds, before TransportUnavailable; 5 by default.
        poll_interval: The longest time until a waiting process sees a message of another one, in seconds; 0.05 by
            default.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    capabilities = Capabilities(
        atomic_send=True,
        atomic_settle=True,
        transactional_send=True,
        delay=True,
        priority=True,
        order_across_queues=True,
        replies=True,
        status=True,
        fencing=True,
        counts_crashes=True,
        dead_letters=True,
        inspection=True,
    )

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 5.0, poll_interval: float = 0.05) -> None:
        for name, number in {"timeout": timeout, "poll_interval": poll_interval}.items():
            if not 0 < number <= _LONGEST:
                raise ConfigurationError(f"{name} must be positive and at most {_LONGEST}; got {number!r}")
        if os.fspath(path) in ("", ":memory:"):
            raise ConfigurationError("pass the path of a file; memory:// is a queue in memory")
        self._database = Database(Path(path).absolute(), timeout=timeout, poll_interval=poll_interval)
        self.dead = SqliteDeadLetters(self._database)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Enqueue all of `messages` or none.

        Args:
            messages: The messages.
            within: An open sqlite3 cursor of a connection to the same file, whose transaction the messages join. If no
                transaction is open, one is begun, unless the connection is in autocommit mode. None by default.

        Returns:
            The ids of the messages.
        """
        self._database.check_open()
        rows = [written(message) for message in messages]
        if within is not None:
            with mapped("send within the caller's transaction"), cursor_beside(within, self._database.path) as cursor:
                return insert(cursor, rows)
        if not rows:
            return []
        with self._database.writing("send") as connection:
            ids = insert(connection.cursor(), rows)
        self._database.notifier.notify()
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under a key.

        Args:
            key: The key.
            timeout: The longest wait in seconds; 0 by default.
            consume: Whether to clear the reply, so that only one reader gets it; False by default.

        Returns:
            The reply; None if there is none.
        """
        normalise(key, path="$.key")
        deadline = time.monotonic() + timeout
        while True:
            version = self._database.notifier.version
            reply = self._read(key)
            if reply is not None:
                return self._consume(key) if consume else reply
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._database.wait(version, remaining)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> SqliteSubscription:
        """Return a subscription to `queues`; see `unstract_core.Transport.subscribe`."""
        self._database.check_open()
        return SqliteSubscription(self._database, check_subscription(queues, lease), lease)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Return the state of each queue of `names`, or of every queue with messages if it is None."""
        with self._database.reading("look at the queues") as connection:
            if names is None:
                names = [name for (name,) in connection.execute(statement("queue_names"))]
            now, state = time.time(), statement("queue_state")
            return [
                QueueState(name, *connection.execute(state, {"queue": name, "now": now}).fetchone())
                for name in sorted(set(names))
            ]

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return the task names of the first `limit` ready messages of a queue, with their counts."""
        with self._database.reading("look at what waits") as connection:
            rows = connection.execute(statement("waiting"), {"queue": queue, "limit": limit}).fetchall()
        return Counter(name for (body,) in rows if (name := _task_name(body)))

    @property
    def path(self) -> Path:
        return self._database.path

    def close(self) -> None:
        """Raise TransportClosed in every waiting and every later call. May be called twice."""
        self._database.close()

    def _read(self, key: str) -> Reply | None:
        with self._database.reading("read a reply") as connection:
            row = connection.execute(statement("reply"), {"key": key, "now": time.time()}).fetchone()
        return _reply(key, row)

    def _consume(self, key: str) -> Reply | None:
        """Read and clear a reply in one transaction, so that only one of several readers gets it."""
        with self._database.writing("consume a reply") as connection:
            row = connection.execute(statement("reply"), {"key": key, "now": time.time()}).fetchone()
            connection.execute(statement("clear"), {"key": key})
        return _reply(key, row)


def from_url(url: str) -> SqliteTransport:
    """Return a transport for `sqlite:///path/to/tasks.db`; an absolute path has a fourth slash.

    Args:
        url: The URL; its options `timeout` and `poll_interval` are those of SqliteTransport.

    Raises:
        ConfigurationError: The URL is invalid.
    """
    address, _, query = url.partition("?")
    path = address.partition("://")[2]
    if not path.startswith("/"):
        raise ConfigurationError(f"{address} names a host; write sqlite:///file, and sqlite:////file from the root")
    options = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ("timeout", "poll_interval"):
            raise ConfigurationError(f"unknown option {name!r} in the SQLite URL; use timeout or poll_interval")
        try:
            options[name] = float(value)
        except ValueError as exc:
            raise ConfigurationError(f"the URL option {name}={value!r} is not a number") from exc
    return SqliteTransport(unquote(path[1:]), **options)


def _reply(key: str, row: tuple[ReplyStatus, str, str, float] | None) -> Reply | None:
    if row is None:
        return None
    status, result, error, ttl = row
    return Reply(key, status, json.loads(result), error, ttl)


def _task_name(body: str) -> str | None:
    """Return the task name of a stored message; None if it has none."""
    try:
        stored = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = stored.get("task_name") if isinstance(stored, dict) else None
    return name if isinstance(name, str) else None
