"""`PostgresDeadLetters`: finds, replays and purges dead letters, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from transports.postgres.connection import Rows
from transports.postgres.content_errors import QUERY_CANCELED, cause_of, may_be_the_content, state_of
from transports.postgres.errors import NotifyQueueFull
from transports.postgres.notifier import Channels
from transports.postgres.pool import Pool
from transports.postgres.rows import RemovedRow, dead_letter_in, first_column_in, removed_rows_in
from transports.postgres.statements import Statements
from transports.postgres.unread import TOO_LARGE
from unstract_core.errors import TransportError, TransportUnavailable
from unstract_core.transport import DeadLetter
from unstract_core.values.limits import MAX_SIZE

T = TypeVar("T")

_BATCH = 1000
_OPERATIONS = {"replay_dead": "replay dead letters", "purge_dead": "purge dead letters"}
_PARTICIPLES = {"replay_dead": "replayed", "purge_dead": "purged"}
_MOST_LISTED = MAX_SIZE
_NOT_LISTED = f"a list reads {MAX_SIZE >> 20} MiB of content, the newest first"


class PostgresDeadLetters:
    """The dead letters in the table pg_queue_dead_letter. Thread-safe.

    Args:
        pool: runs the statements.
        statements: the statements of the schema.
        channels: the channels on which a replay notifies workers.
        owner: the transport, which must not be collected before this object.
    """

    def __init__(self, pool: Pool, statements: Statements, channels: Channels, *, owner: object) -> None:
        self._owner = owner
        self._pool = pool
        self._statements = statements
        self._channels = channels

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest dead letters, newest first.

        They have 64 MiB of content in all; older ones come without content, and `omitted` says so.

        Args:
            queue: the queue; None for all queues.
            limit: the number of dead letters at most.
        """
        chosen = {"queue": queue, "limit": limit, "each": False}
        try:
            return self._list({**chosen, "most": _MOST_LISTED})
        except TransportError as exc:
            if not may_be_the_content(exc):
                raise
        without = self._list({**chosen, "most": -1})
        readable = {letter.id: letter for letter in self._in_parts([int(each.id) for each in without], _MOST_LISTED)}
        return [readable.get(letter.id, letter) for letter in without]

    def summaries(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest dead letters, newest first, without their content: each has `omitted`.

        Args:
            queue: the queue; None for all queues.
            limit: the number of dead letters at most.
        """
        return self._list({"queue": queue, "limit": limit, "each": False, "most": -1})

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return the existing dead letters of `ids`. If the content of one cannot be read, it has `omitted`."""
        return self._in_parts(sorted(set(_numbers(ids))), self._statements.largest)

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each dead letter again as a new message, the oldest first, and remove the dead letter.

        Each batch is one commit: see `replay_in_batches`.

        Args:
            ids: the dead letters; None for all.
            queue: the queue; None for all queues.

        Returns:
            The ids of the replayed dead letters.

        Raises:
            TransportUnavailable: if a later batch fails, the text says how many were replayed before it, and
                `fate_unknown` is set.
        """
        return [id for batch in _as_one(self.replay_in_batches(ids, queue=queue)) for id in batch]

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove dead letters for good.

        Each batch is one commit: see `purge_in_batches`.

        Args:
            ids: the dead letters; None for all.
            queue: the queue; None for all queues.
            older_than: seconds that must have passed since a message was dead-lettered. Default 0.

        Returns:
            The number of removed dead letters.

        Raises:
            TransportUnavailable: if a later batch fails, the text says how many were purged before it, and
                `fate_unknown` is set.
        """
        return sum(_as_one(self.purge_in_batches(ids, queue=queue, older_than=older_than)))

    def replay_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None
    ) -> Iterator[Sequence[str]]:
        """Replay the dead letters that exist now; yield the ids of each batch after its commit."""
        for rows in self._batches("replay_dead", ids, {"queue": queue, "channel": self._channels.queues}):
            yield [str(row.dead_id) for row in rows if row.removed]

    def purge_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None, older_than: float = 0.0
    ) -> Iterator[int]:
        """Remove the dead letters that exist now; yield the number in each batch after its commit."""
        for rows in self._batches("purge_dead", ids, {"queue": queue, "older_than": float(older_than)}):
            yield sum(row.removed for row in rows)

    def _batches(self, name: str, ids: Sequence[str] | None, parameters: dict[str, Any]) -> Iterator[list[RemovedRow]]:
        """Run a statement over batches of dead letters. If it takes too long, it runs again with fewer.

        If a batch fails, the error has the number of dead letters in the batches before it. `fate_unknown` is about the
        failed batch.
        """
        operation = _OPERATIONS[name]
        done = 0
        (until,) = first_column_in(self._read(operation, "last_dead", {}))
        numbers = None if ids is None else sorted(set(_numbers(ids)))
        starts: Sequence[int] = [0] if numbers is None else range(0, len(numbers), _BATCH)
        limit = _BATCH
        for start in starts if until is not None else ():
            chosen = None if numbers is None else numbers[start : start + _BATCH]
            after, full = -(1 << 63), True
            while full:
                bounds = {"ids": chosen, "after": after, "until": until, "limit": limit}
                try:
                    read = self._pool.execute(operation, self._statements[name], {**parameters, **bounds})
                except NotifyQueueFull:
                    parameters = {**parameters, "channel": None}
                    continue
                except TransportError as exc:
                    if isinstance(exc, TransportUnavailable) and state_of(exc) == QUERY_CANCELED and limit > 1:
                        limit = max(1, limit // 4)
                        continue
                    if done:
                        _name_the_progress(exc, done, _PARTICIPLES[name])
                    raise
                rows = removed_rows_in(read)
                full = len(rows) == limit
                if rows:
                    after = rows[-1].dead_id
                    done += sum(row.removed for row in rows)
                    yield rows

    def _list(self, parameters: dict[str, Any]) -> list[DeadLetter]:
        rows = self._read("list dead letters", "find_dead", parameters)
        return [dead_letter_in(row, _NOT_LISTED) for row in rows]

    def _in_parts(self, ids: list[int], most: int) -> list[DeadLetter]:
        """Read dead letters together, or in halves down to the one whose content PostgreSQL cannot return."""
        parameters = {"ids": ids, "each": True, "most": most}
        try:
            return [dead_letter_in(row, TOO_LARGE) for row in self._read("read dead letters", "get_dead", parameters)]
        except TransportError as exc:
            if not ids or not may_be_the_content(exc):
                raise
            if len(ids) > 1:
                middle = len(ids) // 2
                return [*self._in_parts(ids[:middle], most), *self._in_parts(ids[middle:], most)]
            reason = f"PostgreSQL cannot return it: {cause_of(exc)}"
        rows = self._read("read dead letters", "get_dead", {**parameters, "most": -1})
        return [dead_letter_in(row, reason) for row in rows]

    def _read(self, operation: str, name: str, parameters: dict[str, Any]) -> Rows:
        return self._pool.execute(operation, self._statements[name], parameters, idempotent=True)


def _name_the_progress(exc: TransportError, done: int, participle: str) -> None:
    """Change the text of an error about one batch so that it also counts the dead letters of the batches before it."""
    letters = "1 dead letter was" if done == 1 else f"{done} dead letters were"
    exc.args = (f"{letters} {participle}; the batch after that failed: {exc.problem}",)
    exc.effect = exc.effect.replace("nothing ", "nothing of it ", 1)


def _as_one(batches: Iterator[T]) -> Iterator[T]:
    """Yield batches that the caller reports together: a failure after a successful batch leaves an effect."""
    any_done = False
    try:
        for batch in batches:
            any_done = any_done or bool(batch)
            yield batch
    except TransportUnavailable as exc:
        exc.fate_unknown = exc.fate_unknown or any_done
        raise


def _numbers(ids: Sequence[str]) -> list[int]:
    """Return the ids that a row can have; no dead letter has another id."""
    return [int(id) for id in ids if id.isascii() and id.isdigit() and len(id) <= 19 and int(id) < 1 << 63]
