"""Dead letters, in the queue `<queue>.dead`; the id of a dead letter is `<queue>/<uuid>`.

A broker can neither show the messages of a queue nor list its queues. So each operation names its queue, receives every
dead letter and returns it to the queue. The dead letters keep their order. If two operators read at once, each dead
letter is visible to one of them. A queue that does not exist has no dead letters.

A quorum queue counts how often a message was requeued, and at a limit drops it (RabbitMQ 4 after 20 times). It may also
change the order. So its dead letters are requeued once. Later reads send them again in the order in which they were
dead-lettered, and remove the old message after the broker has confirmed the new one.
"""

from __future__ import annotations

import contextlib
import datetime
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import attrs
import kombu
from amqp.exceptions import NotFound

from transports.celery.broker import Broker
from transports.celery.copies import DEAD_RESULT, replay_copy, unchanged_copy
from transports.celery.decode import Envelope, read_message
from transports.celery.encode import DEAD_SUFFIX, check_queue
from transports.celery.errors import mapped
from transports.celery.publishers import PublisherPool
from unstract_core.codec import check_name
from unstract_core.continuation import CONTINUATION_IDS
from unstract_core.errors import NotSupported, PayloadError
from unstract_core.transport import DeadLetter
from unstract_core.values import normalise

_MAX_READ = 100_000
"""The highest number of dead letters of one queue that an operation reads."""
_REMOVE_BATCH = 10
"""How many dead letters are removed together. A quorum queue accepts some 32 acknowledgements at a time; the others
wait in the channel, and are lost when it is closed."""


@attrs.frozen
class _TakenLetter:
    """A dead letter that was received from its queue and not returned yet."""

    id: str
    buried_at: datetime.datetime
    message: kombu.Message


class CeleryDeadLetters:
    """The dead letters of named queues (`unstract_core.DeadLetters`)."""

    def __init__(self, publishers: PublisherPool, default_queue: str) -> None:
        self._publishers = publishers
        self._default_queue = default_queue

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return dead letters, the newest first.

        Args:
            queue: The queue of the messages; required.
            limit: The highest number of dead letters; 100 by default.

        Raises:
            NotSupported: No queue is named.
        """
        letters: list[DeadLetter] = []
        self._publishers.check_open("list dead letters")
        for name in _chosen(None, queue):
            with self._taken(name, "list dead letters") as taken:
                letters += [self._letter(letter, name) for letter in taken.letters()[::-1][:limit]]
        return letters

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return the dead letters with these ids; unknown ids are omitted."""
        letters: list[DeadLetter] = []
        self._publishers.check_open("read dead letters")
        for name, wanted in _chosen(ids, None).items():
            with self._taken(name, "read dead letters") as taken:
                letters += [self._letter(letter, name) for letter in taken.letters(wanted)]
        return letters

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send dead letters again as new messages, the oldest first, and remove them; return their ids.

        The broker confirms the new message before its dead letter is removed: a crash between the two can double it.

        Args:
            ids: The ids of the dead letters; None (default) for all of `queue`.
            queue: The queue of the messages; None (default) for every queue of `ids`.

        Raises:
            NotSupported: Neither ids nor a queue are named.
        """
        replayed: list[str] = []
        self._publishers.check_open("replay dead letters")
        for name, wanted in _chosen(ids, queue).items():
            with self._taken(name, "replay dead letters", removes=True) as taken:
                for letter in taken.letters(wanted):
                    (error,) = taken.broker.publish("replay dead letters", [replay_copy(letter.message, name)])
                    if error is not None:
                        raise error
                    taken.remove(letter)
                    replayed.append(letter.id)
        return replayed

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove dead letters for good; return how many.

        Args:
            ids: The ids of the dead letters; None (default) for all of `queue`.
            queue: The queue of the messages; None (default) for every queue of `ids`.
            older_than: The age in seconds from which a dead letter is removed; 0 (default) for any age.

        Raises:
            NotSupported: Neither ids nor a queue are named.
        """
        purged = 0
        self._publishers.check_open("purge dead letters")
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_than)
        for name, wanted in _chosen(ids, queue).items():
            with self._taken(name, "purge dead letters", removes=True) as taken:
                for letter in taken.letters(wanted):
                    if not older_than or letter.buried_at <= before:
                        taken.remove(letter)
                        purged += 1
        return purged

    @contextlib.contextmanager
    def _taken(self, queue: str, operation: str, *, removes: bool = False) -> Iterator[_TakenLetters]:
        """Receive every dead letter of a queue. Those that the block does not remove return, also after an error."""
        with self._publishers.broker(operation) as broker, mapped(operation, fate_unknown=removes):
            taken = _TakenLetters(broker, queue, operation)
            try:
                taken.take()
                yield taken
            except BaseException:
                with contextlib.suppress(Exception):
                    taken.put_back()
                raise
            taken.put_back()

    def _letter(self, letter: _TakenLetter, queue: str) -> DeadLetter:
        envelope = read_message(letter.message, queue, default_queue=self._default_queue, time_limits=True)
        headers = letter.message.headers
        result = envelope.body[2].get(DEAD_RESULT) if envelope.body is not None else None
        attempts = headers.get("x-dead-attempts")
        return DeadLetter(
            id=letter.id,
            queue=queue,
            message=normalise(_stored(letter.message, envelope), lenient=True),
            reason=str(headers.get("x-dead-reason", "put here by others")),
            attempts=attempts if isinstance(attempts, int) else 0,
            result=normalise(result, lenient=True),
            org_id=envelope.org_id,
            priority=envelope.priority,
            enqueued_at=letter.buried_at,
            buried_at=letter.buried_at,
        )


