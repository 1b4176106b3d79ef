"""Publishing over one connection: a batch of messages costs one round trip.

All messages of a batch are written. Then the publisher waits for all confirms, for at most `confirm_timeout` seconds.
With brokers that kombu emulates (memory://, redis://), a publish that returns is confirmed.

A broker that is short of memory or disk space blocks the connections that publish and stops reading them. Publishing
then returns `Blocked` errors. The broker later confirms a message that was sent before the block.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import kombu
from amqp.exceptions import MessageNacked

from transports.celery.amqp_patches import BoundedIO
from transports.celery.broker_settings import BrokerSettings
from transports.celery.encode import Outgoing
from transports.celery.errors import Blocked, InDoubt, Nacked, Unroutable, translate
from transports.celery.publisher_confirms import PublisherConfirms
from unstract_core.errors import ConfigurationError, TransportError, TransportUnavailable

_BATCH = 500
"""The number of messages for whose confirms the publisher waits together."""
_BLOCKED_WAIT = 1.0
"""The time in seconds to wait for a confirm on a blocked connection whose owner asks again."""


@attrs.define
class ConnectionState:
    """Whether a connection can publish.

    Attributes:
        blocked: The reason why the broker accepts no messages now; None while it accepts them.
        unblocked_at: When the broker last ended a block, on the monotonic clock.
        failed: Whether the connection is no longer usable.
    """

    blocked: str | None = None
    unblocked_at: float = 0.0
    failed: bool = False


class Publisher:
    """Publishes on a separate channel and waits for the broker's confirms.

    Args:
        connection: The open connection of kombu.
        channel: The channel to publish on.
        settings: The settings of the broker.
        state: The state of the connection, shared with its owner.
        io: The reads and writes of the connection; None for a broker that kombu emulates.
        late_confirms: Whether the owner asks later for confirms that a blocked broker has not sent (`confirmation_of`).
        on_block: Called with None when the broker has confirmed messages.
    """

    def __init__(
        self,
        connection: kombu.Connection,
        channel: Any,
        settings: BrokerSettings,
        state: ConnectionState,
        io: BoundedIO | None,
        *,
        late_confirms: bool,
        on_block: Callable[[str | None], None],
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._settings = settings
        self._state = state
        self._io = io
        self._late_confirms = late_confirms
        self._on_block = on_block
        self._confirms = PublisherConfirms()
        if io is not None:
            channel.confirm_select()
            self._confirms.listen(channel)
        elif settings.is_redis:
            channel.priority_steps = [0]  # one list, first in, first out: kombu delivers the lowest priority first
        self._producer = kombu.Producer(channel, serializer="json")

    @property
    def usable(self) -> bool:
        return not self._state.failed and bool(self._connection.connected)

    def publish(self, operation: str, messages: Sequence[Outgoing]) -> list[TransportError | None]:
        """Publish, and return for each message the error that kept it from being accepted; None if it was confirmed.

        Never raises a TransportError, because the broker may have accepted some of the messages.
        """
        outcomes: list[TransportError | None] = []
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            if outcomes and not self.usable:
                outcomes += [_not_sent(outcomes[-1], place_of(operation, message)) for message in batch]
            elif self._state.blocked is not None:
                outcomes += [blocked_error(operation, message, self._state.blocked) for message in batch]
            else:
                outcomes += self._publish_batch(operation, batch)
        return outcomes

    def confirmation_of(self, tag: int) -> bool | None:
        """Return whether an unconfirmed message was accepted; None while the broker has not answered.

        Raises:
            TransportUnavailable: The broker accepts messages again and has not answered for `confirm_timeout` seconds.
                The connection is no longer usable.
        """
        confirmed = self._confirms.confirmation_of(tag)
        if confirmed is None:  # the answer may have arrived and not been read
            with contextlib.suppress(TimeoutError):
                while True:
                    self._connection.drain_events(timeout=0)
            confirmed = self._confirms.confirmation_of(tag)
        timeout = self._settings.confirm_timeout
        wrote_at = self._io.wrote_at if self._io is not None else 0.0
        waited = time.monotonic() - max(self._state.unblocked_at, wrote_at)
        if confirmed is None and self._state.blocked is None and waited >= timeout:
            self._state.failed = True
            raise TransportUnavailable(
                f"the broker takes messages again and has not confirmed one within {timeout:g} s, so the connection "
                "is closed; whether that message took effect is unknown",
                fate_unknown=True,
            )
        return confirmed

    def _publish_batch(self, operation: str, messages: Sequence[Outgoing]) -> list[TransportError | None]:
        self._confirms.begin_batch()
        failure: TransportError | None = None
        blocked: str | None = None
        published = 0
        try:
            for message in messages:
                self._confirms.expect(message)
                self._write(message)
                published += 1
                if (blocked := self._state.blocked) is not None:
                    break
            self._await_confirms()
            if self._io is not None and self._state.blocked is None:
                self._on_block(None)  # also if another connection was blocked
        except TransportError as exc:
            failure = exc
        except Exception as exc:
            error = translate(exc, _first_of(operation, messages, published), fate_unknown=True)
            if isinstance(error, ConfigurationError):
                raise error from exc
            failure = error
            failure.__cause__ = exc
        if failure is not None and self._state.blocked is not None and self._connection.connected:
            blocked = self._state.blocked  # the broker answers later, so the connection is kept
        else:
            self._state.failed = self._state.failed or failure is not None
        if blocked is not None and not self._state.failed:
            return [
                self._outcome_blocked(operation, n, message, published, blocked) for n, message in enumerate(messages)
            ]
        return [
            self._outcome(operation, n, message, published, failure, len(messages))
            for n, message in enumerate(messages)
        ]

    def _write(self, message: Outgoing) -> None:
        if message.queue_ttl is not None and self._settings.is_redis:
            milliseconds = int(message.queue_ttl * 1000)
            self._channel.queue_declare(queue=message.queue, arguments={"x-expires": milliseconds})
        self._producer.publish(
            message.body,
            exchange="",
            routing_key=message.queue,
            headers=message.headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            compression=message.compression,
            mandatory=message.declared,
            **message.properties,
        )
        if message.queue_ttl is not None:
            getattr(self._channel, "_expires", {}).pop(message.queue, None)  # kombu would keep it without a limit

    def _await_confirms(self) -> None:
        if self._io is None:
            self._confirms.confirm_all()
            return
        began = time.monotonic()
        while self._confirms.missing:
            timeout = self._settings.confirm_timeout
            if self._state.blocked is not None and self._late_confirms:
                timeout = min(timeout, _BLOCKED_WAIT)
            if (remaining := began + timeout - time.monotonic()) <= 0:  # other events may arrive all the time
                raise TimeoutError
            self._connection.drain_events(timeout=remaining)

    def _outcome(
        self, operation: str, number: int, message: Outgoing, published: int, failure: TransportError | None, size: int
    ) -> TransportError | None:
        place = place_of(operation, message)
        answered, error = self._answer(number, message, place)
        if answered:
            return error
        in_doubt = getattr(failure, "fate_unknown", False)
        if number > published or (number == published and not in_doubt):
            return _not_sent(failure, place)
        if size == 1 or in_doubt:
            return failure
        doubtful = TransportUnavailable(f"{place} may have been sent before another one failed", fate_unknown=True)
        doubtful.__cause__ = failure
        return doubtful

    def _outcome_blocked(
        self, operation: str, number: int, message: Outgoing, published: int, reason: str
    ) -> TransportError | None:
        place = place_of(operation, message)
        answered, error = self._answer(number, message, place)
        if answered:
            return error
        if number >= published:
            return blocked_error(operation, message, reason)
        tag = self._confirms.mark_unconfirmed(number) if self._late_confirms else 0  # a sender never asks again
        text = f"{place}: the broker takes no messages for now ({reason}), and has not confirmed it yet"
        return InDoubt(f"{text}; whether it took effect is unknown, so it was not tried again", tag)

    def _answer(self, number: int, message: Outgoing, place: str) -> tuple[bool, TransportError | None]:
        """Return whether the broker has answered for a message of the batch, and the error of a refusal."""
        if (reason := self._confirms.returned.get((message.id, message.queue))) is not None:
            self._connection.declared_entities.clear()  # the queue was deleted after it had been declared
            remedy = (
                "the next message declares it again" if self._settings.declare else "declare it, or set declare=True"
            )
            return True, Unroutable(f"{place} could not be routed ({reason}); no such queue exists", remedy=remedy)
        if self._confirms.is_nacked(number):
            nacked = Nacked(f"{place} was refused by the broker (nacked), as by a queue that is full; it was not sent")
            nacked.__cause__ = MessageNacked()
            return True, nacked
        return self._confirms.is_acked(number), None


def blocked_error(operation: str, message: Outgoing, reason: str) -> Blocked:
    """Return the error of a message that was not sent because the broker blocks the connection."""
    place = place_of(operation, message)
    return Blocked(f"{place}: the broker takes no messages for now ({reason})", effect="nothing was done")


def place_of(operation: str, message: Outgoing) -> str:
    """Return the operation, message and queue for the text of an error."""
    return f"{operation}: message {message.id} to queue {message.queue!r}"


def _not_sent(failure: TransportError | None, place: str) -> TransportError:
    """Return the error for a message that was not sent because an earlier one failed."""
    if failure is None or not getattr(failure, "fate_unknown", False):
        return failure or TransportError(f"{place} was not sent")
    error = translate(ConnectionError("an earlier message of the batch failed"), place)
    error.__cause__ = failure
    return error  # type: ignore[return-value]  # a ConnectionError never becomes a ConfigurationError


def _first_of(operation: str, messages: Sequence[Outgoing], published: int) -> str:
    more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
    return place_of(operation, messages[min(published, len(messages) - 1)]) + more
