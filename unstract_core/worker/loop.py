"""One run of a consumer: the iterations of its I/O thread.

An iteration releases deliveries that this worker should not start, renews the leases that are due, settles the
finished deliveries, and receives as many messages as there is room for. Each of the last three may find the transport
unavailable. The others are tried nevertheless, and deliveries stay in flight until the transport is available again.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from unstract_core.clock import Clock
from unstract_core.continuation import rejection, settle
from unstract_core.errors import ContractError, TransportClosed, TransportError
from unstract_core.observability.log_events import LogThrottle, emit
from unstract_core.observability.observer import Observers, WorkerHeartbeat
from unstract_core.outcomes import RetryPolicy
from unstract_core.transport import Delivery, Subscription
from unstract_core.values import error_text
from unstract_core.worker.in_flight import InFlight
from unstract_core.worker.prefetch import WINDOW, AdaptivePrefetch, FixedPrefetch
from unstract_core.worker.settler import LONGEST_PAUSE, SHORTEST_PAUSE, Settler
from unstract_core.worker.task_threads import CallingThread, TaskThreads, ids

logger = logging.getLogger("unstract_wire.worker")

Result = TypeVar("Result")

LONGEST_WAIT = 5.0
"""Seconds that an iteration waits at most, so that observers hear of an idle consumer."""
_MOST_FAILING = 3
"""How many settlements may fail alone before the loop receives less."""
_SHORTEST_PROBE, _LONGEST_PROBE = 1.0, 60.0
"""Seconds between two receives while more settlements than that fail."""
_REJECTIONS, _BETWEEN_REJECTIONS = 10, 30.0
"""How many rejected messages of a queue and an error type are logged, and the seconds until the rest is summed up."""
_MOMENT = 0.001
"""Seconds after which some of many short tasks have ended."""
_MOST_WITHOUT_ROOM = 1000
"""How many results may wait for a queue that is full; to receive more may be what makes room in it."""
_MARGIN = 0.9
"""The part of a lease in which a task may still start: the transport's clock is another one."""


@attrs.frozen
class LoopConfig:
    """The settings of a run.

    Attributes:
        tasks: The functions by task name.
        concurrency: How many tasks run at once.
        lease: Seconds; a third of it passes between two renewals.
        policy: The consumer's policy.
        prefetch: How many messages are in flight at most; None to adapt.
        counters: The consumer's counters.
        stopping: Whether the consumer stops; asked in each iteration.
        observers: The consumer's observers.
        clock: The consumer's clock.
        deadline: Seconds that a task may run; infinite (default) for no limit.
        log_errors: Whether the log has the messages of exceptions.
        calling_thread: Runs tasks in place of the first thread; None (default) for threads alone.
    """

    tasks: Mapping[str, Callable[..., Any]]
    concurrency: int
    lease: float
    policy: RetryPolicy
    prefetch: int | None
    counters: Counter[str]
    stopping: Callable[[], bool]
    observers: Observers
    clock: Clock
    deadline: float = math.inf
    log_errors: bool = False
    calling_thread: CallingThread | None = None


