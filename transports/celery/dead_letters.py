"""The operator's side: buried messages, each in the queue `<queue>.dead` beside its own.

A broker cannot look into a queue, so these take every letter out and put it back: the letters stay in their order, and
one that is looked at by two operators at once is seen by one of them. Nor can it list its queues: a queue is named.
A letter's id is `<queue>/<uuid>`.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs
import kombu

from transports.celery.broker import Broker, Settings
from transports.celery.envelope import Envelope, read_message
from transports.celery.errors import mapped
from transports.celery.protocol import DEAD_SUFFIX
from transports.celery.publishers import Publishers
from transports.celery.settling import DEAD_RESULT, as_new
from unstract_core.errors import NotSupported
from unstract_core.transport import DeadLetter
from unstract_core.values import normalise

_MOST = 100_000
"""How many letters of one queue are looked at."""


@attrs.frozen
class _Found:
    letter: DeadLetter
    message: kombu.Message


class CeleryDeadLetters:
    """The dead letters of the queues that are named; see `unstract_core.DeadLetters`."""

    def __init__(self, publishers: Publishers, settings: Settings, default_queue: str) -> None:
        self._publishers = publishers
        self._settings = settings
        self._default_queue = default_queue

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest letters of `queue` first. Raises NotSupported where no queue is named."""
        found: list[DeadLetter] = []
        self._publishers.check_open("list dead letters")
        with self._looking(_named(queue), "list dead letters") as (_, letters):
            found += [one.letter for one in reversed(letters)]
        return sorted(found, key=lambda letter: letter.buried_at, reverse=True)[:limit]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return those of `ids` that are there."""
        found: list[DeadLetter] = []
        self._publishers.check_open("read dead letters")
        for queue, wanted in _by_queue(ids).items():
            with self._looking(queue, "read dead letters") as (_, letters):
                found += [one.letter for one in letters if one.letter.id in wanted]
        return found

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each again as new, the oldest first, and remove it here; returns the ids of those.

        The new message is confirmed before its letter is removed: a crash between them can double it.
        """
        replayed: list[str] = []
        self._publishers.check_open("replay dead letters")
        for name, wanted in _chosen(ids, queue).items():
            with self._looking(name, "replay dead letters") as (broker, letters):
                for one in letters:
                    if wanted is None or one.letter.id in wanted:
                        (error,) = broker.publish("replay dead letters", [as_new(one.message, name)])
                        if error is not None:
                            raise error
                        one.message.ack()
                        replayed.append(one.letter.id)
        return replayed

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove for good those that were buried more than `older_than` seconds ago; return how many."""
        purged = 0
        self._publishers.check_open("purge dead letters")
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_than)
        for name, wanted in _chosen(ids, queue).items():
            with self._looking(name, "purge dead letters") as (_, letters):
                for one in letters:
                    if (wanted is None or one.letter.id in wanted) and one.letter.buried_at <= before:
                        one.message.ack()
                        purged += 1
        return purged

    @contextlib.contextmanager
    def _looking(self, queue: str, doing: str) -> Iterator[tuple[Broker, list[_Found]]]:
        """Take out every letter of `queue`, the oldest first; what is not acknowledged in the block is put back."""
        with self._publishers.broker(doing) as broker, mapped(doing, fate_unknown=True):
            dead = self._settings.queue(queue + DEAD_SUFFIX)
            if self._settings.declare:
                broker.declare(dead, doing)
            channel = broker.connection.channel()
            try:
                bound = dead.bind(channel)
                messages = list(_all(bound.get))
                found = [_Found(self._letter(message, queue), message) for message in messages]
                try:
                    yield broker, sorted(found, key=lambda one: one.letter.buried_at)
                finally:
                    for message in messages:
                        if not message.acknowledged:
                            message.requeue()
            finally:
                channel.close()

    def _letter(self, message: kombu.Message, queue: str) -> DeadLetter:
        envelope = read_message(message, queue, default_queue=self._default_queue, time_limits=True)
        headers = message.headers
        buried_at = _moment(headers.get("x-dead-at"))
        result = envelope.body[2].get(DEAD_RESULT) if envelope.body is not None else None
        attempts = headers.get("x-dead-attempts")
        return DeadLetter(
            id=f"{queue}/{headers.get('x-dead-id') or envelope.id or envelope.correlation_id}",
            queue=queue,
            message=normalise(_stored(envelope), lenient=True),
            reason=str(headers.get("x-dead-reason", "put here by others")),
            attempts=attempts if isinstance(attempts, int) else 0,
            result=normalise(result, lenient=True),
            org_id=envelope.org_id,
            priority=envelope.priority,
            enqueued_at=buried_at,
            buried_at=buried_at,
        )


def _all(get: Callable[..., kombu.Message | None]) -> Iterable[kombu.Message]:
    for _ in range(_MOST):
        if (message := get(no_ack=False)) is None:
            return
        yield message


def _stored(envelope: Envelope) -> object:
    """Return the message on our wire; of one that is unreadable, what could be read."""
    return envelope.raw


def _named(queue: str | None) -> str:
    if queue is None:
        raise NotSupported("a broker cannot list its queues: name the queue whose dead letters you mean (--queue NAME)")
    return queue


def _chosen(ids: Sequence[str] | None, queue: str | None) -> dict[str, set[str] | None]:
    """Return the queues to look into, with the ids that are meant; None for all."""
    if ids is None:
        return {_named(queue): None}
    return {name: wanted for name, wanted in _by_queue(ids).items() if queue in (None, name)}


def _by_queue(ids: Sequence[str]) -> dict[str, set[str]]:
    """Sort ids by their queues; what is no id of ours is of no queue, and is not there."""
    found: dict[str, set[str]] = {}
    for id in ids:
        queue, slash, _ = id.rpartition("/")
        if slash and queue:
            found.setdefault(queue, set()).add(id)
    return found


def _moment(text: object) -> datetime.datetime:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(text)  # type: ignore[arg-type]  # a TypeError is what is expected
    return datetime.datetime.now(datetime.UTC)
