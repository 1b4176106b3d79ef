"""Settling what is finished: in batches, alone where a batch fails, and by the fallbacks where it is refused for good.

A transport that is away is asked again, as long as it takes. A settlement that fails alone, for `PATIENCE` seconds in
which the transport goes on answering others, is the trouble itself (a result so large that its statement always times
out, say): it waits for its turn behind the others, and then counts as refused. It is never given up for that: when
no fallback can be written either, all begins anew. One whose queue is full (`QueueFull`) waits as well, and holds up
no other; neither that nor a transport that takes nothing for now (`NoRoom`) ever makes it count as refused.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from unstract_core.continuation import RetryPolicy, fallbacks
from unstract_core.errors import (
    NoRoom,
    QueueFull,
    TransportClosed,
    TransportError,
    TransportRefused,
    TransportUnavailable,
)
from unstract_core.observability.log_events import emit
from unstract_core.observability.observer import Observers
from unstract_core.transport import Settlement, Subscription, Verdict
from unstract_core.values import error_text
from unstract_core.worker.in_flight import Held, Key
from unstract_core.worker.task_threads import ids

logger = logging.getLogger("unstract_wire.worker")

_LARGEST_BATCH = 1000
_MOST_FAILURES = 5
PATIENCE = 300.0
_RELEASE_PATIENCE = 10.0
"""Seconds for which a release that fails is tried again, as over a restart of the database."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
_COUNTED_AS = {Verdict.ACK: "settled", Verdict.RETRY: "retried", Verdict.BURY: "buried"}


