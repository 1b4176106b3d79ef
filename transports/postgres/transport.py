"""`PostgresTransport`: the producer's side, and the way to everything else."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import attrs

from transports.postgres.caller_transaction import ascii_json, cursor_beside
from transports.postgres.connections import Connector, check_size, without_jit
from transports.postgres.dead_letters import PostgresDeadLetters
from transports.postgres.diagnostics.probe import DiagnosticLimits, diagnostic_statements
from transports.postgres.diagnostics.run import check_up
from transports.postgres.errors import mapped
from transports.postgres.libpq_exec import execute_prepared
from transports.postgres.listener import Listener
from transports.postgres.migrate import LOCK_TIMEOUT, migrate, migration_sql
from transports.postgres.notifier import Channels, Notifier
from transports.postgres.pool import Pool
from transports.postgres.preflight import check_tables
from transports.postgres.replies import ReplyWaiter
from transports.postgres.rows import message_columns, message_text, parsed
from transports.postgres.statements import Statements
from transports.postgres.subscription import PostgresSubscription
from unstract_core.errors import (
    ConfigurationError,
    PayloadError,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from unstract_core.observability.diagnostics import Finding, WorkerState
from unstract_core.observability.log_events import emit
from unstract_core.transport import Capabilities, Message, QueueState, Reply, ReplyStatus, check_subscription
from unstract_core.values import error_text, normalise

logger = logging.getLogger("unstract_wire.postgres")

_PAUSE = 0.25
_LAST_LOOK = 0.5
_LONGEST_LOOK = 5.0
_LARGEST = 86400
_SHORTEST_LIMIT = 1.0
_MOST_COUNTED = 100_000
"""The number of messages of a queue in one state that `queues` counts, where it does not look at many queues."""
_FEWEST_COUNTED = 1_000


class PostgresTransport:
    """A queue in the tables of one schema of a PostgreSQL database.

    Use one transport in a process, for as long as the process lives. Connections are made at first use, replaced when
    they break, and made again in a forked process. A transport ends by itself, with its threads and connections, when
    nothing refers to it any more. Thread-safe.

    Each subscription holds one connection besides the pool's, and waits for an answer no longer than a quarter of its
    lease; all waiting `reply` calls of the process share another one.

    Guarantee: a message is stored when `send` returns; a settlement takes effect as a whole, once, or not at all.

    Args:
        conninfo: a libpq URL or key=value string.
        schema: the schema of the tables.
        listen: False for PgBouncer in transaction mode: no connection listens, nothing is prepared, and every wait
            polls.
        poll_interval: seconds between two looks, beside listening.
        pool_size: connections at most that serve `send` and `reply`.
        timeout: seconds that a caller waits for a connection.
        statement_timeout: seconds that `send` and `reply` wait for an answer.
        notify_within: whether `send(within=)` adds a NOTIFY to the caller's transaction, so that its commit wakes an
            idle worker. Such a transaction cannot be prepared (PREPARE TRANSACTION). With False a worker finds the
            message at its next look. None stands for the value of `listen`.

    Raises:
        ConfigurationError: for an argument that cannot work.
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

    def __init__(
        self,
        conninfo: str,
        schema: str = "unstract",
        listen: bool = True,
        *,
        poll_interval: float = 1.0,
        pool_size: int = 10,
        timeout: float = 10.0,
        statement_timeout: float = 60.0,
        notify_within: bool | None = None,
    ) -> None:
        numbers = {
            "poll_interval": poll_interval,
            "pool_size": pool_size,
            "timeout": timeout,
            "statement_timeout": statement_timeout,
        }
        for name, number in numbers.items():
            if not 0 < number <= _LARGEST:
                raise ConfigurationError(f"{name} must be positive, and {_LARGEST} at most; got {number!r}")
        self._statements = Statements(schema)
        self._connector = Connector(conninfo, prepare=listen)
        self._pool = Pool(self._connector, size=pool_size, timeout=timeout, limit=statement_timeout)
        self._channels = Channels.of(schema)
        self._notifier = Notifier(self._pool, self._statements, self._channels)
        self._listen = listen
        self._notify_within = listen if notify_within is None else notify_within
        self._statement_timeout = statement_timeout
        self._poll_interval = poll_interval
        self._waiter = ReplyWaiter(
            self._connector,
            self._statements,
            self._channels.replies if listen else None,
            poll_interval=poll_interval,
            limit=statement_timeout,
        )
        self._subscriptions: weakref.WeakSet[PostgresSubscription] = weakref.WeakSet()
        self._closed = False
        _reset_when_forked(self)
        # Neither the pool nor a thread refers to the transport, so that it can be collected while they are there.
        weakref.finalize(self, _end, self._waiter, self._notifier, self._pool).atexit = False

    @property
    def dead(self) -> PostgresDeadLetters:
        """The dead letters of this schema."""
        return PostgresDeadLetters(self._pool, self._statements, self._channels, owner=self)

    def reset_after_fork(self) -> None:
        """Let go of what belongs to the parent process; called in a forked child, which can use this transport anew."""
        self._pool.reset()
        self._notifier.reset()
        self._waiter.reset()

    def migrate(self, *, lock_timeout: float = LOCK_TIMEOUT, create_tables: bool | None = None) -> list[str]:
        """Create what is missing in the schema, the schema included, and return what was created.

        Several processes may do this at once.

        Args:
            lock_timeout: seconds to wait for a lock on a table; senders queue behind that wait. Default 5.
            create_tables: whether to create the tables that the product's own migrations create too. None (default):
                unless Django keeps its migrations in the schema.

        Raises:
            TransportNotReady: a table that was there already lacks a column; an index is there but not valid; or a
                table is missing that Django has to create first.
            TransportUnavailable: a lock was not free in time; the text names the session that holds it.
        """
        self._check_open()
        if not 0 < lock_timeout <= _LARGEST:
            raise ConfigurationError(f"lock_timeout must be positive, and {_LARGEST} at most; got {lock_timeout!r}")
        return migrate(self._connector, self._statements, lock_timeout=lock_timeout, create_tables=create_tables)

    def migration_sql(self, *, create_tables: bool | None = None) -> str:
        """Return what `migrate` does as plain SQL that can be run again, for a migration of one's own.

        Args:
            create_tables: False leaves out the two tables that the product's migrations create too.
        """
        return migration_sql(self._statements, create_tables=create_tables)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Enqueue all of `messages` or none, in one commit, and return their ids in order. Durable when it returns.

        `within` is an open cursor of psycopg 3, psycopg2 or Django, inside its caller's transaction: the messages
        commit and vanish with it. After an error the caller's transaction has failed, and can be run again as a whole
        where the error is TransportUnavailable.

        Raises:
            PayloadError: before anything is sent.
            TransportUnavailable: its `fate_unknown` says whether sending again may double the messages.
            TransportRefused: the database rejects a message.
            TransportNotReady: a table or a right is missing.
        """
        self._check_open()
        if within is not None:
            return self._send_within(within, messages)
        if not messages:
            return []
        texts = [message_text(message) for message in messages]
        if len(messages) == 1 and not messages[0].delay and self._notifier.announced_lately(messages[0].queue):
            return [self._send_one(messages[0], texts[0])]
        columns = message_columns(messages, texts)

        def commit(wake: list[str | None]) -> list[tuple[Any, ...]]:
            parameters = self._many(columns, wake)
            return self._pool.execute("send", self._statements["send_many"], parameters, durable=True)

        return _ids(self._notifier.announced(_ready(messages), commit))

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`, waiting up to `timeout` seconds for it; None when there is none.

        `consume` clears its result and error once they were read. An outage is waited out within the timeout.
        """
        if not isinstance(key, str):
            raise PayloadError(f"expected a text, got {type(key).__name__}", path="$.key")
        normalise(key, path="$.key")
        deadline = time.monotonic() + timeout
        waits = timeout > 0
        while True:
            self._check_open()
            reply = self._read(key, deadline, waits)
            if reply is not None:
                return self._consumed(reply, deadline if waits else None) if consume else reply
            if time.monotonic() >= deadline:
                return None
            self._waiter.wait(key, deadline)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> PostgresSubscription:
        """Receive from `queues`, on a connection of the subscription's own, each message held for `lease` seconds.

        Raises TransportNotReady where tables or columns are missing, or this role lacks a right that a consumer needs.
        """
        self._check_open()
        names = check_subscription(queues, lease)
        # A statement that is held up must not hold up the renewals, for which the same connection is needed.
        limit = min(self._statement_timeout, max(_SHORTEST_LIMIT, lease / 4))
        channel = self._channels.queues if self._listen else None
        listener = Listener(self._connector, channel, payloads=names, limit=limit)
        try:
            check_tables(listener.execute, self._statements)
        except BaseException:
            listener.close()
            raise
        subscription = PostgresSubscription(
            listener,
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
        """Return the state of each queue of `names`, or of all that hold anything.

        It counts at most 100,000 messages of a queue in each state, and fewer where there are more than ten queues. The
        state of a queue in which more are ready, in flight or delayed is `estimated`; dead and unknown ones are counted
        up to that number. `unknown` is 0 where `migrate` has not made its index yet.
        """
        self._check_open()
        if names is None:
            rows = self._inspect("queue_names", {"most": _MOST_COUNTED})
            names = [name for (name,) in rows]
        wanted = list(dict.fromkeys(names))
        most = max(_FEWEST_COUNTED, min(_MOST_COUNTED, 10 * _MOST_COUNTED // max(1, len(wanted))))
        rows = self._inspect("queues", {"names": wanted, "most": most})
        return [self._state(most, *row) for row in rows]

    def _state(self, most: int, name: str, ready: int, *counted: Any) -> QueueState:
        in_flight, delayed, oldest, dead, cut, unknown = counted
        if ready >= most:
            ((plan,),) = self._inspect("ready_estimate", {"queue": name})
            ready = max(ready, int(plan[0]["Plan"]["Plan Rows"]))
        return QueueState(name, ready, in_flight, delayed, oldest, dead, unknown, estimated=cut)

    def _inspect(self, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        text = self._statements[statement]
        return self._pool.execute("look at the queues", text, parameters, how=without_jit, idempotent=True)

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return the names of the tasks of the first `limit` ready messages of `queue`, with their counts."""
        self._check_open()
        parameters = {"queue": queue, "limit": limit}
        statement = self._statements["waiting_tasks"]
        return dict(self._pool.execute("look at what waits", statement, parameters, idempotent=True))

    def workers(self) -> Sequence[WorkerState]:
        """Return this package's sessions in this database; a role that may not read statistics sees its own in full."""
        self._check_open()
        rows = self._pool.execute(
            "look at the workers", diagnostic_statements(self._statements)["workers"], {}, idempotent=True
        )
        return [WorkerState(*row) for row in rows]

    def check_up(self, *, limits: DiagnosticLimits | None = None) -> Iterator[Finding]:
        """Check everything that this transport stands on, one thing after the other; see diagnostics/run.py."""
        self._check_open()
        return check_up(self._connector, self._statements, listens=self._listen, limits=limits or DiagnosticLimits())

    def close(self) -> None:
        """End waiting calls with TransportClosed, and close every connection but those of subscriptions, which their
        owners close. Closing twice is allowed."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.wake()
        self._waiter.close()
        self._notifier.close()
        self._pool.close()

    def _send_one(self, message: Message, text: str) -> str:
        parameters = (message.queue, text, message.org_id, str(message.priority))
        ((msg_id,),) = self._pool.execute(
            "send", self._statements["send_one"], parameters, how=execute_prepared, durable=True
        )
        self._notifier.trailing((message.queue,))
        return str(msg_id)

    def _send_within(self, cursor: Any, messages: Sequence[Message]) -> list[str]:
        columns = message_columns(messages, [ascii_json(message_text(message)) for message in messages])
        with mapped("send within the caller's transaction", committed_by_us=False), cursor_beside(cursor) as ours:
            if not messages:
                return []
            notify = self._notify_within and not self._notifier.silent
            wake = list(dict.fromkeys(_ready(messages))) if notify else []
            parameters = self._many(columns, wake)
            check_size("send within the caller's transaction", parameters)
            ours.execute(self._statements.portable("send_within" if wake else "send_silently"), parameters)
            return _ids(ours.fetchall())

    def _many(self, columns: dict[str, list[Any]], wake: Sequence[str | None]) -> dict[str, Any]:
        return {**columns, "channel": self._channels.queues, "wake": list(wake)}

    def _read(self, key: str, deadline: float, waits: bool) -> Reply | None:
        statement = self._statements["read_reply"]
        while True:
            timeout = _left(deadline) if waits else None
            try:
                rows = self._pool.execute("read a reply", statement, {"key": key}, idempotent=True, timeout=timeout)
                break
            except TransportUnavailable:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._pool.has_worked:
                    raise
                time.sleep(min(_PAUSE, remaining))
        if not rows:
            return None
        ((status, result, error, ttl),) = rows
        return Reply(key, cast(ReplyStatus, status), parsed(result), error, ttl)

    def _consumed(self, reply: Reply, deadline: float | None) -> Reply:
        """Clear a reply that was read, and return it; its status alone where another reader was faster.

        What cannot be cleared goes when it expires; its caller has it all the same.
        """
        try:
            timeout = None if deadline is None else _left(deadline)
            statement = self._statements["clear_reply"]
            found = self._pool.execute("clear a reply", statement, {"key": reply.key}, timeout=timeout)
        except TransportError as exc:
            emit(logger, logging.WARNING, "reply_not_cleared", error_type=type(exc).__name__, error=error_text(exc))
            return reply
        return attrs.evolve(reply, result=None, error="") if found == [(False,)] else reply

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this PostgreSQL transport was closed")


def _end(waiter: ReplyWaiter, notifier: Notifier, pool: Pool) -> None:
    """End the threads and connections of a transport that was collected. It may run on any thread, at any line."""
    waiter.close()
    notifier.end()
    pool.close()


def _left(deadline: float) -> float:
    """Return the seconds for one look of a caller that waits: so many that a silent connection costs no whole wait.

    The last look gets a moment, although the time is up.
    """
    return min(_LONGEST_LOOK, max(_LAST_LOOK, deadline - time.monotonic()))


_in_this_process: weakref.WeakSet[PostgresTransport] = weakref.WeakSet()


def _reset_when_forked(transport: PostgresTransport) -> None:
    _register_at_fork()
    _in_this_process.add(transport)


@cache
def _register_at_fork() -> None:
    os.register_at_fork(after_in_child=_reset_all)


def _reset_all() -> None:
    for transport in list(_in_this_process):
        transport.reset_after_fork()


def _ready(messages: Sequence[Message]) -> list[str]:
    """Return the queues in which something is ready at once."""
    return [message.queue for message in messages if not message.delay]


def _ids(rows: Sequence[Any]) -> list[str]:
    """Return the ids in a cursor's rows, tuples or psycopg2's dicts, in the order of sending."""
    values = (row["msg_id"] if isinstance(row, Mapping) else row[0] for row in rows)
    return [str(value) for value in sorted(value for value in values if value is not None)]
