"""The transport protocol: a transport sends, stores and delivers messages, and answers blocking calls.

A transport is thin and synchronous. It knows no routing, no retry policy and no rule about continuations; the core has
those. A transport author implements `Transport` and `Subscription`, and states further promises in `Capabilities`. No
class inherits from these protocols. The conformance kit tests each capability that a transport claims, and that it
raises `NotSupported` for the others.

Every method may raise these errors; a driver's own error appears only as their `__cause__`:

- TransportUnavailable: the store cannot be reached now.
- TransportRefused: the store rejected the operation for good.
- TransportNotReady: tables or queues do not exist, or this user may not use them.
- TransportClosed: the transport or the subscription was closed.

Times are in seconds.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import attrs

from unstract_core.codec import RawMessage, check_name, to_wire
from unstract_core.errors import ConfigurationError, PayloadError
from unstract_core.payload import DEFAULT_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY, TaskPayload
from unstract_core.values.limits import JSONValue

REPLY_TTL = 3600.0
"""Seconds for which the reply to a blocking call is kept."""

STATUS_TTL = 86400.0
"""Seconds for which the status of a dispatch is kept."""

LONGEST_DELAY = 10.0 * 365 * 86400
"""The longest delay and lease, in seconds: ten years, which every store's clock can represent."""

ReplyStatus: TypeAlias = Literal["completed", "failed"]
SettledAs: TypeAlias = Literal["success", "failure"]


@attrs.frozen
class Capabilities:
    """The promises of a transport, all False by default. The conformance kit tests each that is True."""

    atomic_send: bool = False
    """`send` delivers all of its messages or none."""
    atomic_settle: bool = False
    """Verdict, follow-up and reply of a settlement take effect together, or none of them does."""
    transactional_send: bool = False
    """Messages of `send(within=cursor)` are committed or rolled back with the caller's transaction."""
    delay: bool = False
    """A message is not delivered before its `Message.delay` or `Settlement.delay` has passed."""
    priority: bool = False
    """Messages are delivered by priority, highest first; those of one priority in the order of sending."""
    order_across_queues: bool = False
    """That order holds across all queues of a subscription, not only within each queue."""
    replies: bool = False
    """`Transport.reply` returns the reply of a settlement."""
    status: bool = False
    """Every process can read a reply until its `ttl` has passed, so that it serves as the status of a dispatch."""
    fencing: bool = False
    """A settlement or renewal after the loss of the lease changes nothing and returns False."""
    counts_crashes: bool = False
    """A delivery that was never settled, because its worker was lost, counts as an attempt."""
    dead_letters: bool = False
    """Dead-lettered messages are kept. The transport has an attribute `dead`: a `DeadLetters`."""
    inspection: bool = False
    """The transport can report the state of its queues: it has the methods of `Inspection`."""


@attrs.frozen
class Message:
    """A message to send.

    Attributes:
        payload: The task to run.
        queue: The queue to send to.
        org_id: The organisation that it belongs to. Default: "" for none.
        priority: From 1 to 10; higher is delivered first. Default: 5.
        delay: Seconds before which it is not delivered. Default: 0.
    """

    payload: TaskPayload
    queue: str
    org_id: str = ""
    priority: int = DEFAULT_PRIORITY
    delay: float = 0.0


