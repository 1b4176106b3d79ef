"""`Connection`: psycopg's connection with a time limit for statements and a record of its state."""

from __future__ import annotations

import contextlib
import json
import select
import time
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.postgres import register_default_adapters, register_default_types
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg.types import TypesRegistry
from psycopg.types.json import set_json_loads

CANCEL_TIMEOUT = 2.0
"""Seconds until a cancel request, and then its effect, must have arrived."""

Parameters: TypeAlias = "dict[str, Any] | tuple[Any, ...]"
Rows: TypeAlias = "list[tuple[Any, ...]]"
Result = TypeVar("Result")

_SET_CONFIG = b"""
    SELECT set_config(s.name, s.value, %(local)s) FROM unnest(%(names)b::text[], %(values)b::text[]) AS s (name, value)
"""


class Connection(psycopg.Connection[TupleRow]):
    """A connection of this package, in autocommit.

    Attributes:
        pooled: whether a pooler is between this process and the server. If so, the connection must not prepare
            statements and must not listen.
        limit: seconds that a statement may take before it is cancelled; None for no limit. If the server does not
            answer the cancel request either, the connection is broken.
        has_prepared: whether `libpq_exec` has prepared its statement here.
        spoiled: whether the connection must not run another statement, which a late cancel request could hit.
        generation: the connector's generation when the connection was made.
        missing_settings: the settings, with their values, that statements need and a pooler does not keep for a
            session. Each transaction sets them. Empty on a direct connection.
        jit_enabled: whether a pooler's sessions compile expensive plans, so that single statements switch that off.
        large: whether libpq has grown a buffer for a large statement or row; it never releases one.
    """

    pooled: bool = False
    limit: float | None = None
    has_prepared: bool = False
    spoiled: bool = False
    generation: int = 0
    missing_settings: Mapping[str, str] = {}
    jit_enabled: bool = False
    large: bool = False
    _was_read_only: bool = False

    @property
    def adapters(self) -> AdaptersMap:
        """psycopg's default adapters, without those that the application registers for all connections."""
        if self._adapters is None:
            self._adapters = AdaptersMap(own_adapters())
        return self._adapters

    @cached_property
    def commits(self) -> CommitNotices:
        """The server's warnings about commits on this connection."""
        commits = CommitNotices()
        self.add_notice_handler(commits.receive)
        return commits

    @property
    def is_read_only(self) -> bool:
        """Whether the server has reported that it accepts no writes; PostgreSQL 14 and newer report it unasked."""
        status = self.pgconn.parameter_status
        return status(b"default_transaction_read_only") == b"on" or status(b"in_hot_standby") == b"on"

    @property
    def was_read_only(self) -> bool:
        """Whether the server was read-only when the connection was made."""
        return self._was_read_only

    @property
    def became_read_only(self) -> bool:
        """Whether the server became read-only after the connection was made, like an old primary."""
        return not self._was_read_only and self.is_read_only

    def note_created(self, generation: int) -> None:
        """Record the state of a new connection."""
        self.generation = generation
        self._was_read_only = self.is_read_only

    def set_config(self, settings: Mapping[str, str], *, local: bool) -> None:
        """Set settings for the current transaction (`local`) or for the session."""
        self.execute(_SET_CONFIG, {"names": list(settings), "values": list(settings.values()), "local": local})

    @contextlib.contextmanager
    def within_limit(self, seconds: float) -> Iterator[None]:
        """Lower the limit of the statements in the block to `seconds`."""
        usual = self.limit
        self.limit = seconds if usual is None else min(usual, seconds)
        try:
            yield
        finally:
            self.limit = usual

    @contextlib.contextmanager
    def with_settings(self) -> Iterator[None]:
        """Run the block in a transaction with the missing settings."""
        begun = self.pgconn.transaction_status == TransactionStatus.INTRANS
        with contextlib.nullcontext() if begun else self.transaction():
            self.set_config(self.missing_settings, local=True)
            yield

    def wait(self, gen: PQGen[Result], *args: Any, **kwargs: Any) -> Result:
        """Wait for the server as psycopg does, within the limit."""
        return super().wait(gen if self.limit is None else self._limited(gen, self.limit), *args, **kwargs)

    def _limited(self, gen: PQGen[Result], limit: float) -> PQGen[Result]:
        deadline = time.monotonic() + limit
        cancelled = False
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= deadline:
                    if cancelled:
                        raise psycopg.OperationalError(f"no answer within {limit:g} s")
                    cancelled = True
                    self.cancel_running()
                    deadline = time.monotonic() + CANCEL_TIMEOUT
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Result = end.value
            return result

    def cancel_running(self) -> None:
        """Cancel the running statement through another connection. The caller must still wait for its end."""
        self.spoiled = True
        with contextlib.suppress(psycopg.Error):
            self.cancel_safe(timeout=CANCEL_TIMEOUT)

    @property
    def usable(self) -> bool:
        """Whether the connection can run another statement: it is not broken, and the last statement has ended."""
        return not self.spoiled and self.pgconn.transaction_status == TransactionStatus.IDLE

    @property
    def has_unread_data(self) -> bool:
        """Whether an idle connection has data to read, without a round trip: a server writes before it closes one."""
        return self.poll(select.POLLIN, 0.0)

    def poll(self, events: int, seconds: float | None) -> bool:
        """Wait until the socket is ready for one of these events of `select.poll`; False after the time limit."""
        self._poll.modify(self.fileno(), events)
        return bool(self._poll.poll(None if seconds is None else seconds * 1000))

    @cached_property
    def _poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self.fileno())
        return poll


class CommitNotices:
    """Records whether a commit of a connection was not replicated, of which the server warns."""

    unreplicated = False

    def receive(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.source_file == "syncrep.c":
            self.unreplicated = True


@cache
def own_adapters() -> AdaptersMap:
    """Return psycopg's default adapters, without those that an application has registered."""
    types = TypesRegistry()
    register_default_types(types)
    adapters = AdaptersMap(types=types)
    register_default_adapters(adapters)
    for info in types:
        if info.array_oid:
            info.register(adapters)
    set_json_loads(json.loads, adapters)
    return adapters
