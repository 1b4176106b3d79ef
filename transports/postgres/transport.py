"""`PostgresTransport`: sends messages, reads replies, and gives access to subscriptions and operators' tools."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

from transports.postgres.connector import Connector
from transports.postgres.dead_letters import PostgresDeadLetters
from transports.postgres.diagnostics.probe import DiagnosticLimits
from transports.postgres.diagnostics.run import check_up
from transports.postgres.listener import Listener
from transports.postgres.migrate import LOCK_TIMEOUT, migrate, migration_sql
from transports.postgres.notifier import Channels, Notifier
from transports.postgres.pool import Pool
from transports.postgres.preflight import check_tables
from transports.postgres.queue_inspector import QueueInspector
from transports.postgres.reply_reader import ReplyReader
from transports.postgres.reply_waiter import ReplyWaiter
from transports.postgres.sender import Sender
from transports.postgres.statements import Statements
from transports.postgres.subscription import PostgresSubscription
from unstract_core.errors import ConfigurationError, PayloadError, TransportClosed
from unstract_core.observability.diagnostics import Finding, WorkerState
from unstract_core.transport import Capabilities, Message, QueueState, Reply, check_subscription
from unstract_core.values import normalise

_LARGEST = 86400
_SHORTEST_LIMIT = 1.0


class PostgresTransport:
    """A queue in the tables of one schema of a PostgreSQL database.

    Use one transport in a process, for as long as the process runs. It connects at first use, replaces broken
    connections, and connects again in a forked process. When it is garbage-collected, its threads and connections end.
    Thread-safe.

    Each subscription has its own connection, and waits for an answer at most for a quarter of its lease. All waiting
    `reply` calls of the process share one more connection.

    Guarantee: a message is stored when `send` returns. A settlement takes effect completely and once, or not at all.

    Args:
        conninfo: a libpq URL or key=value string.
        schema: the schema of the tables. Default "unstract".
        listen: False for PgBouncer in transaction mode: no connection listens, no statement is prepared, and every wait
            polls. Default True.
        poll_interval: seconds between two polls of a waiting worker or caller, which also listens. Default 1.
        pool_size: the number of connections at most for `send` and `reply`. Default 10.
        timeout: seconds that a caller waits for a connection. Default 10.
        statement_timeout: seconds that `send` and `reply` wait for an answer. Default 60.
        notify_within: whether `send(within=)` adds a NOTIFY to the caller's transaction, so that its commit wakes an
            idle worker. Such a transaction cannot be prepared (PREPARE TRANSACTION). With False a worker finds the
            message when it polls. None (default): the value of `listen`.
        clock: a callable that returns monotonic seconds. Subscriptions time their leases and scans by it. Default:
            `time.monotonic`.

    Raises:
        ConfigurationError: an argument cannot work.
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
        clock: Callable[[], float] = time.monotonic,
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
        self._statement_timeout = statement_timeout
        self._poll_interval = poll_interval
        self._clock = clock
        self._waiter = ReplyWaiter(
            self._connector,
            self._statements,
            self._channels.replies if listen else None,
            poll_interval=poll_interval,
            limit=statement_timeout,
        )
        notifies_within = listen if notify_within is None else notify_within
        self._sender = Sender(self._pool, self._statements, self._notifier, notify_within=notifies_within)
        self._inspector = QueueInspector(self._pool, self._statements)
        self._replies = ReplyReader(self._pool, self._statements, self._waiter)
        self._subscriptions: weakref.WeakSet[PostgresSubscription] = weakref.WeakSet()
        self._closed = False
        _reset_when_forked(self)
        # Neither the pool nor a thread refers to the transport, so that it can be collected while they exist.
        weakref.finalize(self, _end, self._waiter, self._notifier, self._pool).atexit = False

    @property
    def dead(self) -> PostgresDeadLetters:
        """The dead letters of this schema."""
        return PostgresDeadLetters(self._pool, self._statements, self._channels, owner=self)

    def reset_after_fork(self) -> None:
        """Drop the state of the parent process. A forked child calls this, and can use the transport afterwards."""
        self._pool.reset()
        self._notifier.reset()
        self._waiter.reset()

    def migrate(self, *, lock_timeout: float = LOCK_TIMEOUT, create_tables: bool | None = None) -> list[str]:
        """Create the missing schema, tables and indexes. Several processes may do this at once.

        Args:
            lock_timeout: seconds to wait for a lock on a table; senders wait too in this time. Default 5.
            create_tables: whether to create the tables that the product's own migrations create too. None (default):
                create them, unless Django has its migrations in the schema.

        Returns:
            The names of the created objects.

        Raises:
            TransportNotReady: an existing table lacks a column, an existing index is not valid, or Django must create a
                table first.
            TransportUnavailable: a lock was not free in time; the text names the session that holds it.
        """
        self._check_open()
        if not 0 < lock_timeout <= _LARGEST:
            raise ConfigurationError(f"lock_timeout must be positive, and {_LARGEST} at most; got {lock_timeout!r}")
        return migrate(self._connector, self._statements, lock_timeout=lock_timeout, create_tables=create_tables)

    def migration_sql(self, *, create_tables: bool | None = None) -> str:
        """Return the work of `migrate` as SQL, for another migration tool. It can run several times.

        Args:
            create_tables: False omits the two tables that the product's migrations create too.
        """
        return migration_sql(self._statements, create_tables=create_tables)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Store all of `messages` or none, in one commit. They are durable when it returns.

        Args:
            messages: the messages.
            within: an open cursor of psycopg 3, psycopg2 or Django, inside its caller's transaction. The messages are
                committed or rolled back with that transaction. After an error the transaction has failed; if the error
                is TransportUnavailable, the caller can repeat the whole transaction. None (default): `send` commits.

        Returns:
            The ids of the messages, in order.

        Raises:
            PayloadError: a value cannot be sent; nothing was sent.
            TransportUnavailable: `fate_unknown` says whether sending again may double the messages.
            TransportRefused: the database rejects a message.
            TransportNotReady: a table or a right is missing.
        """
        self._check_open()
        if within is not None:
            return self._sender.send_within(within, messages)
        return self._sender.send(messages) if messages else []

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`; None if there is none.

        Args:
            key: the key of the reply.
            timeout: seconds to wait for it, also through an outage. Default 0.
            consume: whether to clear its result and error after reading. Default False.
        """
        if not isinstance(key, str):
            raise PayloadError(f"expected a text, got {type(key).__name__}", path="$.key")
        normalise(key, path="$.key")
        return self._replies.read(key, timeout=timeout, consume=consume, check_open=self._check_open)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> PostgresSubscription:
        """Receive from queues, on a separate connection of the subscription.

        Args:
            queues: the names of the queues.
            lease: seconds for which a message is claimed.

        Raises:
            TransportNotReady: a table, a column or a right that a consumer needs is missing.
        """
        self._check_open()
        names = check_subscription(queues, lease)
        # A statement that takes long must not delay the renewals, which need the same connection.
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
            clock=self._clock,
        )
        self._subscriptions.add(subscription)
        return subscription

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Return the state of queues.

        It counts at most 100,000 messages of a queue in each state, and fewer for more than ten queues. If more
        messages are ready, in flight or delayed, the state is `estimated`. Dead letters and messages in unknown states
        are counted up to that number. `unknown` is 0 until `migrate` has created the index for it.

        Args:
            names: the queues; None (default) for all queues that hold a message or dead letter.
        """
        self._check_open()
        return self._inspector.queues(names)

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return the names of the tasks of the first `limit` ready messages of `queue`, with their counts."""
        self._check_open()
        return self._inspector.waiting_tasks(queue, limit)

    def workers(self) -> Sequence[WorkerState]:
        """Return this package's sessions in this database.

        A role that may not read statistics sees only its own sessions in full.
        """
        self._check_open()
        return self._inspector.workers()

    def check_up(self, *, limits: DiagnosticLimits | None = None) -> Iterator[Finding]:
        """Check the server, the connection and the tables, and yield a finding for each check.

        Args:
            limits: the limits above which a finding is a warning. None: the default limits.
        """
        self._check_open()
        return check_up(self._connector, self._statements, listens=self._listen, limits=limits or DiagnosticLimits())

    def close(self) -> None:
        """End waiting calls with TransportClosed, and close the connections, except those of subscriptions.

        The owner of a subscription closes it. Closing twice is allowed.
        """
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.wake()
        self._waiter.close()
        self._notifier.close()
        self._pool.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this PostgreSQL transport was closed")


def _end(waiter: ReplyWaiter, notifier: Notifier, pool: Pool) -> None:
    """End the threads and connections of a transport that was collected. It may run on any thread, at any line."""
    waiter.close()
    notifier.end()
    pool.close()


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