@attrs.frozen
class Delivery:
    """One delivery of a message, which belongs to its receiver until it is settled or its lease ends.

    Attributes:
        id: Identifies the message in its transport.
        queue: The queue that it was received from.
        attempt: Counts the deliveries of the message, from 1.
        payload: The task to run; None if the message is unreadable.
        raw: The stored message; of an unreadable one perhaps only the part that could be fetched.
        problem: Why the message is unreadable. None (default) if it is readable.
        org_id: The organisation that it belongs to. Default: "" for none.
        priority: From 1 to 10. Default: 5.
        expires: The moment after which its task must not start. None (default): no such moment.
        fence: Opaque; only the transport that made it reads it. It differs between two messages that have the same id
            and attempt, one before and one after a restore or a failover. Default: "", if ids are never used again.
        further_continuations: The callbacks that a settlement sends beside those of the payload, each as
            ("on_success" or "on_error", queue, task), for a wire that can carry several. Default: none.

    `id`, `attempt` and `fence` are the fencing token: a transport that claims `fencing` ignores the settlement of an
    earlier delivery, and of one that was released.
    """

    id: str
    queue: str
    attempt: int
    payload: TaskPayload | None
    raw: RawMessage
    problem: str | None = None
    org_id: str = ""
    priority: int = DEFAULT_PRIORITY
    expires: datetime.datetime | None = None
    fence: str = ""
    further_continuations: tuple[tuple[str, str, str], ...] = ()


def write_message(message: Message) -> dict[str, Any]:
    """Return the payload in its wire form, which a transport serialises and stores.

    Raises:
        PayloadError: The wire cannot carry the payload, or no transport accepts this priority, delay, queue or org_id.
    """
    wire = to_wire(message.payload)
    if type(message.priority) is not int or not LOWEST_PRIORITY <= message.priority <= HIGHEST_PRIORITY:
        raise PayloadError(
            f"the priority of a message is an int from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}", path="$.priority"
        )
    check_delay(message.delay)
    if message.queue != message.payload.queue:
        check_name(message.queue, "$.queue")
    if message.org_id != "":
        check_name(message.org_id, "$.org_id")
    return wire


def check_delay(delay: float) -> None:
    """Raise PayloadError unless `delay` is a finite number of seconds, not negative."""
    if not isinstance(delay, int | float) or not 0 <= delay <= LONGEST_DELAY:
        raise PayloadError(f"a delay is a number of seconds from 0 to {LONGEST_DELAY:g}", path="$.delay")


def check_subscription(queues: Sequence[str], lease: float) -> list[str]:
    """Check the arguments of `subscribe` for a transport, and return the distinct queues in their order.

    Args:
        queues: The queues to receive from.
        lease: Seconds for which a received message belongs to the subscription.

    Raises:
        PayloadError: A queue has a name that no queue can have.
        ConfigurationError: There is no queue, or the lease is not in (0, `LONGEST_DELAY`].
    """
    for queue in queues:
        check_name(queue, "$.queue")
    if not queues or not 0 < lease <= LONGEST_DELAY:
        raise ConfigurationError(
            f"subscribe to at least one queue, with a lease of more than 0 and at most {LONGEST_DELAY:g} seconds"
        )
    return list(dict.fromkeys(queues))


class Verdict(enum.Enum):
    """How a settlement ends a delivery."""

    ACK = "ack"
    """Acknowledge: the message is done and removed."""
    RETRY = "retry"
    """Retry: the message is delivered again, after the settlement's delay."""
    BURY = "bury"
    """Dead-letter: the message is kept with the reason, and not delivered again."""


@attrs.frozen
class Reply:
    """The answer to a blocking call, or the status of a dispatch.

    Attributes:
        key: The payload's reply_key, or the dispatch id.
        status: "completed" or "failed".
        result: The task's result. Default: None.
        error: The error text of a failure. Default: "".
        ttl: Seconds for which it is kept after it was written. Default: `REPLY_TTL`.

    After a consuming read only key, status and ttl are left.
    """

    key: str
    status: ReplyStatus
    result: JSONValue = None
    error: str = ""
    ttl: float = REPLY_TTL


