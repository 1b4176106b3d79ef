"""Settling: in batches, one by one where a batch fails, and by the fallbacks where a settlement is refused for good.

While a transport is unavailable, the settler tries again for as long as it takes. A settlement that fails alone for
`PATIENCE` seconds, while the transport answers other calls, is the cause itself: a result so large that its statement
always times out, for example. Such a settlement waits behind the others and then counts as refused. It is never
dropped for that reason: if no fallback can be written either, the settler starts again with the original settlement.
A settlement whose queue is full (`QueueFull`) waits as well, and delays no other one. Neither a full queue nor a
transport without room (`NoRoom`) ever makes a settlement count as refused.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs

from unstract_core.clock import SYSTEM_CLOCK, Clock
from unstract_core.continuation import fallbacks
from unstract_core.errors import (
    NoRoom,
    QueueFull,
    TransportClosed,
    TransportError,
    TransportRefused,
    TransportUnavailable,
)
from unstract_core.observability.log_events import emit
from unstract_core.observability.observer import LeaseLostEvent, Observers
from unstract_core.outcomes import RetryPolicy
from unstract_core.transport import Settlement, Subscription, Verdict
from unstract_core.values import error_text
from unstract_core.worker.in_flight import Entry, InFlight, State
from unstract_core.worker.task_threads import ids

logger = logging.getLogger("unstract_wire.worker")

PATIENCE = 300.0
"""Seconds for which a settlement may fail alone, while others succeed, before it counts as refused."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
_LARGEST_BATCH = 1000
_MOST_FAILURES = 5
_RELEASE_PATIENCE = 10.0
"""Seconds for which a failed release is tried again, as over a restart of the database."""
_COUNTED_AS = {Verdict.ACK: "settled", Verdict.RETRY: "retried", Verdict.BURY: "buried"}


@attrs.define
class Retries:
    """The failed attempts to settle one delivery.

    Attributes:
        retry_at: The earliest moment of the next attempt, on the settler's clock; None before one failed alone.
        failures: How often settling it alone failed while the transport answered others.
        failing_since: When that began; infinite before.
        answers: The settler's `answers` at the last counted failure: without a new answer the transport is down.
        settled_before: How many statements had settled others when it first failed; None before.
        no_room: Whether it waits for a queue that is full.
        original: The settlement of the task's outcome; None unless a transport refused it.
        fallbacks: The settlements that are left to try instead; None unless it was refused.
    """

    retry_at: float | None = None
    failures: int = 0
    failing_since: float = math.inf
    answers: int = -1
    settled_before: int | None = None
    no_room: bool = False
    original: Settlement | None = None
    fallbacks: Iterator[Settlement] | None = None


