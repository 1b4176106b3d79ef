"""The consumer: receive, run, settle.

Every call of the transport is made on the one thread that calls `run` or `drain` (loop.py); tasks run on `concurrency`
worker threads (runner.py), and a finished one wakes that thread. `run_tasks_here` turns that round: its caller runs the
tasks, and another thread calls the transport. So outcomes that pile up while it is busy are settled
in one batch, and a lone one at once, without timers. One renewal serves everything that is held.

What follows from an outcome is decided in continuation.py; when a transport is merely away, what is finished is kept
and settled when it is back; when it refuses a settlement for good, the fallbacks defined there are tried in order
(ending.py).
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
from unstract_core.transport import LONGEST_DELAY, Inspection, ReplyStatus, Transport
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
        status_payload: What the status of a success keeps for a day: "result", or "none" (status and error only).
            None (default): "none" if on_success carries the result, else "result". The answer to a blocking call
            always has its result, and so has the answer of a transport without statuses.
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
        _check_count("concurrency", concurrency)
        _check_count("max_attempts", max_attempts)
        _check_seconds("lease", lease)
        _check_seconds("backoff", backoff, zero=True)
        _check_seconds("backoff_max", backoff_max, zero=True)
        if prefetch is not None:
            _check_count("prefetch", prefetch)
            if never_rerun and prefetch != concurrency:
                raise ConfigurationError("with never_rerun nothing is prefetched: leave prefetch out")
            if prefetch < concurrency:
                raise ConfigurationError("prefetch counts running messages too: it must be at least the concurrency")
        if task_deadline is not None:
            _check_seconds("task_deadline", task_deadline)
        _check_choice("status_payload", status_payload, (None, "none", "result"))
        _check_choice("returned_failure", returned_failure, ("completed", "failed"))
        if never_rerun and not transport.capabilities.counts_crashes:
            raise NotSupported(
                "never_rerun needs a transport that counts the deliveries which nobody settled (counts_crashes): "
                "PostgreSQL, or RabbitMQ with quorum queues"
            )
        self.tasks = {name: runnable(name, task) for name, task in tasks.items()}
        if not self.tasks:
            raise ConfigurationError("no tasks are registered; a consumer without tasks would bury every message")
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
            allowed_continuations=_allowed(allow_continuations),
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
        """Work until `stop` is called or, on the main thread, SIGTERM or SIGINT comes.

        Then nothing more is received or started, what runs is finished and settled, what has not been started is given
        back. A second signal leaves at once with SystemExit, unless somebody else ends what takes too long; the leases
        bring the rest back. While the transport is away, what is finished cannot be settled: then `run` stays until it
        is back, or until the second signal. Raises what `subscribe` raises, and TransportClosed; later outages are
        waited out.
        """
        with _signals(self, leave_at_second=leave_at_second_signal), self._loop() as loop:
            while not loop.ended:
                loop.poll_once(LONGEST_WAIT)

    def run_tasks_here(self, *, ended: Callable[[], None]) -> None:
        """Work as `run` does, but run the tasks on the calling thread, and call the transport on another one.

        For the main thread of a process of its own: `signal.signal`, `asyncio.get_event_loop` and libraries that want
        the main thread work in tasks. A second signal means nothing. After each task its signal handlers and timers
        are undone: they would stop another one.
        Raises what `run` raises, and ConfigurationError for a `concurrency` above 1.

        Args:
            ended: Called on the other thread when the run has ended, by stopping or by an exception; the calling thread
                may be in a task that hangs, and then never returns.
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
        """Work until the queues are empty or `timeout` seconds have passed; return how many times a task was run.

        Empty means that nothing is ready, delayed or held by anyone, where the transport can tell (`inspection`). When
        the time is up nothing more is started, and what is running is finished and settled. Raises
        TransportUnavailable if that cannot be settled then; their leases bring those messages back.
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
        """Make `run` or `drain` finish what runs, settle it and return. For any thread, and for signal handlers."""
        self._stopping = True
        if (loop := self._running) is not None:
            loop.wake()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called and the run has not ended yet."""
        return self._stopping

    def reset_in_child(self) -> None:
        """Forget the run of the process that this one was forked from; called right after the fork."""
        self._running = None
        self._stopping = False

    def _drained(self, waited: float) -> bool:
        if not self.transport.capabilities.inspection:
            return waited > _DRAIN_PAUSE / 2  # else a finished task has cut it short, and nothing is known
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
    """Stop at signals; yield a function that undoes what a task has set for them. On other threads it does nothing."""
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


def _allowed(listed: Iterable[object] | None) -> frozenset[tuple[str, str | None]] | None:
    if listed is None:
        return None
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ConfigurationError(f'allow_continuations must be a list such as ["queue:task"], not {listed!r}')
    return frozenset(map(_allowed_one, listed))


def _allowed_one(entry: object) -> tuple[str, str | None]:
    queue, task_name = (None, None) if not isinstance(entry, tuple) or len(entry) != 2 else entry
    if isinstance(entry, str):
        queue, colon, name = entry.partition(":")
        task_name = name if colon else None
    if isinstance(queue, str) and queue and (task_name is None or (isinstance(task_name, str) and task_name)):
        return queue, task_name
    raise ConfigurationError(
        f'allow_continuations: {entry!r} lacks a queue or a task; write "queue", "queue:task" or ("queue", "task")'
    )


def _check_choice(name: str, choice: object, known: Sequence[str | None]) -> None:
    if choice not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, known))}, not {choice!r}")


def _check_count(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {count!r}")


def _check_seconds(name: str, seconds: object, *, zero: bool = False) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_DELAY or (seconds == 0 and not zero):
        kind = "number of seconds, not negative" if zero else "positive number of seconds"
        raise ConfigurationError(f"{name} must be a {kind}, {LONGEST_DELAY:g} at most; got {seconds!r}")