@attrs.frozen
class Settlement:
    """The end of a delivery.

    Attributes:
        delivery: The delivery.
        verdict: Whether the message is acknowledged, retried or dead-lettered.
        follow_up: The message to send, usually a continuation. Default: None.
        reply: The reply to write. Default: None.
        delay: Seconds before the next delivery, for RETRY. Default: 0.
        reason: The error text, for RETRY and BURY. Default: "".
        result: The result of a task that ran, for BURY. Default: None.
        counted: Whether the delivery counts as an attempt. Default: True. False is a release: with RETRY, of a message
            whose task never started.
        outcome: "success" or "failure", as the sender gets it. The follow-up of a "failure" is the sender's on_error.
            None (default) if the message is delivered again, or if the task asked for no consequence.
        error_type: The name of a failure's error type, for a transport that stores it apart. "" (default) if there is
            none.
        error_message: The error text of a failure without its type. If there is no type, it is the whole error text.
            Default: "".

    A release takes the attempt back where the transport can. It is repeated only after a failure that had no effect for
    certain, because the next receiver may have the same attempt. A transport that has released the message by itself
    returns False for it.
    """

    delivery: Delivery
    verdict: Verdict
    follow_up: Message | None = None
    reply: Reply | None = None
    delay: float = 0.0
    reason: str = ""
    result: JSONValue = None
    counted: bool = True
    outcome: SettledAs | None = attrs.field(default=None, kw_only=True)
    error_type: str = attrs.field(default="", kw_only=True)
    error_message: str = attrs.field(default="", kw_only=True)


