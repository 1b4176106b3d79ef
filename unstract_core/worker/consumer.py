"""The consumer: it receives messages, runs their tasks and settles them.

    I/O thread                              task threads (`concurrency` of them)
    receive --> in_flight --> submit -----> run the task, choose the settlement
    settle <--- in_flight <--- finish <---- (outcomes.py, continuation.py)

The thread that calls `run` or `drain` is the I/O thread: it alone calls the transport (loop.py). Tasks run on task
threads (task_threads.py), and a finished task wakes the I/O thread. So a single finished task is settled at once, and
tasks that finish while the I/O thread is busy are settled in one batch. `run_tasks_here` exchanges the roles: its
caller runs the tasks, and another thread calls the transport.

While a transport is unavailable, finished tasks stay in flight and are settled later. If a transport refuses a
settlement for good, the fallbacks of continuation.py are tried in order (settler.py).
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from unstract_core.clock import SYSTEM_CLOCK, Clock
from unstract_core.errors import ConfigurationError, NotSupported, TransportError, TransportUnavailable
from unstract_core.forking import Stopped, handling, keeping_signals, reset_in_child
from unstract_core.observability.observer import Observer, Observers
from unstract_core.outcomes import RetryPolicy, StatusPayload
from unstract_core.transport import Inspection, ReplyStatus, Transport
from unstract_core.worker.checks import allowed_continuations, check_choice, check_count, check_seconds
from unstract_core.worker.loop import LONGEST_WAIT, Loop, LoopConfig
from unstract_core.worker.registry import runnable
from unstract_core.worker.task_threads import CallingThread

_DRAIN_PAUSE = 0.2


class Consumer:
    """Runs the tasks of some queues.

    Args:
        transport: Where the messages come from. The consumer does not close it.
        tasks: The functions by task name: `Tasks`, or any mapping.
        queues: The queues to receive from, together, higher priority first.
        concurrency: How many tasks run at once, on threads. Default: 1.
        lease: Seconds for which a message belongs to this consumer without a renewal, and so the time after which
            another worker gets the messages of a dead one. A consumer renews every third of it. Default: 60.
        max_attempts: How many deliveries a task may have that raises and has no waiting sender. Default: 5.
        backoff: Seconds before the first retry; each further retry waits twice as long. Default: 1.
        backoff_max: The longest wait before a retry, in seconds. Default: 300.
        prefetch: How many messages are in flight at once, running ones included. None (default): the number adapts,
            and messages that wait behind long tasks are released.
        task_deadline: Seconds that a task may run. After that it counts as failed with `DeadlineExceeded`, and another
            thread takes the place of its own, which Python cannot stop. None (default): no limit.
        never_rerun: Whether a task starts at most once: it is not retried, and a message that a lost worker had taken
            fails with `WorkerLost`. The consumer then takes one message for each free thread. Default: False.
        observers: Observers of sends, runs and settlements. Default: none.
        log_errors: Whether the log has the message of an exception, which may quote the payload. Default: False; the
            log has the type and the traceback's places in either case.
        status_payload: The content of a success's status, which is kept for a day: "result", or "none" (status and
            error only). None (default): "none" if on_success carries the result, else "result". The answer to a
            blocking call always has its result, and so has the answer of a transport without statuses.
        returned_failure: The status of a task that returned `"success": false`: "completed" (default), or "failed" with
            the text under its key `error`. Its on_success is sent in both cases.
        allow_continuations: The callbacks that messages may ask for, each as ("queue", "task"), as ("queue", None) for
            every task of that queue, or as the text "queue:task" or "queue". A message that names another one is not
            run and fails with `ContinuationNotAllowed`. None (default): all.
        clock: The clock for waits, deadlines and expiry. Default: the clock of the machine; tests give a virtual one.

    Attributes:
        counters: Counts ran, replaced, settled, retried, buried, given_back, lost, refused and overdue.

    Raises:
        ConfigurationError: A setting cannot work.
        NotSupported: `never_rerun` over a transport that does not count the deliveries of lost workers.

    Guarantee: at least once. Each message is run, continued and answered by the table of continuation.py. A task or a
    message can neither end the consumer nor lose another message. With `never_rerun`: at most one start.
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
        task_deadline: float | None = None,
        never_rerun: bool = False,
        observers: Sequence[Observer] = (),
        log_errors: bool = False,
        status_payload: StatusPayload | None = None,
        returned_failure: ReplyStatus = "completed",
        allow_continuations: Iterable[str | tuple[str, str | None]] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if isinstance(queues, str) or not queues or not all(isinstance(queue, str) and queue for queue in queues):
            raise ConfigurationError("queues must be a list of one or more non-empty names")
        if not isinstance(tasks, Mapping):
            raise ConfigurationError(f"tasks must be a mapping of names to functions, not a {type(tasks).__name__}")
        check_count("concurrency", concurrency)
        check_count("max_attempts", max_attempts)
        check_seconds("lease", lease)
        check_seconds("backoff", backoff, zero=True)
        check_seconds("backoff_max", backoff_max, zero=True)
        if prefetch is not None:
            check_count("prefetch", prefetch)
            if never_rerun and prefetch != concurrency:
                raise ConfigurationError("never_rerun allows no prefetch: leave prefetch out")
            if prefetch < concurrency:
                raise ConfigurationError("prefetch counts running messages: it must be at least the concurrency")
        if task_deadline is not None:
            check_seconds("task_deadline", task_deadline)
        check_choice("status_payload", status_payload, (None, "none", "result"))
        check_choice("returned_failure", returned_failure, ("completed", "failed"))
        if never_rerun and not transport.capabilities.counts_crashes:
            raise NotSupported(
                "never_rerun needs a transport that counts unsettled deliveries (counts_crashes); "
                "use PostgreSQL, or RabbitMQ with quorum queues"
            )
        self.tasks = {name: runnable(name, task) for name, task in tasks.items()}
        if not self.tasks:
            raise ConfigurationError(
                "no tasks are registered: a consumer without tasks would dead-letter every message"
            )
        self.transport = transport
        self.queues = list(dict.fromkeys(queues))
        self.concurrency = concurrency
        self.lease = lease
        keeps_statuses = transport.capabilities.status  # else what looks like a status is the answer to a client
        self.policy = RetryPolicy(
            max_attempts,
            backoff,
            backoff_max,
            never_rerun=never_rerun,
            status_payload=status_payload if keeps_statuses else "result",
            returned_failure=returned_failure if keeps_statuses else "completed",
            allowed_continuations=allowed_continuations(allow_continuations),
        )
        self.prefetch = concurrency if never_rerun else prefetch
        self.task_deadline = math.inf if task_deadline is None else task_deadline
        self.observers = Observers(observers)
        self.log_errors = log_errors
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._stopping = False
        self._running: Loop | None = None
        reset_in_child(self)

    def run(self, *, leave_at_second_signal: bool = True) -> None:
        """Run tasks until `stop` is called or, on the main thread, the process gets SIGTERM or SIGINT.

        The run then stops: it receives no message and starts no task, releases the messages that have not started, and
        finishes and settles the running tasks. While the transport is unavailable they cannot be settled, so `run`
        returns only when it is available again.

        Args:
            leave_at_second_signal: Whether a second signal raises SystemExit at once; leases then bring the unsettled
                messages back. Default: True. False is for a process that another one kills if it takes too long.

        Raises:
            TransportError: `subscribe` failed. Later outages are waited out.
            TransportClosed: The transport was closed during the run.
            ConfigurationError: This consumer runs already.
        """
        with _signals(self, leave_at_second=leave_at_second_signal), self._loop() as loop:
            while not loop.ended:
                loop.poll_once(LONGEST_WAIT)

    def run_tasks_here(self, *, ended: Callable[[], None]) -> None:
        """Run as `run` does, but with the tasks on the calling thread and the transport on another one.

        It is for the main thread of a process of its own. Tasks may then use `signal.signal`, `asyncio.get_event_loop`
        and libraries that need the main thread. After each task its signal handlers and timers are removed, because
        they would disturb the next task. A second signal has no effect.

        Args:
            ended: Called on the other thread when the run has ended, by stopping or by an exception. The calling thread
                may still be in a task that hangs; then this method never returns.

        Raises:
            ConfigurationError: `concurrency` is above 1, or this consumer runs already.
            TransportError: As `run` does.
        """
        if self.concurrency != 1:
            raise ConfigurationError(
                f"one thread runs one task at a time: concurrency must be 1, not {self.concurrency}"
            )
        failures: list[BaseException] = []

        def work(here: CallingThread) -> None:
            try:
                with self._loop(here) as loop:
                    while not loop.ended:
                        loop.poll_once(LONGEST_WAIT)
            except BaseException as exc:
                failures.append(exc)
            finally:
                here.end()
                ended()

        with _signals(self, leave_at_second=False):
            here = CallingThread(keeping_signals())
            thread = threading.Thread(target=work, args=[here], name="unstract-wire-io", daemon=True)
            thread.start()
            here.run_tasks()
        if failures:
            raise failures[0]

    def drain(self, *, timeout: float | None = None) -> int:
        """Run tasks until the queues are empty.

        A queue is empty if no message is ready, delayed or in flight at any consumer. A transport without `inspection`
        cannot report that; then it is enough that no message comes for a moment.

        Args:
            timeout: Seconds after which no further task starts; running tasks are finished and settled. None (default):
                no limit.

        Returns:
            How many times a task was run.

        Raises:
            TransportUnavailable: The time is up, and finished tasks could not be settled. Leases bring their messages
                back.
        """
        deadline = math.inf if timeout is None else self._clock.monotonic() + timeout
        look = 0.0 if self.transport.capabilities.inspection else _DRAIN_PAUSE
        before = self.counters["ran"]
        with self._loop() as loop:
            idle_wait = look
            while not loop.ended:
                received = loop.poll_once(idle_wait, math.inf if self._stopping else deadline)
                idle_wait = look
                if self._clock.monotonic() >= deadline:
                    self._stopping = True
                    if loop.blocked_by is not None and loop.in_flight and not loop.unfinished:
                        raise TransportUnavailable(
                            f"drain: the time is up, and {loop.in_flight} messages could not be settled"
                        ) from loop.blocked_by
                elif received == 0 and not loop.in_flight:
                    if self._drained(loop.waited):
                        break
                    idle_wait = _DRAIN_PAUSE
        return self.counters["ran"] - before

    def stop(self) -> None:
        """Make `run` or `drain` finish and settle the running tasks, and return. For any thread and signal handler."""
        self._stopping = True
        if (loop := self._running) is not None:
            loop.wake()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called and the run has not ended yet."""
        return self._stopping

    def reset_in_child(self) -> None:
        """Forget the run of the parent process; called right after a fork."""
        self._running = None
        self._stopping = False

    def _drained(self, waited: float) -> bool:
        if not self.transport.capabilities.inspection:
            return waited > _DRAIN_PAUSE / 2  # a shorter wait was ended by a finished task
        try:
            states = cast(Inspection, self.transport).queues(self.queues)
        except TransportError:
            return False
        return not any(state.ready or state.in_flight or state.delayed or state.estimated for state in states)

    @contextlib.contextmanager
    def _loop(self, calling_thread: CallingThread | None = None) -> Iterator[Loop]:
        config = LoopConfig(
            self.tasks,
            self.concurrency,
            self.lease,
            self.policy,
            self.prefetch,
            self.counters,
            lambda: self._stopping,
            self.observers,
            self._clock,
            self.task_deadline,
            self.log_errors,
            calling_thread,
        )
        if self._running is not None:
            raise ConfigurationError("this consumer runs already; make another one to run beside it")
        subscription = self.transport.subscribe(self.queues, lease=self.lease)
        try:
            loop = self._running = Loop(config, subscription)
            try:
                yield loop
            finally:
                loop.close()
        finally:
            subscription.close()
            self._running = None
            self._stopping = False


@contextlib.contextmanager
def _signals(consumer: Consumer, *, leave_at_second: bool) -> Iterator[Callable[[], None]]:
    """Stop the consumer at signals, on the main thread; yield a function that removes a task's signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked and leave_at_second:
            raise Stopped(128 + number)
        asked = True
        consumer.stop()

    with handling((signal.SIGTERM, signal.SIGINT), handle) as install:
        yield install
