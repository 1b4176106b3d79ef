"""What a transport is: a thin, synchronous mover of messages.

It knows no routing, no retry policy and no rule about continuations; those are defined once, in the files below.
Nobody inherits from these protocols. What a transport promises beyond them it claims in its `Capabilities`: what is
claimed is tested, and what is not claimed must raise NotSupported.

Every method may raise TransportUnavailable (away for now), TransportRefused (refused for good), TransportNotReady and
TransportClosed; a driver's own error appears only as their `__cause__`. Times are seconds.
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
"""Seconds that the reply to a blocked caller is kept."""

STATUS_TTL = 86400.0
"""Seconds that the status of a dispatch is kept."""

LONGEST_DELAY = 10.0 * 365 * 86400
"""Seconds that a message may be delayed: far beyond use, and inside every clock's range."""

ReplyStatus: TypeAlias = Literal["completed", "failed"]
SettledAs: TypeAlias = Literal["success", "failure"]


@attrs.frozen
class Capabilities:
    """What a transport claims. Each flag is a promise that the conformance tests hold it to."""

    atomic_send: bool = False
    """`send` delivers all of its messages or none."""
    atomic_settle: bool = False
    """Everything in a settlement takes effect together, or nothing does."""
    transactional_send: bool = False
    """`send(within=cursor)` commits and vanishes with the caller's transaction."""
    delay: bool = False
    """`Message.delay` and `Settlement.delay` are honoured."""
    priority: bool = False
    """Higher priority first, then first in, first out."""
    order_across_queues: bool = False
    """That order holds across all queues of a subscription, and not only in each of them."""
    replies: bool = False
    """`Settlement.reply` reaches `reply(key)`."""
    status: bool = False
    """Replies stay readable until their ttl, from any process: they serve as the status of a dispatch."""
    fencing: bool = False
    """A settlement or renewal of a lost lease changes nothing and answers False."""
    counts_crashes: bool = False
    """A delivery that its holder never settled counts as an attempt."""
    dead_letters: bool = False
    """Buried messages are kept: the transport has `dead`, a `DeadLetters`."""
    inspection: bool = False
    """The transport has `queues()` and `waiting_tasks()`, and tells what stands in its queues."""


@attrs.frozen
class Message:
    """A payload and where to. `org_id` is "" for none; `priority` 1..10, higher first; `delay` in seconds."""

    payload: TaskPayload
    queue: str
    org_id: str = ""
    priority: int = DEFAULT_PRIORITY
    delay: float = 0.0


@attrs.frozen
class Delivery:
    """A message, held under a lease.

    `attempt` starts at 1 and fences: who holds an older attempt, or gave this one back, has lost the message. `payload`
    is None where the message could not be read; then `problem` says why, and `raw` is what was stored, or the part of
    it that could be fetched. It must not be started after the moment `expires`, where its sender has set one.
    `further_continuations` are the callbacks that a settlement sends beside those of the payload, on a wire that has
    room for several: "on_success" or "on_error", queue and task of each.
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
    """Opaque, for the transport that made it: tells this delivery from one whose message had the same id and attempt
    before a restore or a failover. "" where ids never come again."""
    further_continuations: tuple[tuple[str, str, str], ...] = ()


def write_message(message: Message) -> dict[str, Any]:
    """Return the message's payload as it stands on the wire (`to_wire`), for a transport to serialise and store.

    Raises PayloadError for what the wire refuses and for a priority, delay, queue or org_id that no transport honours.
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
    """Return the distinct queues to subscribe to, in order, for a transport whose `subscribe` was called with these.

    Raises PayloadError for a name that no queue can have, ConfigurationError where there is no queue or no lease.
    """
    for queue in queues:
        check_name(queue, "$.queue")
    if not queues or not 0 < lease <= LONGEST_DELAY:
        raise ConfigurationError(
            f"subscribe to at least one queue, with a lease of more than 0 and at most {LONGEST_DELAY:g} seconds"
        )
    return list(dict.fromkeys(queues))


class Verdict(enum.Enum):
    """What becomes of a delivered message: done, again after a delay, or to the dead letters with its reason."""

    ACK = "ack"
    RETRY = "retry"
    BURY = "bury"


@attrs.frozen
class Reply:
    """The outcome under a key, kept for `ttl` seconds after it was written. Once consumed only the status is left."""

    key: str
    status: ReplyStatus
    result: JSONValue = None
    error: str = ""
    ttl: float = REPLY_TTL


@attrs.frozen
class Settlement:
    """The end of a delivery: its verdict, what is sent next, what is answered.

    `delay` (seconds) goes with RETRY; `reason`, and the `result` of a task that ran, go with BURY. `counted=False` goes
    with RETRY and says that the task was never started: where the transport can, it takes the attempt back. Such a
    settlement is the last use of its delivery once it may have taken effect: the next holder may have the same attempt.
    One that failed for certain may be made again; a transport that has released the message by itself answers False.
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
    """"success" or "failure": the result for the sender. None if the message is delivered again, or if the task asked
    for no consequence. The follow-up of a "failure" is the sender's on_error."""
    error_type: str = attrs.field(default="", kw_only=True)
    """The type at the start of the error text of a "failure", for a transport that writes it apart; "" if unknown."""


