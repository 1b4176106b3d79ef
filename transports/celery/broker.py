"""An open connection to the broker: channels, queue declarations, publishing and an orderly close.

An instance is not thread-safe.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import kombu
from kombu.common import maybe_declare

from transports.celery.amqp_frame_patches import note_blocks, tolerate_unreadable_properties
from transports.celery.amqp_patches import BoundedIO, keep_alive
from transports.celery.broker_settings import BrokerSettings, connection_of
from transports.celery.compression import keep_compressed
from transports.celery.encode import Outgoing
from transports.celery.errors import CONNECTING, mapped
from transports.celery.publisher import ConnectionState, Publisher, blocked_error
from unstract_core.errors import TransportError, TransportUnavailable

_Item = TypeVar("_Item")

_CLOSE_TIMEOUT = 1.0
"""The time in seconds that a broker has to answer when a connection is closed."""


class Broker:
    """An open connection.

    Args:
        settings: The settings of the broker.
        heartbeat: The interval in seconds that is asked of the broker; 0 (default) for no heartbeats.
        late_confirms: Whether the owner asks later for confirms that a blocked broker has not sent. Publishing then
            waits for them only for a short time.
        on_block: Called with the broker's reason when it stops accepting messages, and with None when it accepts them
            again.

    Attributes:
        amqp: True for AMQP, False for a broker that kombu emulates.
        connection: The connection of kombu.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        heartbeat: float = 0.0,
        late_confirms: bool = False,
        on_block: Callable[[str | None], None] = lambda reason: None,
    ) -> None:
        self._settings = settings
        self._on_block = on_block
        self._state = ConnectionState()
        self._io: BoundedIO | None = None
        with mapped(CONNECTING):
            self.connection = connection_of(settings, heartbeat)
            try:
                more = max(0, len(self.connection.alt) - 1)  # each URL once: kombu would pause, and try again
                self.connection.ensure_connection(max_retries=more, reraise_as_library_errors=False)
                self.amqp = self.connection.transport.driver_type == "amqp"
                if self.amqp:
                    amqp = self.connection.connection
                    self._io = BoundedIO(amqp, settings.confirm_timeout, lambda: self.blocked is not None)
                    tolerate_unreadable_properties(amqp)
                    note_blocks(amqp, self._note_block)
                channel = self._declaring = self.channel()
                if self.amqp:  # a refused declaration closes only this channel
                    self._declaring = self.connection.channel()
                self._publisher = Publisher(
                    self.connection,
                    channel,
                    settings,
                    self._state,
                    self._io,
                    late_confirms=late_confirms,
                    on_block=on_block,
                )
            except BaseException:
                self.abort()
                raise

    @property
    def blocked(self) -> str | None:
        """The reason why the broker accepts no messages now; None while it accepts them."""
        return self._state.blocked

    @property
    def usable(self) -> bool:
        return not self._state.failed and bool(self.connection.connected)

    @property
    def is_disconnected(self) -> bool:
        """Whether the broker or the network has ended the connection while it was idle."""
        if not self.amqp:
            return False
        try:
            while self.usable:
                self.connection.drain_events(timeout=0)
        except TimeoutError:
            return not self.connection.connected
        except Exception:
            return True
        return not self.usable

    def channel(self) -> Any:
        """Open a channel for the whole connection: if the broker closes it, the connection is not usable.

        py-amqp would open such a channel again by itself, without its consumers, confirms and open acknowledgements.
        """
        channel = self.temporary_channel()
        if self.amqp:
            channel.on_open = self._note_reopened
        return channel

    def temporary_channel(self) -> Any:
        """Open a channel for one use; the connection stays usable when the broker closes the channel."""
        channel = keep_compressed(self.connection.channel())
        if self._settings.is_redis:
            _requeue_first(channel)
        return channel

    def in_requeue_order(self, messages: Sequence[_Item]) -> Sequence[_Item]:
        """Return messages in the order in which they must be requeued to keep their order in the queue.

        On Redis each requeued message becomes the first of its queue, so the last one must be requeued first.
        """
        return messages[::-1] if self._settings.is_redis else messages

    def keep_alive(self) -> None:
        """Send a heartbeat if one is due. Raises, and closes the connection, if the broker's heartbeats are missing."""
        if self.amqp:
            keep_alive(self.connection.connection)

    def declare(self, queue: kombu.Queue, operation: str) -> None:
        """Declare a queue, once for this connection."""
        with mapped(f"{operation}: declare queue {queue.name!r}"):
            maybe_declare(queue, self._declaring)

    def ensure_queue(self, queue: str, operation: str) -> None:
        """Declare a queue if `declare` is set; else raise TransportNotReady if it does not exist.

        A broker that kombu emulates has every queue.
        """
        if self._settings.declare:
            self.declare(self._settings.queue(queue), operation)
        elif self.amqp:
            with mapped(f"{operation}: look for queue {queue!r}"):
                self._declaring.queue_declare(queue, passive=True)

    def queue_counts(self, queue: str) -> tuple[int, int]:
        """Return how many messages of an existing queue are ready, and how many consumers it has."""
        declared = self._declaring.queue_declare(queue, passive=True)
        return declared.message_count, declared.consumer_count

    def limit_waits(self, seconds: float) -> None:
        """Limit every later wait, except for confirms."""
        if self._io is not None:
            self._io.limit(seconds)

    def publish(
        self, operation: str, messages: Sequence[Outgoing], *, all_or_none: bool = False
    ) -> list[TransportError | None]:
        """Publish, and return for each message the error that kept it from being accepted; None if it was confirmed.

        Never raises a TransportError, because the broker may have accepted some of the messages. After an error of the
        connection the broker is not `usable`.

        Args:
            operation: The operation of the caller, for the texts of errors.
            messages: The messages.
            all_or_none: Whether no message is sent if one of the queues cannot be declared. By default the messages for
                the other queues are sent.
        """
        if self.blocked is not None:
            return [blocked_error(operation, message, self.blocked) for message in messages]
        refused: dict[int, TransportError] = {}
        for number, message in enumerate(messages):
            if (error := self._declare_for(message, operation)) is not None:
                refused[number] = error
                if all_or_none or not self.usable:
                    return [error] * len(messages)
        outcomes = self._publisher.publish(
            operation, [message for number, message in enumerate(messages) if number not in refused]
        )
        for number, error in refused.items():
            outcomes.insert(number, error)
        return outcomes

    def confirmation_of(self, tag: int) -> bool | None:
        """Return whether an unconfirmed message was accepted (`Publisher.confirmation_of`)."""
        return self._publisher.confirmation_of(tag)

    def close(self, finish: Callable[[], None] | None = None) -> None:
        """Close with a handshake, if the broker answers within a second.

        Args:
            finish: Called before the connection is closed; None (default) for nothing.
        """
        try:
            if self.connection.connected:
                self.limit_waits(_CLOSE_TIMEOUT)
            if finish is not None:
                finish()
            self.connection.release()
        except Exception:
            self.abort()

    def abort(self) -> None:
        """Drop the connection without a closing handshake: it is broken, or belongs to another process."""
        with contextlib.suppress(Exception):
            self.connection.collect(socket_timeout=0.1)

    def _declare_for(self, message: Outgoing, operation: str) -> TransportError | None:
        """Declare the queue of a message; return the error if that fails."""
        if not (message.declared and self._settings.declare):
            return None
        try:
            self.declare(self._settings.queue(message.queue), operation)
        except TransportError as exc:
            self._state.failed = self._state.failed or isinstance(exc, TransportUnavailable)
            return exc
        return None

    def _note_block(self, reason: str | None) -> None:
        self._state.blocked = reason
        if reason is None:
            self._state.unblocked_at = time.monotonic()
        self._on_block(reason)

    def _note_reopened(self, channel: Any) -> None:
        self._state.failed = True


def _requeue_first(channel: Any) -> None:
    """Let messages that are requeued on a channel of kombu's Redis be received next, regardless of their priority.

    kombu keeps a list for each priority. It would append the message to the list of its priority, after all messages
    that were sent meanwhile with a lower number.
    """
    requeue = channel._do_restore_message

    def first(payload: Any, exchange: str, routing_key: str, pipe: Any, leftmost: bool = False) -> None:
        steps, channel.priority_steps = channel.priority_steps, [0]
        try:
            requeue(payload, exchange, routing_key, pipe)  # not leftmost: messages are taken from the right
        finally:
            channel.priority_steps = steps

    channel._do_restore_message = first