class _TakenLetters:
    """The dead letters of one queue, after they were received from it."""

    def __init__(self, broker: Broker, queue: str, operation: str) -> None:
        self.broker = broker
        self._queue = queue
        self._dead = queue + DEAD_SUFFIX
        self._operation = operation
        self._channel = broker.temporary_channel()
        self._out: list[kombu.Message] = []
        self._removed = 0

    def take(self) -> None:
        """Receive all dead letters. For a quorum queue this also waits until all removals are processed."""
        with contextlib.suppress(NotFound):
            while (
                len(self._out) < _MAX_READ
                and (message := self._channel.basic_get(self._dead, no_ack=False)) is not None
            ):
                self._out.append(self._channel.message_to_python(message))

    def letters(self, wanted: Collection[str] | None = None) -> list[_TakenLetter]:
        """Return the dead letters with the `wanted` ids, or all; the oldest first."""
        letters = (letter for letter in _with_ids(self._out, self._queue) if wanted is None or letter.id in wanted)
        return sorted(letters, key=lambda letter: letter.buried_at)

    def remove(self, letter: _TakenLetter) -> None:
        letter.message.ack()
        self._removed += 1
        if self._removed % _REMOVE_BATCH == 0 and self.broker.amqp:
            self.take()

    def put_back(self) -> None:
        if self.broker.amqp and any(message.headers.get("x-delivery-count") for message in self._left()):
            self._send_again()
        for message in self.broker.in_requeue_order(self._left()):
            message.requeue()
        self._channel.close()

    def _left(self) -> list[kombu.Message]:
        return [message for message in self._out if not message.acknowledged]

    def _send_again(self) -> None:
        left = sorted(self._left(), key=_buried_at)
        for start in range(0, len(left), _REMOVE_BATCH):
            batch = left[start : start + _REMOVE_BATCH]
            outcomes = self.broker.publish(self._operation, [unchanged_copy(message, self._dead) for message in batch])
            for message, error in zip(batch, outcomes, strict=True):
                if error is None:
                    message.ack()
            self._channel.basic_qos(0, 0, False)  # the broker answers after it has passed these on


def _with_ids(messages: Iterable[kombu.Message], queue: str) -> Iterator[_TakenLetter]:
    """Give each dead letter its id; a number is added to the second and later ones with the same id."""
    seen: Counter[str] = Counter()
    for message in messages:
        id = f"{queue}/{_id(message)}"
        seen[id] += 1
        yield _TakenLetter(f"{id}-{seen[id]}" if seen[id] > 1 else id, _buried_at(message), message)


def _id(message: kombu.Message) -> str:
    """Return the id that the dead letter got; for a message of another program, an id that every read repeats."""
    known = message.headers.get("x-dead-id")
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return str(uuid.UUID(known))
    names = (message.headers.get("id"), message.properties.get("correlation_id"))
    return str(uuid.uuid5(CONTINUATION_IDS, repr((names, message.body))))


def _buried_at(message: kombu.Message) -> datetime.datetime:
    """Return when a message was dead-lettered; the current time if its header is missing or unreadable."""
    value = message.headers.get("x-dead-at")
    with contextlib.suppress(OverflowError, ValueError):
        moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)
    return datetime.datetime.now(datetime.UTC)


def _stored(message: kombu.Message, envelope: Envelope) -> dict[str, Any]:
    """Return the message on the wire; for an unreadable one, its readable parts and its body unchanged."""
    if envelope.body is not None:
        args, kwargs, _ = envelope.body
        return {**envelope.raw, "args": args, "kwargs": kwargs}
    body = message.body
    with contextlib.suppress(AttributeError, UnicodeError):
        body = body.decode()
    return {**envelope.raw, "body": body}


def _named(queue: str | None) -> str:
    if queue is None:
        raise NotSupported("a broker cannot list its queues: name the queue of the dead letters (--queue NAME)")
    return queue


def _chosen(ids: Sequence[str] | None, queue: str | None) -> dict[str, set[str] | None]:
    """Return the ids by queue; None for all dead letters of a queue."""
    chosen: dict[str, set[str] | None] = {}
    if ids is None:
        chosen[_named(queue)] = None
    else:
        chosen |= {name: wanted for name, wanted in _by_queue(ids).items() if queue in (None, name)}
    return {name: wanted for name, wanted in chosen.items() if _is_valid(name)}


def _by_queue(ids: Sequence[str]) -> dict[str, set[str]]:
    """Group ids by queue; other texts are omitted."""
    by_queue: dict[str, set[str]] = {}
    for id in ids:
        queue, slash, _ = id.rpartition("/")
        if slash and queue:
            by_queue.setdefault(queue, set()).add(id)
    return by_queue


def _is_valid(queue: str) -> bool:
    try:
        check_name(queue, "$.queue")
        check_queue(queue)
    except PayloadError:
        return False
    return True
