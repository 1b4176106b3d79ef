"""The operator's side: buried messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from transports.postgres.errors import NotifyQueueFull
from transports.postgres.notifier import Channels
from transports.postgres.pool import Pool
from transports.postgres.rows import parsed
from transports.postgres.statements import Statements
from transports.postgres.unread import TOO_LARGE, cause_of, may_be_the_content, state_of
from unstract_core.errors import TransportError, TransportUnavailable
from unstract_core.transport import DeadLetter
from unstract_core.values.limits import MAX_SIZE

T = TypeVar("T")

_BATCH = 1000
_DOING = {"replay_dead": "replay dead letters", "purge_dead": "purge dead letters"}
_DONE = {"replay_dead": "replayed", "purge_dead": "purged"}
_MOST_LISTED = MAX_SIZE
_NOT_LISTED = f"a list reads {MAX_SIZE >> 20} MiB of content, the newest first"


class PostgresDeadLetters:
    """The table pg_queue_dead_letter. `owner` is the transport, which lives as long as anything uses its pool."""

    def __init__(self, pool: Pool, statements: Statements, channels: Channels, *, owner: object) -> None:
        self._owner = owner
        self._pool = pool
        self._statements = statements
        self._channels = channels

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest letters first, with 64 MiB of content in all; older letters come with `omitted`."""
        chosen = {"queue": queue, "limit": limit, "each": False}
        try:
            return self._listed({**chosen, "most": _MOST_LISTED})
        except TransportError as exc:
            if not may_be_the_content(exc):
                raise
        without = self._listed({**chosen, "most": -1})
        known = {letter.id: letter for letter in self._in_parts([int(one.id) for one in without], _MOST_LISTED)}
        return [known.get(one.id, one) for one in without]

    def summaries(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest letters first, without their content: each is `omitted`."""
        return self._listed({"queue": queue, "limit": limit, "each": False, "most": -1})

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return those of `ids` that are there; one whose content cannot be read comes with `omitted`."""
        return self._in_parts(sorted(set(_numbers(ids))), self._statements.largest)

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each again as new, the oldest first, and remove it here; return the ids of those.

        Each batch is one commit: see `replay_in_batches`. If a later batch fails, the error says how many letters were
        replayed before it, and its fate is unknown.
        """
        return [id for batch in _as_one(self.replay_in_batches(ids, queue=queue)) for id in batch]

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove for good those that were buried more than `older_than` seconds ago; return how many.

        Each batch is one commit: see `purge_in_batches`. If a later batch fails, the error says how many letters were
        purged before it, and its fate is unknown.
        """
        return sum(_as_one(self.purge_in_batches(ids, queue=queue, older_than=older_than)))

    def replay_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None
    ) -> Iterator[Sequence[str]]:
        """Replay those that are there now, and yield the ids of each batch when it is committed."""
        for rows in self._batches("replay_dead", ids, {"queue": queue, "channel": self._channels.queues}):
            yield [str(dead_id) for dead_id, sent, _ in rows if sent]

    def purge_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None, older_than: float = 0.0
    ) -> Iterator[int]:
        """Remove those that are there now, and yield how many were in each batch when it is committed."""
        for rows in self._batches("purge_dead", ids, {"queue": queue, "older_than": float(older_than)}):
            yield sum(purged for _, purged in rows)

    def _batches(
        self, name: str, ids: Sequence[str] | None, parameters: dict[str, Any]
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Run a statement over batches of letters. One that takes too long is tried again with fewer letters.

        If a batch fails, the error says how many letters were done before it, and whether this batch was is its fate.
        """
        done = 0
        ((until,),) = self._read(_DOING[name], "last_dead", {})
        numbers = None if ids is None else sorted(set(_numbers(ids)))
        starts: Sequence[int] = [0] if numbers is None else range(0, len(numbers), _BATCH)
        limit = _BATCH
        for start in starts if until is not None else ():
            chosen = None if numbers is None else numbers[start : start + _BATCH]
            after, full = -(1 << 63), True
            while full:
                bounds = {"ids": chosen, "after": after, "until": until, "limit": limit}
                try:
                    rows = self._pool.execute(_DOING[name], self._statements[name], {**parameters, **bounds})
                except NotifyQueueFull:
                    parameters = {**parameters, "channel": None}
                    continue
                except TransportError as exc:
                    if isinstance(exc, TransportUnavailable) and state_of(exc) == "57014" and limit > 1:
                        limit = max(1, limit // 4)
                        continue
                    if done:
                        _say_what_was_done(exc, done, _DONE[name])
                    raise
                full = len(rows) == limit
                if rows:
                    after = rows[-1][0]
                    done += sum(row[1] for row in rows)
                    yield rows

    def _listed(self, parameters: dict[str, Any]) -> list[DeadLetter]:
        rows = self._read("list dead letters", "find_dead", parameters)
        return [_letter(_NOT_LISTED, *row) for row in rows]

    def _in_parts(self, ids: list[int], most: int) -> list[DeadLetter]:
        """Read letters together, or in halves down to the one whose content PostgreSQL cannot return."""
        parameters = {"ids": ids, "each": True, "most": most}
        try:
            return [_letter(TOO_LARGE, *row) for row in self._read("read dead letters", "get_dead", parameters)]
        except TransportError as exc:
            if not ids or not may_be_the_content(exc):
                raise
            if len(ids) > 1:
                middle = len(ids) // 2
                return [*self._in_parts(ids[:middle], most), *self._in_parts(ids[middle:], most)]
            why = f"PostgreSQL cannot return it: {cause_of(exc)}"
        return [_letter(why, *row) for row in self._read("read dead letters", "get_dead", {**parameters, "most": -1})]

    def _read(self, operation: str, name: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        return self._pool.execute(operation, self._statements[name], parameters, idempotent=True)


def _say_what_was_done(exc: TransportError, done: int, how: str) -> None:
    """Let the text of an error be about the batch that failed, and name the letters of those before it."""
    letters = "1 dead letter was" if done == 1 else f"{done} dead letters were"
    exc.args = (f"{letters} {how}; the batch after that failed: {exc.problem}",)
    exc.effect = exc.effect.replace("nothing ", "nothing of it ", 1)


def _as_one(batches: Iterator[T]) -> Iterator[T]:
    """Yield batches that the caller reports together: where one fails after others, the call has had an effect."""
    any_done = False
    try:
        for batch in batches:
            any_done = any_done or bool(batch)
            yield batch
    except TransportUnavailable as exc:
        exc.fate_unknown = exc.fate_unknown or any_done
        raise


def _numbers(ids: Sequence[str]) -> list[int]:
    """Return the ids that can be rows at all: anything else is simply not there."""
    return [int(id) for id in ids if id.isascii() and id.isdigit() and len(id) <= 19 and int(id) < 1 << 63]


def _letter(
    why: str, dead_id: int, queue: str, message: Any, reason: str, attempts: int, result: Any, *rest: Any
) -> DeadLetter:
    org_id, priority, enqueued_at, buried_at, whole = rest
    return DeadLetter(
        id=str(dead_id),
        queue=queue,
        message=parsed(message),
        reason=reason,
        attempts=attempts,
        result=parsed(result),
        org_id=org_id,
        priority=priority,
        enqueued_at=enqueued_at,
        buried_at=buried_at,
        omitted="" if whole else why,
    )
