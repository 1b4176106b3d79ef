"""The operator's side: buried messages, each in the queue `<queue>.dead` beside its own.

A broker cannot look into a queue, so these take every letter out and put it back: the letters stay in their order, and
one that is looked at by two operators at once is seen by one of them. Nor can it list its queues: a queue is named,
and one that is not there, or cannot be, has no letters. A letter's id is `<queue>/<uuid>`.

A quorum queue counts how often a message was put back, and drops it in the end (RabbitMQ 4 after 20 times); it may mix
them, too. So its letters are put back once, and when they are looked at again sent anew, in the order of their burial,
each confirmed before the old one is removed.
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

_MOST = 100_000
"""How many letters of one queue are looked at."""
_AT_ONCE = 10
"""How many are removed in one go: of more than 32 acknowledgements that a quorum queue has not taken yet, the others
wait in the channel, and are lost when it is closed."""


@attrs.frozen
class _Found:
    """A letter that was taken out of its queue."""

    id: str
    buried_at: datetime.datetime
    message: kombu.Message


class CeleryDeadLetters:
    """The dead letters of the queues that are named; see `unstract_core.DeadLetters`."""

    def __init__(self, publishers: PublisherPool, default_queue: str) -> None:
        self._publishers = publishers
        self._default_queue = default_queue

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return the newest letters of `queue` first. Raises NotSupported where no queue is named."""
        found: list[DeadLetter] = []
        self._publishers.check_open("list dead letters")
        for name in _chosen(None, queue):
            with self._looking(name, "list dead letters") as look:
                found += [self._letter(one, name) for one in look.letters()[::-1][:limit]]
        return found

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return those of `ids` that are there."""
        found: list[DeadLetter] = []
        self._publishers.check_open("read dead letters")
        for name, wanted in _chosen(ids, None).items():
            with self._looking(name, "read dead letters") as look:
                found += [self._letter(one, name) for one in look.letters(wanted)]
        return found

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each again as new, the oldest first, and remove it here; returns the ids of those.

        The new message is confirmed before its letter is removed: a crash between them can double it.
        """
        replayed: list[str] = []
        self._publishers.check_open("replay dead letters")
        for name, wanted in _chosen(ids, queue).items():
            with self._looking(name, "replay dead letters", removes=True) as look:
                for one in look.letters(wanted):
                    (error,) = look.broker.publish("replay dead letters", [replay_copy(one.message, name)])
                    if error is not None:
                        raise error
                    look.remove(one)
                    replayed.append(one.id)
        return replayed

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove for good those that were buried more than `older_than` seconds ago; return how many."""
        purged = 0
        self._publishers.check_open("purge dead letters")
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_than)
        for name, wanted in _chosen(ids, queue).items():
            with self._looking(name, "purge dead letters", removes=True) as look:
                for one in look.letters(wanted):
                    if not older_than or one.buried_at <= before:
                        look.remove(one)
                        purged += 1
        return purged

    @contextlib.contextmanager
    def _looking(self, queue: str, doing: str, *, removes: bool = False) -> Iterator[_Look]:
        """Take out every letter of `queue`. Those that the block does not remove are put back, also after an error."""
        with self._publishers.broker(doing) as broker, mapped(doing, fate_unknown=removes):
            look = _Look(broker, queue, doing)
            try:
                look.take()
                yield look
            except BaseException:
                with contextlib.suppress(Exception):
                    look.put_back()
                raise
            look.put_back()

    def _letter(self, one: _Found, queue: str) -> DeadLetter:
        envelope = read_message(one.message, queue, default_queue=self._default_queue, time_limits=True)
        headers = one.message.headers
        result = envelope.body[2].get(DEAD_RESULT) if envelope.body is not None else None
        attempts = headers.get("x-dead-attempts")
        return DeadLetter(
            id=one.id,
            queue=queue,
            message=normalise(_stored(one.message, envelope), lenient=True),
            reason=str(headers.get("x-dead-reason", "put here by others")),
            attempts=attempts if isinstance(attempts, int) else 0,
            result=normalise(result, lenient=True),
            org_id=envelope.org_id,
            priority=envelope.priority,
            enqueued_at=one.buried_at,
            buried_at=one.buried_at,
        )


class _Look:
    """The letters of one queue, while they are out of it."""

    def __init__(self, broker: Broker, queue: str, doing: str) -> None:
        self.broker = broker
        self._queue = queue
        self._dead = queue + DEAD_SUFFIX
        self._doing = doing
        self._channel = broker.temporary_channel()
        self._out: list[kombu.Message] = []
        self._removed = 0

    def take(self) -> None:
        """Take out what stands there now. For a quorum queue this also waits until it has taken all removals."""
        with contextlib.suppress(NotFound):
            while len(self._out) < _MOST and (message := self._channel.basic_get(self._dead, no_ack=False)) is not None:
                self._out.append(self._channel.message_to_python(message))

    def letters(self, wanted: Collection[str] | None = None) -> list[_Found]:
        """Return those of the ids that are `wanted`, or all; the oldest first."""
        found = (one for one in _found(self._out, self._queue) if wanted is None or one.id in wanted)
        return sorted(found, key=lambda one: one.buried_at)

    def remove(self, one: _Found) -> None:
        one.message.ack()
        self._removed += 1
        if self._removed % _AT_ONCE == 0 and self.broker.amqp:
            self.take()

    def put_back(self) -> None:
        if self.broker.amqp and any(message.headers.get("x-delivery-count") for message in self._left()):
            self._send_anew()
        for message in self.broker.in_requeue_order(self._left()):
            message.requeue()
        self._channel.close()

    def _left(self) -> list[kombu.Message]:
        return [message for message in self._out if not message.acknowledged]

    def _send_anew(self) -> None:
        left = sorted(self._left(), key=_buried_at)
        for start in range(0, len(left), _AT_ONCE):
            some = left[start : start + _AT_ONCE]
            outcomes = self.broker.publish(self._doing, [unchanged_copy(message, self._dead) for message in some])
            for message, error in zip(some, outcomes, strict=True):
                if error is None:
                    message.ack()
            self._channel.basic_qos(0, 0, False)  # its answer comes after these were passed on


def _found(messages: Iterable[kombu.Message], queue: str) -> Iterator[_Found]:
    """Give each letter its id; of those that have one in common the later get a number too."""
    seen: Counter[str] = Counter()
    for message in messages:
        id = f"{queue}/{_id(message)}"
        seen[id] += 1
        yield _Found(f"{id}-{seen[id]}" if seen[id] > 1 else id, _buried_at(message), message)


def _id(message: kombu.Message) -> str:
    """Return the id that it was buried with; of what others put there one that is the same at every look."""
    known = message.headers.get("x-dead-id")
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return str(uuid.UUID(known))
    names = (message.headers.get("id"), message.properties.get("correlation_id"))
    return str(uuid.uuid5(CONTINUATION_IDS, repr((names, message.body))))


def _buried_at(message: kombu.Message) -> datetime.datetime:
    """Return when a letter was buried; now, where its header is missing or unreadable."""
    value = message.headers.get("x-dead-at")
    with contextlib.suppress(OverflowError, ValueError):
        moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)
    return datetime.datetime.now(datetime.UTC)


def _stored(message: kombu.Message, envelope: Envelope) -> dict[str, Any]:
    """Return the message on our wire; of one that is unreadable, what could be read, and its body as it is."""
    if envelope.body is not None:
        args, kwargs, _ = envelope.body
        return {**envelope.raw, "args": args, "kwargs": kwargs}
    body = message.body
    with contextlib.suppress(AttributeError, UnicodeError):
        body = body.decode()
    return {**envelope.raw, "body": body}


def _named(queue: str | None) -> str:
    if queue is None:
        raise NotSupported("a broker cannot list its queues: name the queue whose dead letters you mean (--queue NAME)")
    return queue


def _chosen(ids: Sequence[str] | None, queue: str | None) -> dict[str, set[str] | None]:
    """Return the queues to look into, with the ids that are meant; None for all."""
    chosen: dict[str, set[str] | None] = {}
    if ids is None:
        chosen[_named(queue)] = None
    else:
        chosen |= {name: wanted for name, wanted in _by_queue(ids).items() if queue in (None, name)}
    return {name: wanted for name, wanted in chosen.items() if _can_be(name)}


def _by_queue(ids: Sequence[str]) -> dict[str, set[str]]:
    """Sort ids by their queues; what is no id of ours is of no queue, and is not there."""
    found: dict[str, set[str]] = {}
    for id in ids:
        queue, slash, _ = id.rpartition("/")
        if slash and queue:
            found.setdefault(queue, set()).add(id)
    return found


def _can_be(queue: str) -> bool:
    try:
        check_name(queue, "$.queue")
        check_queue(queue)
    except PayloadError:
        return False
    return True