class Subscription(Protocol):
    """The consumer's side of a transport. One thread calls it; only `wake` is for every thread and signal handler."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Claim ready messages, highest priority first, then first in, first out.

        Args:
            limit: How many messages to claim at most. With 0 the call only waits, and keeps its connection alive.
            wait: Seconds to wait for the first message. It ends early when a message is ready or `wake` was called.

        Returns:
            The deliveries; an empty sequence if there was no message. An unreadable message is delivered too, with its
            `problem`.
        """

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Extend the leases by their full length, from now.

        Returns:
            For each delivery True, or False if its lease is lost.
        """

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """End deliveries.

        With `atomic_settle` each settlement takes effect as a whole. Without it, the transport confirms a follow-up
        before it acknowledges the delivery: a crash in between may double the follow-up, but never loses it.

        Returns:
            For each settlement True, or False if the lease is lost; it then had no effect at all.

        Raises:
            QueueFull: The queue of a follow-up or reply accepts no message now. The other settlements took effect, and
                return True when they are tried again.
            TransportRefused: A settlement can never take effect. The caller tries those of a batch separately.
        """

    def wake(self) -> None:
        """Make the waiting `receive` return at once, or else the next one that would wait."""

    def close(self) -> None:
        """Stop receiving. Unsettled messages are ready again when their leases end."""


class Transport(Protocol):
    """The producer's side of a transport, and the way to subscribe. `send` and `reply` are thread-safe."""

    @property
    def capabilities(self) -> Capabilities:
        """The promises of this transport."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Store messages for delivery. They are durable when the call returns.

        Args:
            messages: The messages.
            within: The caller's open DB-API cursor. The messages then belong to its transaction. None (default): they
                are committed by this call.

        Returns:
            One id for each message, in order.

        Raises:
            PayloadError: A message is not valid; nothing was sent.
            NotSupported: The transport cannot honour `within` or a delay; nothing was sent.
            TransportUnavailable: If its `fate_unknown` is True, sending again may double the messages.
        """

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under a key. The first reply that is written under a key stays.

        Args:
            key: The key.
            timeout: Seconds to wait for the reply. Default: 0.
            consume: Whether to clear result and error after this read; the status stays. Default: False.

        Returns:
            The reply; None if there is none in time.
        """

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        """Return a subscription.

        Args:
            queues: The queues to receive from, together.
            lease: Seconds for which a received message belongs to the subscription, unless its lease is renewed.

        Raises:
            PayloadError: A queue has a name that no queue can have.
            ConfigurationError: There is no queue, or the lease is not a positive number.
            TransportError: The queues cannot be received from now.
        """

    def close(self) -> None:
        """Release connections and threads, and end waiting calls. It may be called twice."""


@attrs.frozen
class QueueState:
    """The state of one queue.

    Attributes:
        queue: Its name.
        ready: How many messages can be claimed now.
        in_flight: How many messages are under a lease.
        delayed: How many messages wait for their time. A store may count messages that wait for a retry among those
            in flight.
        oldest: Seconds for which the longest-waiting ready message has been ready. Its delay does not count, and an
            expired lease does not where the store knows about it. None if no message is ready.
        dead: How many dead letters it has.
        unknown: How many messages are in a state of another program; no worker runs them. Default: 0.
        estimated: Whether ready, in_flight and delayed are estimates or lower bounds, because the store stopped
            counting. A zero then does not mean that the queue is empty. Default: False.
    """

    queue: str
    ready: int
    in_flight: int
    delayed: int
    oldest: float | None
    dead: int
    unknown: int = 0
    estimated: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen
class DeadLetter:
    """A dead-lettered message.

    Attributes:
        id: Its id among the dead letters.
        queue: The queue that it was received from.
        message: The stored message, as JSON; text that is not JSON as a string.
        reason: The error text.
        attempts: How many deliveries it had.
        result: The result of its task, if the task ran; else None.
        org_id: The organisation that it belongs to; "" for none.
        priority: From 1 to 10.
        enqueued_at: When it was sent, with a time zone.
        buried_at: When it was dead-lettered, with a time zone.
        omitted: Why its content was not read. If so, `message` has only its small parts and `result` is None.
            Default: "", the content was read.
    """

    id: str
    queue: str
    message: JSONValue
    reason: str
    attempts: int
    result: JSONValue
    org_id: str
    priority: int
    enqueued_at: datetime.datetime
    buried_at: datetime.datetime
    omitted: str = ""

    @property
    def task_name(self) -> str | None:
        """The name of its task; None if the message has none."""
        name = self.message.get("task_name") if isinstance(self.message, dict) else None
        return name if isinstance(name, str) else None


class Inspection(Protocol):
    """The further methods of a transport that claims `inspection`."""

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Return the state of queues, sorted by name.

        Args:
            names: The queues. None (default): all queues that hold messages or dead letters.
        """

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return how often each task name occurs in the first ready messages of a queue.

        A message without a task name is left out. The call claims no message.

        Args:
            queue: The queue.
            limit: How many messages to look at, in the order of their delivery. Default: 1000.
        """


class DeadLetters(Protocol):
    """The attribute `dead` of a transport that claims `dead_letters`."""

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return dead letters, the newest first.

        Args:
            queue: The queue that they were received from. None (default): all queues.
            limit: How many to return at most. Default: 100.
        """

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Return the dead letters with these ids; unknown ids are left out."""

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send dead letters again as new messages, the oldest first, and remove them here.

        Each letter is sent and removed in one step; many letters are replayed in several batches. If a batch fails, the
        earlier ones are done, and a second call replays the rest. Over PostgreSQL the error then says how many letters
        are done, and a TransportUnavailable has `fate_unknown`.

        Args:
            ids: Which letters. None (default): all.
            queue: Only letters of this queue. None (default): of all queues.

        Returns:
            The ids of the replayed letters.
        """

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove dead letters for good, in batches as `replay` does.

        Args:
            ids: Which letters. None (default): all.
            queue: Only letters of this queue. None (default): of all queues.
            older_than: Only letters that were dead-lettered more than this many seconds ago. Default: 0.

        Returns:
            How many were removed.
        """


@runtime_checkable
class BatchedDeadLetters(Protocol):
    """Optional methods of `dead`, for any number and size of letters.

    The batches cover the letters that exist at the first call. If a batch raises, the batches yielded before it are
    done. The error says how many letters they had, and its `fate_unknown` is about the failed batch alone.
    """

    def summaries(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return as `find` does, but do not read large content; each letter says so in `omitted`."""

    def replay_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None
    ) -> Iterator[Sequence[str]]:
        """Replay, and yield the ids of each batch after its commit."""

    def purge_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None, older_than: float = 0.0
    ) -> Iterator[int]:
        """Remove for good, and yield the size of each batch after its commit."""
