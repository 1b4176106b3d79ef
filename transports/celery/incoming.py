"""A message that the broker has delivered, and the consumer through which it came."""

from __future__ import annotations

from collections import Counter

import attrs
import kombu

from transports.celery.fields import MessageKey, message_key


@attrs.define(eq=False)
class QueueConsumer:
    """A consumer that is registered for one queue."""

    queue: kombu.Queue
    tag: str
    #: How many unacknowledged messages the broker may have with it.
    granted: int
    #: The acknowledgements and requeues of all consumers by queue, since they were last flushed.
    returned: Counter[str]
    unacknowledged: int = 0
    #: How many of its messages are delayed and wait here.
    waiting: int = 0

    @property
    def free(self) -> int:
        """How many more messages the broker may send through it."""
        return max(0, self.granted - self.unacknowledged)


@attrs.define(eq=False)
class Incoming:
    """A message on the current connection, not acknowledged yet."""

    message: kombu.Message
    queue: str
    consumer: QueueConsumer
    #: The number of deliveries that the broker has counted although the task was not started.
    unstarted: int = 0
    #: The time before which it is not started, in seconds since the epoch; known once it was read.
    due: float = 0.0
    #: The tag of its copy, if the broker has not confirmed the copy yet; else None.
    copy_tag: int | None = None
    #: Whether it is delayed and waits here.
    waits: bool = False
    #: The key that only its redeliveries share.
    key: MessageKey = attrs.field(init=False)

    @key.default
    def _(self) -> MessageKey:
        return message_key(self.message)

    @property
    def redelivered(self) -> bool:
        return bool((self.message.delivery_info or {}).get("redelivered"))

    def start_waiting(self) -> None:
        self.consumer.waiting += not self.waits
        self.waits = True

    def stop_waiting(self) -> None:
        self.consumer.waiting -= self.waits
        self.waits = False

    def ack(self) -> None:
        self.message.ack()  # may fail and be called again, so it counts afterwards
        self._note_returned()

    def requeue(self) -> None:
        self.message.requeue()
        self._note_returned()

    def _note_returned(self) -> None:
        self.consumer.unacknowledged -= 1
        self.consumer.returned[self.queue] += 1
        self.stop_waiting()
