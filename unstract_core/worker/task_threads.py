"""The task threads of a consumer: they run tasks and make settlements, and never call the transport."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, cast

from unstract_core.clock import Clock
from unstract_core.continuation import expiry, settle, with_headers
from unstract_core.forking import end_child
from unstract_core.observability.log_events import emit, frames, stack_of
from unstract_core.observability.observer import End, Observers, TaskFinished
from unstract_core.outcomes import (
    Ignored,
    Outcome,
    Raised,
    Rejected,
    RetryAsked,
    RetryPolicy,
    Returned,
    outcome_of,
    overdue,
)
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery, Settlement
from unstract_core.values import error_parts, error_text, type_name
from unstract_core.worker.context import delivering
from unstract_core.worker.in_flight import Entry, InFlight

logger = logging.getLogger("unstract_wire.worker")

_ODD_KEY = re.compile(r'\["(?:\\.|[^"\\])*"\]')
"""A key in a JSON path that is not a plain name. It may be content, so the log does not have it."""


class CallingThread:
    """The thread that made it, as the first task thread: the main thread of a process, which libraries may need.

    Args:
        after_task: Called on that thread after each task.
    """

    def __init__(self, after_task: Callable[[], None]) -> None:
        self.after_task = after_task
        self._serve: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ident = threading.get_ident()

    @property
    def is_current(self) -> bool:
        return threading.get_ident() == self._ident

    def run_tasks(self) -> None:
        """Run tasks until `end` is called."""
        while (serve := self._serve.get()) is not None:
            serve()

    def hand_over(self, serve: Callable[[], None]) -> None:
        self._serve.put(serve)

    def end(self) -> None:
        self._serve.put(None)


class TaskThreads:
    """Runs deliveries on threads, first in, first out, and finishes each with its settlement.

    Args:
        tasks: The functions by task name.
        concurrency: How many tasks run at once.
        policy: The consumer's policy.
        in_flight: The deliveries; a thread starts and finishes them.
        counters: Counts ran, replaced and overdue.
        stopping: Whether the consumer stops; then no further task starts.
        observers: Learn of each run.
        clock: The consumer's clock.
        deadline: Seconds that a task may run; infinite (default) for no limit.
        log_errors: Whether the log has the messages of exceptions. They may quote the payload.
        calling_thread: Takes the place of the first thread; None (default) for threads alone.

    Guarantee: a task, its result, its exception or a log handler can neither end a thread nor lose a delivery: each
    delivery is finished.
    """

    def __init__(
        self,
        tasks: Mapping[str, Callable[..., Any]],
        concurrency: int,
        policy: RetryPolicy,
        in_flight: InFlight,
        counters: Counter[str],
        stopping: Callable[[], bool],
        observers: Observers,
        clock: Clock,
        deadline: float = math.inf,
        *,
        log_errors: bool = False,
        calling_thread: CallingThread | None = None,
    ) -> None:
        self.busy_seconds = 0.0
        """Seconds in tasks that have ended, added up over the threads."""
        self._tasks = tasks
        self._concurrency = concurrency
        self._policy = policy
        self._in_flight = in_flight
        self._counters = counters
        self._stopping = stopping
        self._observers = observers
        self._clock = clock
        self._deadline = deadline
        self._log_errors = log_errors
        self._calling_thread = calling_thread
        self._pid = os.getpid()
        self._waiting: SimpleQueue[Entry | None] = SimpleQueue()
        self._counting = threading.Lock()
        self._threads = [self._thread(number) for number in range(1, concurrency + 1)]
        try:
            for thread in self._threads[calling_thread is not None :]:
                thread.start()
            if calling_thread is not None:
                calling_thread.hand_over(self._serve)
        except BaseException:  # the process cannot have more threads: those that run must not wait for ever
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """How many deliveries no thread has started."""
        return self._waiting.qsize()

    @property
    def blocked_for(self) -> float:
        """Seconds for which every thread has been in the task that it runs now; 0 while a thread is free."""
        starts = self._in_flight.starts
        return 0.0 if len(starts) < self._concurrency else self._clock.monotonic() - max(starts)

    @property
    def overdue_at(self) -> float:
        """When the next running task exceeds its deadline, on the consumer's clock."""
        if self._deadline == math.inf:
            return math.inf
        return min(self._in_flight.starts, default=math.inf) + self._deadline

    def give_up_overdue(self) -> int:
        """Finish as failed each task that has exceeded its deadline; return how many there were.

        Python cannot stop a thread, so the threads of these tasks go on. `replace_threads` starts others in their
        place, and the owner of the process should replace the process.
        """
        now = self._clock.monotonic()
        if now < self.overdue_at:
            return 0
        given_up = 0
        for entry, start in self._in_flight.runs():
            if now < start.moment + self._deadline or not self._in_flight.end_run(entry):
                continue
            seconds = now - start.moment
            given_up += 1
            self._counters["overdue"] += 1
            delivery = entry.delivery
            fields = {"deadline": self._deadline, "traceback": stack_of(start.thread)}
            emit(logger, logging.ERROR, "task_overdue", **ids(delivery), **fields)
            late = overdue(self._deadline)
            self._observers.task_failed(delivery, "raised", late)
            self._observers.on_task_finished(TaskFinished(delivery, "raised", type_name(late), seconds, 0))
            self._in_flight.finish(entry, settle(delivery, outcome_of(late), self._policy_of(delivery)))
        return given_up

    def replace_threads(self, count: int) -> None:
        """Start `count` more threads. Where the process cannot have more, fewer tasks run at once."""
        with contextlib.suppress(RuntimeError):
            for _ in range(count):
                replacement = self._thread(len(self._threads) + 1)
                replacement.start()
                self._threads.append(replacement)

    def submit(self, entry: Entry) -> None:
        """Let the next free thread run a delivery."""
        self._waiting.put(entry)

    def withdraw(self) -> list[Entry]:
        """Take back every delivery that no thread has started."""
        waiting: list[Entry] = []
        try:
            while True:
                if (entry := self._waiting.get_nowait()) is not None:
                    waiting.append(entry)
        except Empty:
            return waiting

    def close(self) -> None:
        """Let each thread end after its task; does not wait for them."""
        self.withdraw()
        for _ in self._threads:
            self._waiting.put(None)

    def end_if_forked(self, delivery: Delivery | None = None, exc: BaseException | None = None) -> None:
        """End this process if a task has forked it, and it has come back from the task.

        The delivery belongs to the parent, which waits for the child or goes on with the task.

        Args:
            delivery: The delivery whose task has forked, for the log; None (default) if unknown.
            exc: The exception with which the child left the task; None (default) if the task returned.
        """
        if os.getpid() == self._pid:
            return
        if isinstance(exc, SystemExit):
            end_child(exc.code)
        code = 0 if exc is None else 1
        emit(
            logger,
            logging.WARNING,
            "forked_child_ended",
            **({} if delivery is None else ids(delivery)),
            pid=os.getpid(),
            exit=code,
            error_type=None if exc is None else type_name(exc),
            where=None if exc is None else _where(exc.__traceback__),
        )
        end_child(code)

    def _serve(self) -> None:
        while (entry := self._waiting.get()) is not None:
            if self._stopping():
                self._in_flight.release(entry, "the worker stops")
            elif entry.startable_until <= self._clock.monotonic():
                self._in_flight.release(entry, "its lease was over before it was started")
            elif (late := expiry(entry.delivery, self._clock.now())) is not None:  # it may have waited here
                self._observers.rejected(entry.delivery, late.error_type)
                self._in_flight.finish(entry, settle(entry.delivery, late, self._policy_of(entry.delivery)))
            elif (settlement := self._run(entry)) is not None:
                self._in_flight.finish(entry, settlement)
            else:
                return  # the task was given up, and another thread has this one's place

    def _run(self, entry: Entry) -> Settlement | None:
        """Run a task and return its settlement; None if the I/O thread gave it up meanwhile."""
        delivery = entry.delivery
        self._in_flight.start_run(entry)
        headers = None
        try:
            with self._observers.running(delivery) if self._observers else contextlib.nullcontext() as headers:
                outcome = self._outcome(entry)
        except BaseException as exc:  # an error of this package may cost neither a message nor a thread
            outcome = Raised(*error_parts(exc))
        self.end_if_forked()
        if self._calling_thread is not None and self._calling_thread.is_current:
            self._calling_thread.after_task()
        if not self._in_flight.end_run(entry):
            return None
        settlement = settle(delivery, outcome, self._policy_of(delivery))
        return settlement if headers is None else with_headers(settlement, headers)

    def _outcome(self, entry: Entry) -> Outcome:
        delivery = entry.delivery
        started = self._clock.monotonic()
        error_type = None
        try:
            outcome: Outcome = Returned.of(self._call(delivery))
        except BaseException as exc:  # a task may call sys.exit; its thread has other tasks to run
            outcome = outcome_of(exc)
            error_type = type_name(exc)
            self._log_raised(delivery, exc, outcome, self._clock.monotonic() - started)
            if self._observers and self._in_flight.is_running(entry):
                self._observers.task_failed(delivery, self._end(delivery, outcome), exc)
        seconds = self._clock.monotonic() - started
        replaced = outcome.replaced if isinstance(outcome, Returned) else ()
        with self._counting:
            self._counters["ran"] += 1
            self.busy_seconds += seconds
            self._counters["replaced"] += len(replaced)
        if replaced:
            paths = ", ".join(_ODD_KEY.sub('["*"]', path) for path in replaced)
            emit(logger, logging.WARNING, "result_made_to_fit", **ids(delivery), count=len(replaced), paths=paths)
        if self._observers and self._in_flight.is_running(entry):  # else observers have its end already
            end = self._end(delivery, outcome)
            self._observers.on_task_finished(TaskFinished(delivery, end, error_type, seconds, len(replaced)))
        return outcome

    def _thread(self, number: int) -> threading.Thread:
        return threading.Thread(target=self._serve, name=f"unstract-wire-task-{number}", daemon=True)

    def _task_of(self, delivery: Delivery) -> Callable[..., Any]:
        if delivery.payload is None:
            raise RuntimeError("a malformed message was submitted to a task thread")
        return self._tasks[delivery.payload.task_name]

    def _policy_of(self, delivery: Delivery) -> RetryPolicy:
        return self._policy.of(self._task_of(delivery))

    def _call(self, delivery: Delivery) -> object:
        task, payload = self._task_of(delivery), cast(TaskPayload, delivery.payload)
        with delivering(delivery):
            try:
                result = task(*payload.args, **payload.kwargs)
            except BaseException as exc:
                self.end_if_forked(delivery, exc)
                raise
            self.end_if_forked(delivery)
            return result

    def _log_raised(self, delivery: Delivery, exc: BaseException, outcome: Outcome, seconds: float) -> None:
        asked = self._end(delivery, outcome) == "retry_asked"
        emit(
            logger,
            logging.INFO if asked else logging.WARNING,
            "task_retry_asked" if asked else "task_raised",
            **ids(delivery),
            error_type=type_name(exc),
            **_place(self._task_of(delivery), exc),
            seconds=round(seconds, 3),
            **({"error": error_text(exc)} if self._log_errors else {}),
        )

    def _end(self, delivery: Delivery, outcome: Outcome) -> End:
        match outcome:
            case Returned():
                return "returned"
            case RetryAsked() if delivery.attempt < self._policy_of(delivery).most_attempts:
                return "retry_asked"
            case Raised() | RetryAsked():
                return "raised"
            case Rejected():
                return "rejected"
            case Ignored():
                return "ignored"


def ids(delivery: Delivery) -> dict[str, object]:
    """Return the fields that name a delivery in a log event."""
    payload = delivery.payload
    return {
        "queue": delivery.queue,
        "id": delivery.id,
        "attempt": delivery.attempt,
        "task": payload.task_name if payload is not None else None,
        "task_id": payload.task_id if payload is not None else None,
    }


def _place(task: Callable[..., Any], exc: BaseException) -> dict[str, object]:
    """Return the fields that say where a task failed; where it could not even be called, which function that is."""
    where = _where(exc.__traceback__)
    code = getattr(inspect.unwrap(getattr(task, "task", task)), "__code__", None)
    if code is not None and where is not None and where.startswith(f"{__file__}:"):
        where = f"{code.co_filename}:{code.co_firstlineno}"
        return {"where": where, "traceback": f"{where} {code.co_name}: called with other arguments than it takes"}
    return {"where": where, "traceback": frames(exc)}


def _where(frame: TracebackType | None) -> str | None:
    if frame is None:
        return None
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