class Settler:
    """Settles the finished deliveries of one subscription. Every method is for the I/O thread.

    Args:
        subscription: Carries the settlements out.
        in_flight: The deliveries of the consumer; a settled one is removed.
        counters: Counts settled, retried, buried, given_back, lost and refused.
        observers: Learn of each settlement and each lost lease.
        renew_in_time: Called before each statement; it renews the leases if that is due.
        policy: The consumer's policy; None (default) for the default one.
        clock: The consumer's clock.
    """

    def __init__(
        self,
        subscription: Subscription,
        in_flight: InFlight,
        counters: Counter[str],
        observers: Observers,
        renew_in_time: Callable[[], None],
        policy: RetryPolicy | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.answers = 0
        """How often the transport has answered. The owner counts the answers to its own calls here."""
        self.settled = 0
        """How many statements have settled something."""
        self._subscription = subscription
        self._in_flight = in_flight
        self._counters = counters
        self._observers = observers
        self._renew_in_time = renew_in_time
        self._policy = policy
        self._clock = clock
        self._retries: dict[Entry, Retries] = {}
        self._largest_batch = _LARGEST_BATCH
        self._no_room: QueueFull | None = None

    @property
    def failing(self) -> int:
        """How many settlements have failed when they were tried alone, and are tried again later."""
        return sum(retries.retry_at is not None for retries in self._retries.values())

    @property
    def at_fault(self) -> int:
        """How many of those do not wait for a full queue."""
        return sum(one.retry_at is not None and not one.no_room for one in self._retries.values())

    @property
    def next_retry_at(self) -> float:
        """When the next of those is due, on the settler's clock; infinite if there is none."""
        moments = [retries.retry_at for retries in self._retries.values() if retries.retry_at is not None]
        return min(moments, default=math.inf)

    @property
    def no_room(self) -> QueueFull | None:
        """Why a settlement waits for a full queue; None if none does."""
        if self._no_room is not None and not any(retries.no_room for retries in self._retries.values()):
            self._no_room = None
        return self._no_room

    def settle(self) -> None:
        """Settle what is due. Raises a TransportError other than TransportRefused; the rest stays for later."""
        while batch := self._next_batch():
            self._settle(batch)
            self._largest_batch = min(_LARGEST_BATCH, self._largest_batch * 2)
        for entry in [entry for entry in self._in_flight.to_settle() if self._failed_alone(entry)]:
            if (self._retries_of(entry).retry_at or 0.0) <= self._clock.monotonic():
                self._settle([entry])

    def lease_lost(self, entry: Entry) -> None:
        """Record that a renewal found a lease lost. For a finished delivery the answer to its settlement decides."""
        if entry.settlement is None:
            self._record_lost(entry)

    def _record_lost(self, entry: Entry) -> None:
        if self._in_flight.lose(entry):
            self._counters["lost"] += 1
            emit(logger, logging.WARNING, "lease_lost", **ids(entry.delivery))
            self._observers.on_lease_lost(LeaseLostEvent(entry.delivery))

    def _next_batch(self) -> list[Entry]:
        """Return the deliveries to settle together. Releases come first and alone, so that no refusal costs their
        attempt."""
        due = [entry for entry in self._in_flight.to_settle() if not self._failed_alone(entry)]
        released = [entry for entry in due if not entry.settlement_due.counted]
        return (released or due)[: self._largest_batch]

    def _failed_alone(self, entry: Entry) -> bool:
        retries = self._retries.get(entry)
        return retries is not None and retries.retry_at is not None

    def _settle(self, batch: Sequence[Entry]) -> None:
        self._renew_in_time()
        try:
            took_effect = self._subscription.settle([entry.settlement_due for entry in batch])
        except TransportClosed:
            raise
        except TransportError as exc:
            if isinstance(exc, TransportRefused):
                self._on_refused(batch, exc)
            elif isinstance(exc, QueueFull):
                self._on_full(batch, exc)
            else:
                self._on_failed(batch, exc)
                raise
        except Exception as exc:  # an unexpected error must end neither the other settlements nor the consumer
            self._on_refused(batch, exc)
        else:
            self.answers += 1
            self.settled += 1
            for entry in batch:  # before the next renewal: a settled delivery has no lease
                self._remove(entry)
            for entry, effective in zip(batch, took_effect, strict=True):
                self._record_settled(entry, effective=effective)
                self._renew_in_time()  # an observer may have taken its time

    def _on_refused(self, batch: Sequence[Entry], refusal: Exception) -> None:
        if len(batch) > 1:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._settle(half)
            return
        (entry,) = batch
        self._fall_back(entry, refusal)
        if self._in_flight.is_to_settle(entry):
            self._settle(batch)

    def _on_full(self, batch: Sequence[Entry], failure: QueueFull) -> None:
        """Let those wait whose queue is full. The others of the batch are settled, and only report it when asked."""
        if len(batch) > 1:
            for entry in batch:
                self._settle([entry])
            return
        self._on_failed(batch, failure)
        if self._in_flight.is_to_settle(batch[0]):
            self._retries_of(batch[0]).no_room = True
            self._no_room = failure

    def _on_failed(self, batch: Sequence[Entry], failure: TransportError) -> None:
        """Prepare the next attempt.

        A release that may have taken effect is not repeated: the next holder of the message may have the same attempt.
        A release without effect is repeated for a while; after that the lease ends, and the attempt counts.
        """
        now = self._clock.monotonic()
        unknown = bool(getattr(failure, "fate_unknown", False))
        for entry in batch:
            release = not entry.settlement_due.counted
            self._in_flight.fail(entry, uncertain=unknown or release, alone=len(batch) == 1)
            if release:
                retries = self._retries_of(entry)
                retries.failing_since = min(retries.failing_since, now)
                if unknown or now - retries.failing_since >= _RELEASE_PATIENCE:
                    self._remove(entry)
        if len(batch) > 1:
            self._largest_batch = len(batch) // 2
        elif self._in_flight.is_to_settle(batch[0]):
            self._on_failed_alone(batch[0], failure, now)

    def _on_failed_alone(self, entry: Entry, failure: TransportError, now: float) -> None:
        retries = self._retries_of(entry)
        if retries.answers != self.answers:
            retries.answers = self.answers
            retries.failures += 1
            retries.failing_since = min(retries.failing_since, now)
        retries.retry_at = now + min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** min(retries.failures, 10))
        retries.no_room = False
        if isinstance(failure, NoRoom):
            retries.failing_since = math.inf
            return
        if retries.settled_before is None:
            retries.settled_before = self.settled
        if not isinstance(failure, TransportUnavailable) and self.settled == retries.settled_before:
            return  # an operator has to act; only while others are settled is the settlement itself at fault
        worn_out = retries.failures > _MOST_FAILURES and now - retries.failing_since >= PATIENCE
        if worn_out or (retries.fallbacks is not None and retries.failures):
            self._fall_back(entry, failure)

    def _fall_back(self, entry: Entry, refusal: Exception) -> None:
        settlement = entry.settlement_due
        if not settlement.counted:
            self._remove(entry)
            return
        retries = self._retries_of(entry)
        if retries.original is None:
            retries.original = settlement
            emit(
                logger,
                logging.ERROR,
                "settlement_refused",
                **ids(entry.delivery),
                verdict=settlement.verdict.value,
                error_type=type(refusal).__name__,
            )
            self._counters["refused"] += 1
        if retries.fallbacks is None:
            retries.fallbacks = fallbacks(retries.original, error_text(refusal), self._policy)
        following = next(retries.fallbacks, None)
        retries.failures = 0
        if following is not None:
            self._in_flight.replace_settlement(entry, following)
        elif isinstance(refusal, TransportUnavailable):
            self._in_flight.replace_settlement(entry, retries.original)
            retries.fallbacks, retries.failing_since = None, math.inf
        else:
            emit(logger, logging.CRITICAL, "settlement_impossible", **ids(entry.delivery))
            self._remove(entry)

    def _record_settled(self, entry: Entry, *, effective: bool) -> None:
        settlement = entry.settlement_due
        if effective:
            self._counters[_COUNTED_AS[settlement.verdict] if settlement.counted else "given_back"] += 1
            if self._observers:
                self._observers.settled(settlement, self._clock.monotonic() - entry.finished_at)
                if settlement.verdict is Verdict.BURY:
                    self._observers.dead_lettered(settlement)
        elif entry.state is State.UNCERTAIN:
            emit(logger, logging.INFO, "settled_or_lost", **ids(entry.delivery))
        else:
            self._record_lost(entry)

    def _retries_of(self, entry: Entry) -> Retries:
        if (retries := self._retries.get(entry)) is None:
            retries = self._retries[entry] = Retries()
        return retries

    def _remove(self, entry: Entry) -> None:
        self._in_flight.remove(entry)
        self._retries.pop(entry, None)
