"""The consumer: receive, run, settle.

Every call of the transport is made on the one thread that calls `run` or `drain`; tasks run on `concurrency` worker
threads, and a finished one wakes that thread. So outcomes that pile up while it is busy are settled in one batch, and
a lone one at once, without timers. One renewal serves everything that is held.

What follows from an outcome is decided in continuation.py; when a transport is merely away, what is finished is kept
and settled when it is back; when it refuses a settlement for good, the fallbacks defined there are tried in order.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from unstract_core.continuation import RetryPolicy, fallbacks, rejection, settle
from unstract_core.errors import (
    ConfigurationError,
    PayloadError,
    TransportClosed,
    TransportError,
    TransportRefused,
)
from unstract_core.events import emit
from unstract_core.prefetch import AdaptivePrefetch, FixedPrefetch
from unstract_core.registry import runnable
from unstract_core.runner import Runner, ids
from unstract_core.transport import Delivery, Inspection, Settlement, Subscription, Transport, Verdict
from unstract_core.values import error_text

logger = logging.getLogger(__name__)

_LARGEST_BATCH = 500
_LONGEST_WAIT = 5.0
_DRAIN_PAUSE = 0.2
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_COUNTED_AS = {Verdict.ACK: "settled", Verdict.RETRY: "retried", Verdict.BURY: "buried"}


class Consumer:
    """Runs the tasks of some queues.

    `lease` is how long (seconds) a message stays ours without a renewal, and so how long the work of a dead worker
    waits; a living one renews every third of it. A task that raised and that nobody waits for is run again up to
    `max_attempts` deliveries, with a backoff from `backoff` to `backoff_max` seconds. `prefetch` fixes how many
    messages are held at once, running ones included; by default it adapts.

    `counters` counts what has happened: ran, replaced, settled, retried, buried, lost, refused.
    Raises ConfigurationError for settings that cannot work.
    """

    def __init__(
        self,
        transport: Transport,
        tasks: Mapping[str, Callable[..., Any]],
        queues: Sequence[str],
        *,
        concurrency: int = 1,
        lease: float = 60.0,
        max_attempts: int = 5,
        backoff: float = 1.0,
        backoff_max: float = 300.0,
        prefetch: int | None = None,
    ) -> None:
        if isinstance(queues, str) or not queues or not all(isinstance(queue, str) and queue for queue in queues):
            raise ConfigurationError("queues must be a list of one or more non-empty names")
        if concurrency < 1 or max_attempts < 1:
            raise ConfigurationError("concurrency and max_attempts must be at least 1")
        if not (math.isfinite(lease) and lease > 0 and backoff >= 0 and backoff_max >= 0):
            raise ConfigurationError("lease must be a positive number of seconds, backoff and backoff_max not negative")
        if prefetch is not None and prefetch < concurrency:
            raise ConfigurationError("prefetch counts running messages too: it must be at least the concurrency")
        self.tasks = {name: runnable(name, task) for name, task in tasks.items()}
        if not self.tasks:
            raise ConfigurationError("no tasks are registered; a consumer without tasks would bury every message")
        self.transport = transport
        self.queues = list(dict.fromkeys(queues))
        self.concurrency = concurrency
        self.lease = lease
        self.policy = RetryPolicy(max_attempts, backoff, backoff_max)
        self.prefetch = prefetch
        self.counters: Counter[str] = Counter()
        self._stopping = False
        self._running: _Loop | None = None

    def run(self) -> None:
        """Work until `stop` is called or, on the main thread, SIGTERM or SIGINT comes.

        Then nothing more is received, what runs is finished and settled, what has not been started is given back. A
        second signal leaves at once with SystemExit; the leases bring the rest back. Raises what `subscribe` raises;
        later outages are waited out.
        """
        with _signals(self), self._loop() as loop:
            while not loop.ended:
                loop.turn(_LONGEST_WAIT)

    def drain(self, *, timeout: float | None = None) -> int:
        """Work until the queues are empty or `timeout` seconds have passed; return how many times a task was run.

        Empty means that nothing is ready, delayed or held by anyone, where the transport can tell (`inspection`).
        What is running when the time is up is finished first.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        look = 0.0 if self.transport.capabilities.inspection else _DRAIN_PAUSE
        with self._loop() as loop:
            patience = look
            while not loop.ended:
                received = loop.turn(max(0.0, min(patience, deadline - time.monotonic())))
                patience = look
                if time.monotonic() >= deadline:
                    self._stopping = True
                elif not received and not loop.held:
                    if self._drained():
                        break
                    patience = _DRAIN_PAUSE
            return loop.runner.ran

    def stop(self) -> None:
        """Make `run` or `drain` finish what runs and return. Callable from any thread and from a signal handler."""
        self._stopping = True
        if (loop := self._running) is not None:
            loop.ring()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _drained(self) -> bool:
        if not self.transport.capabilities.inspection:
            return True
        try:
            states = cast(Inspection, self.transport).queues(self.queues)
        except TransportError:
            return False
        return not any(state.ready or state.in_flight or state.delayed for state in states)

    @contextlib.contextmanager
    def _loop(self) -> Iterator[_Loop]:
        loop = self._running = _Loop(self, self.transport.subscribe(self.queues, lease=self.lease))
        try:
            yield loop
        finally:
            loop.close()
            self._running = None
            self._stopping = False