class Subscription(Protocol):
    """A claim on some queues. Owned by one thread; only `wake` may be called from another, or from a signal handler."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` messages, waiting up to `wait` seconds for the first; highest priority first, then FIFO.

        Returns empty-handed when the time is up or `wake` was called. `limit=0` only waits (and lets the transport
        tend its connection). A message that cannot be read is delivered with its `problem`.
        """

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        """Extend each lease by its full length from now; False where it was lost."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """End deliveries; False, and no effect at all, where the lease was lost.

        Atomic where `atomic_settle` is claimed; elsewhere a follow-up is confirmed before its delivery is
        acknowledged, so that a crash can double it and never lose it.
        """

    def wake(self) -> None:
        """Make a waiting `receive`, or else the next one that waits, return at once."""

    def close(self) -> None:
        """Stop receiving. What is still held comes back when its lease ends."""


class Transport(Protocol):
    """Where messages are sent, answered and received. `send` and `reply` are thread-safe."""

    @property
    def capabilities(self) -> Capabilities:
        """What this transport claims, and is held to."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Enqueue, and return one id for each message, in order. Durable when it returns.

        `within` is the caller's own open DB-API cursor: the messages belong to the caller's transaction. Raises
        PayloadError before anything is sent; TransportUnavailable with `fate_unknown` where trying again may double.
        """

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`, waiting up to `timeout` seconds; None when there is none.

        The first one written wins. `consume` clears its result and error after they were read, and keeps its status.
        """

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        """Receive from `queues`, each message held for `lease` seconds unless renewed. Raises what cannot work now."""

    def close(self) -> None:
        """Give back connections and threads; waiting calls end. Closing twice is allowed."""


@attrs.frozen
class QueueState:
    """One queue as it stands: `oldest` is for how many seconds its longest-waiting ready message could have been taken.

    It is None if none waits. A delay, or a lease that nobody renewed, is no part of it where the store can tell.

    `ready` can be taken now; `in_flight` is held under a lease; `delayed` waits for its time; `dead` was buried. A
    message that waits to be retried may be counted among either of the middle two: not every store tells them apart.
    `unknown` is in a state that this package does not know, as another program's, and is run by no worker of ours.
    """

    queue: str
    ready: int
    in_flight: int
    delayed: int
    oldest: float | None
    dead: int
    unknown: int = 0
    estimated: bool = attrs.field(default=False, kw_only=True)
    """Whether the store stopped counting what is ready, in flight or delayed: these are estimates, or lower bounds, and
    none of them tells that the queue is empty."""


@attrs.frozen
class DeadLetter:
    """A buried message as it is kept: what was stored, why and when it was buried, and the result where it had one."""

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
    """Why the content was not read; "" if it was. If not, `message` has its small parts, and `result` is None."""

    @property
    def task_name(self) -> str | None:
        name = self.message.get("task_name") if isinstance(self.message, dict) else None
        return name if isinstance(name, str) else None


class Inspection(Protocol):
    """What a transport that claims `inspection` also has."""

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """The state of each queue of `names` (of all that hold anything, when None), by name."""

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """How often each task is named by the first `limit` ready messages of `queue`, in their order.

        A message without a task's name is left out. Nothing is taken, and no attempt counted.
        """


class DeadLetters(Protocol):
    """What stands in the `dead` of a transport that claims `dead_letters`."""

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """The newest first."""

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        """Those of `ids` that are there."""

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        """Send each again as new, the oldest first, and remove it here; returns the ids of those.

        One letter is sent and removed in one step, and many in several batches. If a batch fails, those before it are
        done, and calling again replays the others. Over PostgreSQL the error then says how many letters were done, and
        a TransportUnavailable has `fate_unknown`.
        """

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        """Remove for good; `older_than` in seconds since burial. Returns how many.

        Many letters are removed in several batches. If one fails, those before it are done, as in `replay`.
        """


@runtime_checkable
class BatchedDeadLetters(Protocol):
    """What a `dead` may have as well, for letters of any number and size.

    The batches are of the letters that are there at the beginning. If one raises, the batches that it yielded are done,
    and the caller keeps them: the error says how many letters they had, and its fate is that of the batch that failed.
    """

    def summaries(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """As `find`, without fetching content: each letter is `omitted`, and its message has its small parts."""

    def replay_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None
    ) -> Iterator[Sequence[str]]:
        """Replay, and yield the ids of each batch after its commit."""

    def purge_in_batches(
        self, ids: Sequence[str] | None = None, *, queue: str | None = None, older_than: float = 0.0
    ) -> Iterator[int]:
        """Remove for good, and yield the size of each batch after its commit."""
