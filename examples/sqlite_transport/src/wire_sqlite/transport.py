"""`SqliteTransport`: the producer's side, and the way to everything else."""

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
    """A queue in one SQLite file, which is made if it is not there.

    `timeout`: seconds that a writer waits for another before it gives up with TransportUnavailable. `poll_interval`:
    seconds after which a waiting process sees, at the latest, what another one has sent. Thread-safe, and usable in a
    forked child. Guarantee: what `send` returned from is on disk; a settlement takes effect as a whole, once, or not
    at all.
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
                raise ConfigurationError(f"{name} must be positive, and {_LONGEST} at most; got {number!r}")
        if os.fspath(path) in ("", ":memory:"):
            raise ConfigurationError("the path of a file is needed; for a queue in memory there is memory://")
        self._database = Database(Path(path).absolute(), timeout=timeout, poll_interval=poll_interval)
        self.dead = SqliteDeadLetters(self._database)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Enqueue all of `messages` or none, and return their ids.

        `within` is an open sqlite3 cursor of a connection to the same file: the messages commit and vanish with its
        transaction, which is begun if it is not open yet and the connection is not in autocommit.
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
        self._database.bell.ring()
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`, waiting up to `timeout` seconds for it; None when there is none."""
        normalise(key, path="$.key")
        deadline = time.monotonic() + timeout
        while True:
            rung = self._database.bell.rung
            reply = self._read(key)
            if reply is not None:
                return self._consume(key) if consume else reply
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._database.wait(rung, remaining)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> SqliteSubscription:
        """Receive from `queues`; see `unstract_core.Transport.subscribe`."""
        self._database.check_open()
        return SqliteSubscription(self._database, check_subscription(queues, lease), lease)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Return the state of each queue of `names`, or of all that hold anything."""
        with self._database.reading("look at the queues") as connection:
            if names is None:
                names = [name for (name,) in connection.execute(statement("queue_names"))]
            now, state = time.time(), statement("queue_state")
            return [
                QueueState(name, *connection.execute(state, {"queue": name, "now": now}).fetchone())
                for name in sorted(set(names))
            ]

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return the names of the tasks of the first `limit` ready messages of `queue`, with their counts."""
        with self._database.reading("look at what waits") as connection:
            rows = connection.execute(statement("waiting"), {"queue": queue, "limit": limit}).fetchall()
        return Counter(name for (body,) in rows if (name := _task_name(body)))

    @property
    def path(self) -> Path:
        return self._database.path

    def close(self) -> None:
        """End every waiting call, and every later one, with TransportClosed. Closing twice is allowed."""
        self._database.close()

    def _read(self, key: str) -> Reply | None:
        with self._database.reading("read a reply") as connection:
            row = connection.execute(statement("reply"), {"key": key, "now": time.time()}).fetchone()
        return _reply(key, row)

    def _consume(self, key: str) -> Reply | None:
        """Read again and clear in one transaction, so that of several readers one gets it whole."""
        with self._database.writing("consume a reply") as connection:
            row = connection.execute(statement("reply"), {"key": key, "now": time.time()}).fetchone()
            connection.execute(statement("clear"), {"key": key})
        return _reply(key, row)


def from_url(url: str) -> SqliteTransport:
    """Return a transport for `sqlite:///path/to/tasks.db`; an absolute path has one slash more.

    `?timeout=` and `&poll_interval=` set what they are called. Raises ConfigurationError for anything else.
    """
    address, _, query = url.partition("?")
    path = address.partition("://")[2]
    if not path.startswith("/"):
        raise ConfigurationError(f"{address} names a host; write sqlite:///file, and sqlite:////file from the root")
    options = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ("timeout", "poll_interval"):
            raise ConfigurationError(f"unknown option {name!r} in the SQLite URL; there are timeout and poll_interval")
        try:
            options[name] = float(value)
        except ValueError as exc:
            raise ConfigurationError(f"the URL option {name}={value!r} is no number") from exc
    return SqliteTransport(unquote(path[1:]), **options)


def _reply(key: str, row: tuple[ReplyStatus, str, str, float] | None) -> Reply | None:
    if row is None:
        return None
    status, result, error, ttl = row
    return Reply(key, status, json.loads(result), error, ttl)


def _task_name(body: str) -> str | None:
    """Return the task that a stored message names; None where it names none."""
    try:
        stored = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = stored.get("task_name") if isinstance(stored, dict) else None
    return name if isinstance(name, str) else None
