"""One run of a consumer: what it holds, and the turns of its I/O thread.

A turn gives back what must not be started, renews what is due, settles what is finished, and receives what there is
room for. Each of the last three may find the transport away; the others are tried all the same, and what is held is
kept until it is back.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from unstract_core.continuation import RetryPolicy, rejection, settle
from unstract_core.errors import ContractError, TransportClosed, TransportError
from unstract_core.observability.log_events import LogThrottle, emit
from unstract_core.observability.observer import Observers, Turn
from unstract_core.transport import Delivery, Subscription
from unstract_core.values import error_text
from unstract_core.worker.in_flight import Held, Key
from unstract_core.worker.prefetch import WINDOW, AdaptivePrefetch, FixedPrefetch
from unstract_core.worker.settler import LONGEST_PAUSE, SHORTEST_PAUSE, Endings
from unstract_core.worker.task_threads import Here, Runner, ids

logger = logging.getLogger("unstract_wire.worker")

Result = TypeVar("Result")

LONGEST_WAIT = 5.0
_MOST_SUSPECTS = 3
_SHORTEST_PROBE, _LONGEST_PROBE = 1.0, 60.0
"""Seconds between two receives while more settlements than that fail, each by itself."""
_REJECTIONS, _BETWEEN_REJECTIONS = 10, 30.0
"""So many rejected messages of a queue and a kind of error are logged each; how many follow, after so many seconds."""
_MOMENT = 0.001
"""Seconds after which some of many short tasks have ended."""
_MOST_WITHOUT_ROOM = 1000
"""How many results may wait for a queue that is full; taking more may be what makes room in it."""
_MARGIN = 0.9
"""The part of a lease in which a task may still be started: its end was reckoned by another clock."""


@attrs.frozen
class Settings:
    """What a run is told by its consumer; `stopping` is asked in every turn."""

    tasks: Mapping[str, Callable[..., Any]]
    concurrency: int
    lease: float
    policy: RetryPolicy
    prefetch: int | None
    counters: Counter[str]
    stopping: Callable[[], bool]
    observers: Observers
    deadline: float = math.inf
    log_errors: bool = False
    here: Here | None = None


class Loop:
    """`problem` is why the transport could not be used in the last turn, if it could not; `waited` for how many seconds
    messages were waited for in it."""

    def __init__(self, settings: Settings, subscription: Subscription) -> None:
        self.problem: Exception | None = None
        self.waited = 0.0
        self._settings = settings
        self._subscription = subscription
        self._held: dict[Key, Held] = {}
        self._runner = Runner(
            settings.tasks,
            settings.concurrency,
            settings.policy,
            settings.counters,
            settings.stopping,
            self.ring,
            settings.observers,
            settings.deadline,
            log_errors=settings.log_errors,
            here=settings.here,
        )
        self._endings = Endings(
            subscription, self._held, settings.counters, settings.observers, self._renew_in_time, settings.policy
        )
        self._prefetch = (
            AdaptivePrefetch(settings.concurrency) if settings.prefetch is None else FixedPrefetch(settings.prefetch)
        )
        self._ran, self._busy = settings.counters["ran"], 0.0
        self._renew_at = time.monotonic() + settings.lease / 3
        self._renewal_failed = False
        self._crowded_since = math.inf
        self._probed_after, self._probe_at, self._probe_pause = 0, 0.0, _SHORTEST_PROBE
        self._resume_at = 0.0
        self._pause = 0.0
        self._told_away = False
        self._rejections: LogThrottle[tuple[str, str]] = LogThrottle(burst=_REJECTIONS, seconds=_BETWEEN_REJECTIONS)

    @property
    def holding(self) -> int:
        """How many deliveries are held: waiting, running, and finished but not settled."""
        return len(self._held)

    @property
    def running(self) -> bool:
        """Whether there is more to wait for than settlements."""
        return len(self._held) > len(self._endings) + len(self._runner.done)

    @property
    def ended(self) -> bool:
        return self._settings.stopping() and not self._held

    @property
    def trouble(self) -> Exception | None:
        """Why the transport could not be used in the last turn, or why a settlement waits for a queue that is full."""
        return self.problem or self._endings.no_room

    def ring(self) -> None:
        """Called from worker threads and signal handlers: takes no lock of ours."""
        self._subscription.wake()

    def turn(self, patience: float, deadline: float = math.inf) -> int | None:
        """Do what is due, and wait for more; return how many messages were received, None if that could not be asked.

        With nothing held it waits for messages for `patience` seconds; else a finished task ends its wait. It does not
        wait beyond `deadline`, on the monotonic clock. Raises TransportClosed, and what is no TransportError of ours.
        """
        self._runner.end_if_forked()
        if overdue := self._runner.give_up_overdue():
            self._observe(away=self._told_away)  # whoever owns the process may stop it now, before more is started
            self._runner.replace_threads(overdue)
        self._give_back()
        if (pause := self._resume_at - time.monotonic()) > 0:
            time.sleep(min(pause, SHORTEST_PAUSE))
            return None
        self.problem, self._renewal_failed = None, False
        self._try(self._settle)
        self._renew_in_time()
        room = self._room()
        received = self._try(lambda: self._receive(room, patience, deadline))
        if self.problem is None or (room and received is not None):  # what alone fails has a pause of its own
            self._pause = 0.0
        else:
            self._wait_longer()
        self._tell()
        self._observe(away=self.problem is not None)
        return received

    def close(self) -> None:
        """Start nothing more; what runs is left to itself, and what is held to its lease."""
        self._report_rejections(at_once=True)
        self._runner.close()

    def _observe(self, *, away: bool) -> None:
        if self._settings.observers:
            self._settings.observers.turned(Turn(len(self._held), self._runner.running, away))

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

    def _give_back(self) -> None:
        """Release what waits for a thread when this worker stops, or when it waits behind long tasks."""
        now = time.monotonic()
        if self._settings.stopping():
            why = "the worker stops"
        elif not self._prefetch.adapts or not self._runner.waiting:
            self._crowded_since = math.inf
            return
        elif self._runner.stuck_for >= WINDOW:
            why = "every thread is busy for longer"
        elif self._runner.waiting > 2 * self._limit():
            why = "tasks have become longer"
        else:
            self._crowded_since = math.inf
            return
        # Seen once it may mean that the whole process had no processor: what it holds may run in the next moment.
        self._crowded_since = min(self._crowded_since, now)
        if now - self._crowded_since < WINDOW / 2 and not self._settings.stopping():
            return
        self._prefetch.fall()
        for held in self._runner.withdraw():
            held.give_back(why)
            self._runner.finish(held)

    def _renew_in_time(self) -> None:
        """Renew the leases if that is due: a due renewal comes before any other statement, and is tried once a turn."""
        if time.monotonic() >= self._renew_at and not self._renewal_failed:
            self._renewal_failed = self._try(self._renew) is None

    def _renew(self) -> bool:
        now = time.monotonic()
        held = list(self._held.values())
        if held:
            kept = self._subscription.renew([one.delivery for one in held])
            self._endings.answers += 1
            for one, still_ours in zip(held, kept, strict=True):
                if still_ours:
                    one.until = now + self._settings.lease * _MARGIN
                else:
                    self._endings.lost(one)
        self._renew_at = now + self._settings.lease / 3
        return True

    def _settle(self) -> None:
        done = self._runner.done
        self._endings.add(done.popleft() for _ in range(len(done)))
        self._endings.settle()

    def _receive(self, room: int, patience: float, deadline: float) -> int:
        if not room and not self._runner.done and self._limit() > self._settings.concurrency:
            time.sleep(_MOMENT)
        if not room and self._runner.done:
            return 0  # they are settled first, which makes room: no need to ask a transport that may be far
        self._runner.asleep = True
        try:
            began = time.monotonic()
            wait = max(0.0, self._longest_wait(patience, deadline) - began)
            deliveries = self._subscription.receive(limit=room, wait=wait)
            self.waited = time.monotonic() - began
        finally:
            self._runner.asleep = False
        if room:
            self._endings.answers += 1
            if not deliveries and not self._held:
                self._prefetch.fall()  # what comes after a pause may be long
        for delivery in deliveries:
            self._take(delivery)
        return len(deliveries)

    def _limit(self) -> int:
        ran, busy = self._settings.counters["ran"], self._runner.busy
        self._prefetch.ran(ran - self._ran, busy - self._busy)
        self._ran, self._busy = ran, busy
        return self._prefetch.limit(self._runner.started)

    def _room(self) -> int:
        """Return how many messages may be received now.

        What has finished since the last settlement leaves room, unless the number of messages in flight is fixed: else
        a far transport would be asked for a handful of messages after each batch.
        """
        suspects = self._endings.suspects
        at_fault = sum(not held.no_room for held in suspects)
        if self._settings.stopping() or len(suspects) > _MOST_WITHOUT_ROOM:
            return 0
        if at_fault > _MOST_SUSPECTS and not self._may_probe():
            return 0
        settled_next = len(self._runner.done) if self._prefetch.adapts and self.problem is None else 0
        room = max(0, self._limit() - (len(self._held) - len(suspects) - settled_next))
        return min(room, self._settings.concurrency) if at_fault > _MOST_SUSPECTS else room

    def _may_probe(self) -> bool:
        """Whether to take more although several settlements fail: at once after another one succeeded, else rarely."""
        now = time.monotonic()
        if self._endings.settled != self._probed_after:
            self._probed_after, self._probe_pause = self._endings.settled, _SHORTEST_PROBE
        elif now < self._probe_at:
            return False
        else:
            self._probe_pause = min(_LONGEST_PROBE, self._probe_pause * 2)
        self._probe_at = now + self._probe_pause
        return True

    def _longest_wait(self, patience: float, deadline: float) -> float:
        """Return the moment until which nothing but a message or a finished task is to be waited for."""
        now = time.monotonic()
        if self._runner.done or self.ended or self.problem is not None or self._pause:
            return now
        if not self._held:
            return min(now + patience, deadline)
        moments = [now + LONGEST_WAIT, deadline, self._renew_at, self._runner.overdue_at]
        moments += [held.retry_at for held in self._endings.suspects]
        if self._prefetch.adapts and self._runner.waiting:
            moments.append(now + WINDOW)
        return min(moments)

    def _take(self, delivery: Delivery) -> None:
        held = Held(delivery, until=time.monotonic() + self._settings.lease * _MARGIN)
        self._held[held.key] = held
        task = self._settings.tasks.get(delivery.payload.task_name) if delivery.payload is not None else None
        rejected = rejection(delivery, self._settings.tasks, self._settings.policy.of(task))
        if rejected is None:
            self._runner.submit(held)
            return
        if self._rejections.passes((delivery.queue, rejected.error_type)):
            emit(logger, logging.ERROR, "message_rejected", **ids(delivery), reason=rejected.error)
        self._settings.observers.rejected(delivery, rejected.error_type)
        held.settlement = settle(delivery, rejected, self._settings.policy)
        held.finished = time.monotonic()
        self._runner.done.append(held)

    def _report_rejections(self, *, at_once: bool = False) -> None:
        """Log how many messages were rejected beside those that the log has."""
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

    def _wait_longer(self) -> None:
        longest = min(LONGEST_PAUSE, self._settings.lease / 6)  # so that what is held can still be renewed
        self._pause = min(longest, max(SHORTEST_PAUSE, self._pause * 2))
        self._resume_at = time.monotonic() + self._pause

    def _tell(self) -> None:
        """Log that the transport is away when that begins, and that it is back when nothing fails any more."""
        self._report_rejections()
        problem = self.trouble
        if problem is None:
            if self._told_away and not self._endings.suspects:
                self._told_away = False
                emit(logger, logging.INFO, "transport_back", held=len(self._held))
        elif not self._told_away:
            self._told_away = True
            ours = isinstance(problem, TransportError)
            emit(
                logger,
                logging.WARNING if ours else logging.ERROR,
                "transport_away",
                error_type=type(problem).__name__,
                error=error_text(problem) if ours else None,
                held=len(self._held),
            )