class _Loop:
    """One run of a consumer: what it holds, and the turns of its I/O thread."""

    def __init__(self, consumer: Consumer, subscription: Subscription) -> None:
        self.consumer = consumer
        self.subscription = subscription
        self.runner = Runner(consumer.tasks, consumer.concurrency, consumer.policy, self.ring)
        self.held: dict[tuple[str, int], Delivery] = {}
        self._unsettled: list[Settlement] = []
        self._doubtful: set[tuple[str, int]] = set()
        self._lost: set[tuple[str, int]] = set()
        self._largest_batch = _LARGEST_BATCH
        self._prefetch = (
            AdaptivePrefetch(consumer.concurrency) if consumer.prefetch is None else FixedPrefetch(consumer.prefetch)
        )
        self._renew_at = time.monotonic() + consumer.lease / 3
        self._resume_at = 0.0
        self._pause = 0.0

    @property
    def ended(self) -> bool:
        return self.consumer.stopping and not self.held

    def ring(self) -> None:
        """Called from worker threads and signal handlers: takes no lock of ours."""
        self.subscription.wake()

    def turn(self, patience: float) -> int:
        """Settle what is finished, renew what is due, receive what there is room for; return how many that were.

        With nothing held it waits for messages for `patience` seconds; else a finished task ends its wait.
        """
        if (pause := self._resume_at - time.monotonic()) > 0:
            time.sleep(min(pause, _SHORTEST_PAUSE))
            return 0
        try:
            self._renew()
            self._settle()
            deliveries = self._receive(patience)
        except TransportClosed:
            raise
        except TransportError as exc:
            self._away(exc)
            return 0
        self._pause = 0.0
        for delivery in deliveries:
            self._take(delivery)
        return len(deliveries)

    def close(self) -> None:
        self.runner.close()
        self.subscription.close()
        self.consumer.counters["ran"] += self.runner.ran
        self.consumer.counters["replaced"] += self.runner.replaced

    def _receive(self, patience: float) -> Sequence[Delivery]:
        if self.consumer.stopping:
            for delivery in self.runner.withdraw_all():
                self.runner.finish(Settlement(delivery, Verdict.RETRY, reason="given back: the worker stops"))
            room = 0
        else:
            room = max(0, self._prefetch.limit - len(self.held))
        self.runner.asleep = True
        at_once = bool(self.runner.done) or self.ended
        longest = min(_LONGEST_WAIT, max(0.0, self._renew_at - time.monotonic())) if self.held else patience
        wait = 0.0 if at_once else longest
        try:
            return self.subscription.receive(limit=room, wait=wait)
        finally:
            self.runner.asleep = False

    def _take(self, delivery: Delivery) -> None:
        self.held[_key(delivery)] = delivery
        rejected = rejection(delivery, self.consumer.tasks, self.consumer.policy)
        if rejected is None:
            self.runner.submit(delivery)
            return
        emit(logger, logging.ERROR, "message_rejected", **ids(delivery), reason=rejected.error)
        self.runner.done.append(settle(delivery, rejected, self.consumer.policy))

    def _renew(self) -> None:
        if (now := time.monotonic()) < self._renew_at:
            return
        held = list(self.held.values())
        for delivery, kept in zip(held, self.subscription.renew(held) if held else (), strict=True):
            if not kept and _key(delivery) not in self._lost:
                self._lost.add(_key(delivery))
                self.runner.withdraw(delivery)
                self._log_lost(delivery)
        self._renew_at = now + self.consumer.lease / 3

    def _settle(self) -> None:
        done = self.runner.done
        while done:
            self._unsettled.append(done.popleft())
        while self._unsettled:
            batch = self._unsettled[: self._largest_batch]
            try:
                self._settle_batch(batch)
                self._largest_batch = min(_LARGEST_BATCH, self._largest_batch * 2)
            except TransportError as exc:
                self._largest_batch = max(1, len(batch) // 2)
                if getattr(exc, "fate_unknown", False):
                    self._doubtful.update(_key(settlement.delivery) for settlement in batch)
                raise
            finally:
                self._unsettled = [left for left in self._unsettled if _key(left.delivery) in self.held]

    def _settle_batch(self, batch: Sequence[Settlement]) -> None:
        try:
            took_effect = self.subscription.settle(batch)
        except (TransportRefused, PayloadError) as exc:
            if len(batch) == 1:
                self._fall_back(batch[0], exc)
                return
            self._settle_batch(batch[: len(batch) // 2])
            self._settle_batch(batch[len(batch) // 2 :])
            return
        self._prefetch.ran(len(batch))
        for settlement, effective in zip(batch, took_effect, strict=True):
            self._end(settlement, effective)

    def _fall_back(self, settlement: Settlement, refusal: Exception) -> None:
        emit(
            logger,
            logging.ERROR,
            "settlement_refused",
            **ids(settlement.delivery),
            verdict=settlement.verdict.value,
            error_type=type(refusal).__name__,
        )
        self.consumer.counters["refused"] += 1
        for attempt in fallbacks(settlement, error_text(refusal)):
            try:
                (effective,) = self.subscription.settle([attempt])
            except (TransportRefused, PayloadError):
                continue
            self._end(attempt, effective)
            return
        emit(logger, logging.CRITICAL, "settlement_impossible", **ids(settlement.delivery))
        del self.held[_key(settlement.delivery)]

    def _end(self, settlement: Settlement, effective: bool) -> None:
        key = _key(settlement.delivery)
        del self.held[key]
        if effective:
            self.consumer.counters[_COUNTED_AS[settlement.verdict]] += 1
        elif key in self._doubtful:
            emit(logger, logging.INFO, "settled_or_lost", **ids(settlement.delivery))
        elif key not in self._lost:
            self._log_lost(settlement.delivery)
        self._doubtful.discard(key)
        self._lost.discard(key)

    def _log_lost(self, delivery: Delivery) -> None:
        self.consumer.counters["lost"] += 1
        emit(logger, logging.WARNING, "lease_lost", **ids(delivery))

    def _away(self, exc: TransportError) -> None:
        if not self._pause:
            emit(logger, logging.WARNING, "transport_away", error_type=type(exc).__name__, held=len(self.held))
        longest = min(_LONGEST_PAUSE, self.consumer.lease / 6)  # so that what is held can still be renewed
        self._pause = min(longest, max(_SHORTEST_PAUSE, self._pause * 2))
        self._resume_at = time.monotonic() + self._pause


def _key(delivery: Delivery) -> tuple[str, int]:
    return delivery.id, delivery.attempt


@contextlib.contextmanager
def _signals(consumer: Consumer) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if consumer.stopping:
            raise SystemExit(128 + number)
        consumer.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
