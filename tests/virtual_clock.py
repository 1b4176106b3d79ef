"""A clock whose time passes without waiting: leases, delays and back-off of hours take milliseconds.

    clock = VirtualClock()
    transport = MemoryTransport(clock=clock)
    consumer = clock.consumer(transport, {"t": lambda: clock.sleep(90)}, ["q"], lease=60)
    with clock.running(consumer):
        clock.wait_until(lambda: consumer.counters["settled"] == 1)

The threads are real: the test, the consumers' I/O threads and their task threads. Time stands still while one of them
works, and moves straight to the first moment that one of them waits for as soon as all of them wait in the clock. So
the result of a test does not depend on the speed of the machine.

A thread waits in the clock in `sleep`, `wait` (the memory transport's waiting calls) or `wait_until`. Any other wait of
the test or of a task, such as `Event.wait`, counts as work: wait with `wait_until(event.is_set)` instead.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import consumers

from unstract_core import Consumer, Transport

_POLL = 0.0005
"""Real seconds after which a thread looks again whether time may move, or has moved."""
_LONGEST = 60.0
"""Real seconds after which `wait_until` fails."""


@attrs.define(eq=False)
class _Wait:
    """One thread's wait in the clock.

    Attributes:
        until: The moment of its end; infinite if only `is_over` or a notification ends it.
        is_over: Whether it ends now, for another reason than the time.
        condition: The condition that it waits for; None in a sleep.
        notified: Whether the condition was notified. Its thread may not have noticed.
    """

    until: float
    is_over: Callable[[], object] = lambda: False
    condition: threading.Condition | None = None
    notified: bool = False


class VirtualClock:
    """The time of one test, which made it on its own thread. Implements `unstract_core.clock.Clock`."""

    def __init__(self) -> None:
        self._seconds = 1000.0
        self._epoch = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=self._seconds)
        self._moving = threading.Lock()
        self._test = threading.current_thread()
        self._io_threads: dict[Consumer, threading.Thread] = {}
        self._waits: dict[int, _Wait] = {}
        self._actions: list[tuple[float, Callable[[], object]]] = []
        self._conditions: set[threading.Condition] = set()

    # The protocol `Clock`.

    def monotonic(self) -> float:
        return self._seconds

    def now(self) -> datetime.datetime:
        return self._epoch + datetime.timedelta(seconds=self._seconds)

    def sleep(self, seconds: float) -> None:
        wait = _Wait(self._seconds + max(0.0, seconds))
        with self._waiting(wait):
            while not self._is_over(wait):
                time.sleep(_POLL)

    def wait(self, condition: threading.Condition, timeout: float) -> None:
        self._record_notifications(condition)
        wait = _Wait(self._seconds + max(0.0, timeout), condition=condition)
        with self._waiting(wait):
            while not self._is_over(wait):
                condition.wait(_POLL)

    # For tests.

    def consumer(
        self, transport: Transport, tasks: Mapping[str, Callable[..., Any]], queues: Sequence[str], **settings: Any
    ) -> Consumer:
        """Return a consumer on this clock. Run it with `running`, or with `drain` on the thread of the test."""
        consumer = Consumer(transport, tasks, queues, clock=self, **settings)
        self._io_threads[consumer] = self._test
        return consumer

    @contextlib.contextmanager
    def running(self, *running: Consumer, ends: bool = False) -> Iterator[None]:
        """Run consumers as `consumers.running` does. Until they have ended, time moves while the test waits."""
        with contextlib.ExitStack() as stack, consumers.running(*running, ends=ends) as threads:
            self._io_threads |= dict(zip(running, threads, strict=True))
            try:
                yield
            finally:
                for consumer in running:
                    consumer.stop()
                stack.enter_context(self._waiting(_Wait(math.inf)))

    def wait_until(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """Return at the first moment at which `condition` holds. Time does not move on from that moment."""
        with self._waiting(_Wait(math.inf, condition)):
            give_up_at = time.monotonic() + _LONGEST
            while not condition():
                assert time.monotonic() < give_up_at, f"not within {_LONGEST:g} real seconds: {what}"
                self._move()
                time.sleep(_POLL)

    def call_at(self, moment: float, action: Callable[[], object]) -> None:
        """Call `action` when the time reaches `moment`, on one of the waiting threads."""
        self._actions.append((moment, action))

    def advance(self, seconds: float) -> None:
        """Move the time on, whether or not anything waits."""
        self._seconds += max(0.0, seconds)

    @contextlib.contextmanager
    def _waiting(self, wait: _Wait) -> Iterator[None]:
        self._waits[threading.get_ident()] = wait
        try:
            yield
        finally:
            del self._waits[threading.get_ident()]

    def _is_over(self, wait: _Wait) -> bool:
        self._move()
        return self._is_due(wait)

    def _is_due(self, wait: _Wait) -> bool:
        return wait.notified or wait.until <= self._seconds or bool(wait.is_over())

    def _record_notifications(self, condition: threading.Condition) -> None:
        """Make the notifications of a condition visible to the clock, before the threads notice them."""
        if condition in self._conditions:
            return
        self._conditions.add(condition)
        notify = condition.notify

        def notify_and_record(n: int = 1) -> None:
            for wait in list(self._waits.values()):
                wait.notified = wait.notified or wait.condition is condition
            notify(n)

        condition.notify = notify_and_record  # type: ignore[method-assign]

    def _move(self) -> None:
        """Move the time on to the end of the first wait, if every thread waits."""
        if not self._moving.acquire(blocking=False):
            return  # another thread does it, and may need a lock of this one to ask whether a wait is over
        try:
            waits = list(self._waits.values())
            if any(map(self._is_due, waits)) or self._is_work_left():
                return
            moments = [wait.until for wait in waits] + [moment for moment, _ in self._actions]
            if (moment := min(moments, default=math.inf)) < math.inf:
                self._seconds = max(self._seconds, moment)
                self._act()
        finally:
            self._moving.release()

    def _act(self) -> None:
        due = [action for moment, action in self._actions if moment <= self._seconds]
        self._actions = [(moment, action) for moment, action in self._actions if moment > self._seconds]
        for action in due:
            action()

    def _is_work_left(self) -> bool:
        threads = [self._test, *self._io_threads.values()]
        if any(thread.is_alive() and thread.ident not in self._waits for thread in threads):
            return True
        return any(self._is_working(consumer, thread) for consumer, thread in self._io_threads.items())

    def _is_working(self, consumer: Consumer, io_thread: threading.Thread) -> bool:
        """Whether a task thread works, has a task to start, or has finished one that the I/O thread does not know."""
        if (loop := consumer._running) is None:
            return False
        in_flight = loop._in_flight
        io_wait = self._waits.get(io_thread.ident or 0)
        if in_flight.finished and io_wait is not None and io_wait.condition is not None:
            return True
        waiting = sum(start.thread in self._waits for _, start in in_flight.runs())
        return waiting < min(in_flight.unfinished, consumer.concurrency)