class Loop:
    """The state of one run.

    Args:
        config: The settings.
        subscription: The messages. The loop does not close it.
    """

    def __init__(self, config: LoopConfig, subscription: Subscription) -> None:
        self.problem: Exception | None = None
        """Why the transport could not be used in the last iteration; None if it could."""
        self.waited = 0.0
        """Seconds for which the last iteration waited for messages."""
        self._config = config
        self._clock = config.clock
        self._subscription = subscription
        self._in_flight = InFlight(config.clock, self.wake)
        self._threads = TaskThreads(
            config.tasks,
            config.concurrency,
            config.policy,
            self._in_flight,
            config.counters,
            config.stopping,
            config.observers,
            config.clock,
            config.deadline,
            log_errors=config.log_errors,
            calling_thread=config.calling_thread,
        )
        self._settler = Settler(
            subscription,
            self._in_flight,
            config.counters,
            config.observers,
            self._renew_in_time,
            config.policy,
            config.clock,
        )
        self._prefetch = (
            AdaptivePrefetch(config.concurrency, config.clock)
            if config.prefetch is None
            else FixedPrefetch(config.prefetch)
        )
        self._ran, self._busy_seconds = config.counters["ran"], 0.0
        self._renew_at = self._clock.monotonic() + config.lease / 3
        self._renewal_failed = False
        self._crowded_since = math.inf
        self._probed_after, self._probe_at, self._probe_pause = 0, 0.0, _SHORTEST_PROBE
        self._resume_at = -math.inf
        self._pause = 0.0
        self._logged_away = False
        self._rejections: LogThrottle[tuple[str, str]] = LogThrottle(
            burst=_REJECTIONS, seconds=_BETWEEN_REJECTIONS, monotonic=config.clock.monotonic
        )

    @property
    def in_flight(self) -> int:
        """How many deliveries are in flight: waiting, running, and finished but not settled."""
        return len(self._in_flight)

    @property
    def unfinished(self) -> int:
        """How many of them wait or run."""
        return self._in_flight.unfinished

    @property
    def ended(self) -> bool:
        """Whether the consumer stops and nothing is in flight."""
        return self._config.stopping() and not self._in_flight

    @property
    def blocked_by(self) -> Exception | None:
        """Why the transport could not be used in the last iteration, or why a settlement waits for a full queue."""
        return self.problem or self._settler.no_room

    def wake(self) -> None:
        """End the wait of the current iteration. For task threads and signal handlers: it takes no lock of ours."""
        self._subscription.wake()

    def poll_once(self, idle_wait: float, until: float = math.inf) -> int | None:
        """Run one iteration.

        Args:
            idle_wait: Seconds to wait for a message while nothing is in flight. Else a finished task ends the wait.
            until: The moment, on the consumer's clock, at which every wait ends; infinite (default) for none.

        Returns:
            How many messages were received; None if the transport could not be asked.

        Raises:
            TransportClosed: The transport or the subscription was closed.
            ContractError: A call of the transport failed for a reason other than the transport.
        """
        self._threads.end_if_forked()
        if overdue := self._threads.give_up_overdue():
            self._observe(away=self._logged_away)  # the owner of the process may stop it before more tasks start
            self._threads.replace_threads(overdue)
        self._release_waiting()
        if (pause := self._resume_at - self._clock.monotonic()) > 0:
            self._clock.sleep(min(pause, SHORTEST_PAUSE))
            return None
        self.problem, self._renewal_failed = None, False
        self._try(self._settle)
        self._renew_in_time()
        room = self._room()
        received = self._try(lambda: self._receive(room, idle_wait, until))
        if self.problem is None or (room and received is not None):  # a settlement that fails alone has its own pause
            self._pause = 0.0
        else:
            self._lengthen_pause()
        self._log_availability()
        self._observe(away=self.problem is not None)
        return received

    def close(self) -> None:
        """Start no more tasks. Running tasks go on alone, and leases bring unsettled deliveries back."""
        self._log_rejections(at_once=True)
        self._threads.close()

    def _observe(self, *, away: bool) -> None:
        if self._config.observers:
            heartbeat = WorkerHeartbeat(len(self._in_flight), self._in_flight.running, away)
            self._config.observers.on_heartbeat(heartbeat)

    def _try(self, step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except TransportClosed:
            raise
        except Exception as exc:
            if isinstance(exc, ContractError) and not isinstance(exc, TransportError):
                raise
            self.problem = self.problem or exc
            return None

    def _release_waiting(self) -> None:
        """Release deliveries that no thread has started: when this worker stops, or behind long tasks."""
        now = self._clock.monotonic()
        if self._config.stopping():
            reason = "the worker stops"
        elif not self._prefetch.adapts or not self._threads.waiting:
            self._crowded_since = math.inf
            return
        elif self._threads.blocked_for >= WINDOW:
            reason = "every thread is busy for longer"
        elif self._threads.waiting > 2 * self._limit():
            reason = "tasks have become longer"
        else:
            self._crowded_since = math.inf
            return
        # Once may mean that the whole process had no processor: its deliveries may start in the next moment.
        self._crowded_since = min(self._crowded_since, now)
        if now - self._crowded_since < WINDOW / 2 and not self._config.stopping():
            return
        self._prefetch.fall()
        for entry in self._threads.withdraw():
            self._in_flight.release(entry, reason)

    def _renew_in_time(self) -> None:
        """Renew the leases if that is due. A due renewal precedes every statement, and is tried once an iteration."""
        if self._clock.monotonic() >= self._renew_at and not self._renewal_failed:
            self._renewal_failed = self._try(self._renew) is None

    def _renew(self) -> bool:
        now = self._clock.monotonic()
        entries = list(self._in_flight)
        if entries:
            kept = self._subscription.renew([entry.delivery for entry in entries])
            self._settler.answers += 1
            for entry, still_ours in zip(entries, kept, strict=True):
                if still_ours:
                    self._in_flight.renew(entry, now + self._config.lease * _MARGIN)
                else:
                    self._settler.lease_lost(entry)
        self._renew_at = now + self._config.lease / 3
        return True

    def _settle(self) -> None:
        self._in_flight.collect()
        self._settler.settle()

    def _receive(self, room: int, idle_wait: float, until: float) -> int:
        if not room and not self._in_flight.finished and self._limit() > self._config.concurrency:
            self._clock.sleep(_MOMENT)
        if not room and self._in_flight.finished:
            return 0  # to settle them makes room: no need to call a transport that may be far away
        self._in_flight.asleep = True
        try:
            began = self._clock.monotonic()
            wait = max(0.0, self._wait_until(idle_wait, until) - began)
            deliveries = self._subscription.receive(limit=room, wait=wait)
            self.waited = self._clock.monotonic() - began
        finally:
            self._in_flight.asleep = False
        if room:
            self._settler.answers += 1
            if not deliveries and not self._in_flight:
                self._prefetch.fall()  # the tasks that follow a pause may be long
        for delivery in deliveries:
            self._start(delivery)
        return len(deliveries)

    def _limit(self) -> int:
        ran, busy = self._config.counters["ran"], self._threads.busy_seconds
        self._prefetch.ran(ran - self._ran, busy - self._busy_seconds)
        self._ran, self._busy_seconds = ran, busy
        return self._prefetch.limit(self._in_flight.starts)

    def _room(self) -> int:
        """Return how many messages may be received now.

        A delivery that has finished since the last settlement leaves room, unless the number in flight is fixed. Else
        the loop would ask a transport that is far away for a handful of messages after each batch.
        """
        failing, at_fault = self._settler.failing, self._settler.at_fault
        if self._config.stopping() or failing > _MOST_WITHOUT_ROOM:
            return 0
        if at_fault > _MOST_FAILING and not self._may_probe():
            return 0
        settled_next = self._in_flight.finished if self._prefetch.adapts and self.problem is None else 0
        room = max(0, self._limit() - (len(self._in_flight) - failing - settled_next))
        return min(room, self._config.concurrency) if at_fault > _MOST_FAILING else room

    def _may_probe(self) -> bool:
        """Whether to receive although several settlements fail: at once after another one succeeded, else rarely."""
        now = self._clock.monotonic()
        if self._settler.settled != self._probed_after:
            self._probed_after, self._probe_pause = self._settler.settled, _SHORTEST_PROBE
        elif now < self._probe_at:
            return False
        else:
            self._probe_pause = min(_LONGEST_PROBE, self._probe_pause * 2)
        self._probe_at = now + self._probe_pause
        return True

    def _wait_until(self, idle_wait: float, until: float) -> float:
        """Return the moment until which only a message or a finished task ends the wait."""
        now = self._clock.monotonic()
        if self._in_flight.finished or self.ended or self.problem is not None or self._pause:
            return now
        if not self._in_flight:
            return min(now + idle_wait, until)
        moments = [now + LONGEST_WAIT, until, self._renew_at, self._threads.overdue_at, self._settler.next_retry_at]
        moments.append(now + self._config.deadline)  # for a task that starts during the wait
        if self._prefetch.adapts and self._threads.waiting:
            moments.append(now + WINDOW)
        return min(moments)

    def _start(self, delivery: Delivery) -> None:
        """Hand a delivery to the task threads, or finish it at once if its task must not run."""
        config = self._config
        entry = self._in_flight.add(delivery, self._clock.monotonic() + config.lease * _MARGIN)
        task = config.tasks.get(delivery.payload.task_name) if delivery.payload is not None else None
        rejected = rejection(delivery, config.tasks, config.policy.of(task), self._clock.now())
        if rejected is None:
            self._threads.submit(entry)
            return
        if self._rejections.passes((delivery.queue, rejected.error_type)):
            emit(logger, logging.ERROR, "message_rejected", **ids(delivery), reason=rejected.error)
        config.observers.rejected(delivery, rejected.error_type)
        self._in_flight.finish(entry, settle(delivery, rejected, config.policy))

    def _log_rejections(self, *, at_once: bool = False) -> None:
        """Log how many messages were rejected without a log event of their own."""
        for (queue, error_type), count, seconds in self._rejections.due(at_once=at_once):
            emit(
                logger,
                logging.ERROR,
                "messages_rejected",
                queue=queue,
                error_type=error_type,
                count=count,
                seconds=seconds,
            )

    def _lengthen_pause(self) -> None:
        longest = min(LONGEST_PAUSE, self._config.lease / 6)  # so that leases can still be renewed
        self._pause = min(longest, max(SHORTEST_PAUSE, self._pause * 2))
        self._resume_at = self._clock.monotonic() + self._pause

    def _log_availability(self) -> None:
        """Log the begin of an outage of the transport, and its end once no settlement fails any more."""
        self._log_rejections()
        problem = self.blocked_by
        if problem is None:
            if self._logged_away and not self._settler.failing:
                self._logged_away = False
                emit(logger, logging.INFO, "transport_back", held=len(self._in_flight))
        elif not self._logged_away:
            self._logged_away = True
            ours = isinstance(problem, TransportError)
            emit(
                logger,
                logging.WARNING if ours else logging.ERROR,
                "transport_away",
                error_type=type(problem).__name__,
                error=error_text(problem) if ours else None,
                held=len(self._in_flight),
            )