class Endings:
    """What is finished and not settled yet, of one subscription. `held` is everything held: what ends leaves it.

    `settled` counts the statements that settled something. `answers` is counted up by the owner whenever the transport
    has answered something else. `renew_in_time` is called before each settlement, and renews the leases if that is due:
    settling takes as many statements as it needs.
    """

    def __init__(
        self,
        subscription: Subscription,
        held: dict[Key, Held],
        counters: Counter[str],
        observers: Observers,
        renew_in_time: Callable[[], None],
        policy: RetryPolicy | None = None,
    ) -> None:
        self.answers = 0
        self.settled = 0
        self._subscription = subscription
        self._held = held
        self._counters = counters
        self._observers = observers
        self._renew_in_time = renew_in_time
        self._policy = policy
        self._finished: dict[Key, Held] = {}
        self._largest_batch = _LARGEST_BATCH
        self._no_room: QueueFull | None = None

    def __len__(self) -> int:
        return len(self._finished)

    @property
    def suspects(self) -> list[Held]:
        return [held for held in self._finished.values() if held.suspect]

    @property
    def no_room(self) -> QueueFull | None:
        """Why a settlement waits for a queue that is full, while one does."""
        if self._no_room is not None and not any(held.no_room for held in self._finished.values()):
            self._no_room = None
        return self._no_room

    def add(self, finished: Iterable[Held]) -> None:
        self._finished.update((held.key, held) for held in finished)

    def settle(self) -> None:
        """Settle what is due. Raises a TransportError other than TransportRefused; what is left is kept for later."""
        while batch := self._next_batch():
            self._settle(batch)
            self._largest_batch = min(_LARGEST_BATCH, self._largest_batch * 2)
        for held in self.suspects:
            if held.retry_at <= time.monotonic():
                self._settle([held])

    def lost(self, held: Held) -> None:
        """Note that a lease is lost. What is finished is settled all the same: the answer to that tells its end."""
        if held.settlement is None:
            self._note_lost(held)

    def _note_lost(self, held: Held) -> None:
        if not held.lost:
            held.lost = True
            held.until = 0.0
            self._counters["lost"] += 1
            emit(logger, logging.WARNING, "lease_lost", **ids(held.delivery))
            self._observers.lost(held.delivery)

    def _next_batch(self) -> list[Held]:
        """Return what is settled together. What is given back goes first, by itself: no other costs it its attempt."""
        due = [held for held in self._finished.values() if not held.suspect]
        given_back = [held for held in due if not _settlement(held).counted]
        return (given_back or due)[: self._largest_batch]

    def _settle(self, batch: Sequence[Held]) -> None:
        self._renew_in_time()
        try:
            took_effect = self._subscription.settle([_settlement(held) for held in batch])
        except TransportClosed:
            raise
        except TransportError as exc:
            if isinstance(exc, TransportRefused):
                self._refused(batch, exc)
            elif isinstance(exc, QueueFull):
                self._full(batch, exc)
            else:
                self._failed(batch, exc)
                raise
        except Exception as exc:  # one that nobody foresaw: it must end neither the others nor the consumer
            self._refused(batch, exc)
        else:
            self.answers += 1
            self.settled += 1
            for held in batch:  # before anything is renewed: what was settled has no lease any more
                self._forget(held)
            for held, effective in zip(batch, took_effect, strict=True):
                self._end(held, effective=effective)
                self._renew_in_time()  # an observer may have taken its time

    def _refused(self, batch: Sequence[Held], refusal: Exception) -> None:
        if len(batch) > 1:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._settle(half)
            return
        (held,) = batch
        self._fall_back(held, refusal)
        if held.key in self._finished:
            self._settle(batch)

    def _full(self, batch: Sequence[Held], failure: QueueFull) -> None:
        """Let those wait whose queue is full. The others of the batch are settled already, and only say so now."""
        if len(batch) > 1:
            for held in batch:
                self._settle([held])
            return
        self._failed(batch, failure)
        batch[0].no_room = True
        self._no_room = failure

    def _failed(self, batch: Sequence[Held], failure: TransportError) -> None:
        """Prepare the next try.

        A release that may have taken effect was the last use of its delivery, whose next holder may have the same
        attempt. One that did not is tried again for a while: after that the end of the lease counts as an attempt.
        """
        now = time.monotonic()
        unknown = bool(getattr(failure, "fate_unknown", False))
        for held in batch:
            held.doubtful = held.doubtful or unknown or not _settlement(held).counted
            if not _settlement(held).counted:
                held.failing_since = min(held.failing_since, now)
                if unknown or now - held.failing_since >= _RELEASE_PATIENCE:
                    self._forget(held)
        if len(batch) > 1:
            self._largest_batch = len(batch) // 2
            return
        (held,) = batch
        if held.answers != self.answers:
            held.answers = self.answers
            held.failures += 1
            held.failing_since = min(held.failing_since, now)
        held.retry_at = now + min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** min(held.failures, 10))
        held.no_room = False
        if isinstance(failure, NoRoom):
            held.failing_since = math.inf
            return
        if held.settled_before is None:
            held.settled_before = self.settled
        if not isinstance(failure, TransportUnavailable) and self.settled == held.settled_before:
            return  # an operator has to give a right, or make a queue; while others are settled it is at fault itself
        worn_out = held.failures > _MOST_FAILURES and now - held.failing_since >= PATIENCE
        if worn_out or (held.fallbacks is not None and held.failures):
            self._fall_back(held, failure)

    def _fall_back(self, held: Held, refusal: Exception) -> None:
        if not _settlement(held).counted:
            self._forget(held)
            return
        if held.original is None:
            held.original = _settlement(held)
            emit(
                logger,
                logging.ERROR,
                "settlement_refused",
                **ids(held.delivery),
                verdict=_settlement(held).verdict.value,
                error_type=type(refusal).__name__,
            )
            self._counters["refused"] += 1
        if held.fallbacks is None:
            held.fallbacks = fallbacks(held.original, error_text(refusal), self._policy)
        following = next(held.fallbacks, None)
        held.failures = 0
        if following is not None:
            held.settlement = following
        elif isinstance(refusal, TransportUnavailable):
            held.settlement, held.fallbacks, held.failing_since = held.original, None, math.inf
        else:
            emit(logger, logging.CRITICAL, "settlement_impossible", **ids(held.delivery))
            self._forget(held)

    def _end(self, held: Held, *, effective: bool) -> None:
        self._forget(held)
        if effective:
            settlement = _settlement(held)
            self._counters[_COUNTED_AS[settlement.verdict] if settlement.counted else "given_back"] += 1
            if self._observers:
                self._observers.settled(settlement, time.monotonic() - held.finished)
                if settlement.verdict is Verdict.BURY:
                    self._observers.dead_lettered(settlement)
        elif held.doubtful:
            emit(logger, logging.INFO, "settled_or_lost", **ids(held.delivery))
        else:
            self._note_lost(held)

    def _forget(self, held: Held) -> None:
        self._finished.pop(held.key, None)
        self._held.pop(held.key, None)


def _settlement(held: Held) -> Settlement:
    if held.settlement is None:
        raise RuntimeError("a delivery without a settlement was to be settled")
    return held.settlement
