"""The worker threads of a consumer: they run tasks and make settlements, and never touch the transport."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, cast

from unstract_core.continuation import (
    Ignored,
    Outcome,
    Raised,
    Rejected,
    RetryAsked,
    RetryPolicy,
    Returned,
    expiry,
    outcome_of,
    overdue,
    settle,
    with_headers,
)
from unstract_core.forking import end_child
from unstract_core.observability.log_events import emit, frames, stack_of
from unstract_core.observability.observer import End, Observers
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery, Settlement
from unstract_core.values import error_parts, error_text, type_name
from unstract_core.worker.context import delivering
from unstract_core.worker.in_flight import Held

logger = logging.getLogger("unstract_wire.worker")

_ODD_KEY = re.compile(r'\["(?:\\.|[^"\\])*"\]')
"""A key in a path that is no plain name, and so may be content: an address, a phrase of a document."""


class _Start(NamedTuple):
    """When a task was started, on the monotonic clock, and on which thread."""

    moment: float
    thread: int


class Here:
    """The thread that runs tasks in its own code, as the first of a runner's threads: a process's main thread.

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

    def work(self) -> None:
        """Run tasks until `end` is called."""
        while (serve := self._serve.get()) is not None:
            serve()

    def hand_over(self, serve: Callable[[], None]) -> None:
        self._serve.put(serve)

    def end(self) -> None:
        self._serve.put(None)


class Runner:
    """Runs deliveries on `concurrency` threads, first come first served, and collects what is to be settled.

    `counters` gets "ran", "replaced" and "overdue", `busy` the seconds in tasks; a task may run for `deadline` seconds;
    with `log_errors` the log has the messages of exceptions, too; once `stopping`, nothing more is started. The thread
    `here` takes the place of the first. `ring` is called when something was finished while the owner said that it is
    `asleep`.

    Guarantee: whatever a task, its result, its exception or a log handler does, its delivery ends in `done` and the
    thread lives on.
    """

    def __init__(
        self,
        tasks: Mapping[str, Callable[..., Any]],
        concurrency: int,
        policy: RetryPolicy,
        counters: Counter[str],
        stopping: Callable[[], bool],
        ring: Callable[[], None],
        observers: Observers,
        deadline: float = math.inf,
        *,
        log_errors: bool = False,
        here: Here | None = None,
    ) -> None:
        self.done: deque[Held] = deque()
        self.asleep = False
        self.busy = 0.0
        self._tasks = tasks
        self._concurrency = concurrency
        self._policy = policy
        self._counters = counters
        self._stopping = stopping
        self._ring = ring
        self._observers = observers
        self._deadline = deadline
        self._log_errors = log_errors
        self._here = here
        self._pid = os.getpid()
        self._started: dict[Held, _Start] = {}
        self._waiting: SimpleQueue[Held | None] = SimpleQueue()
        self._count = threading.Lock()
        self._threads = [self._thread(number) for number in range(1, concurrency + 1)]
        try:
            for thread in self._threads[here is not None :]:
                thread.start()
            if here is not None:
                here.hand_over(self._serve)
        except BaseException:  # no more threads to be had: those that run must not wait for ever
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """How many deliveries no thread has taken yet."""
        return self._waiting.qsize()

    @property
    def running(self) -> int:
        """How many deliveries a thread has taken and not finished."""
        return len(self._started)

    @property
    def started(self) -> list[float]:
        """When each task that runs now was started, on the monotonic clock."""
        return [start.moment for start in list(self._started.values())]

    @property
    def stuck_for(self) -> float:
        """For how many seconds every thread has been in the task that it runs now; 0 while one is free."""
        started = self.started
        return 0.0 if len(started) < self._concurrency else time.monotonic() - max(started)

    @property
    def overdue_at(self) -> float:
        """When the next running task is overdue, on the monotonic clock."""
        if self._deadline == math.inf:
            return math.inf
        return min(self.started, default=math.inf) + self._deadline

    def give_up_overdue(self) -> int:
        """Finish what has been running for longer than the deadline as failed; return how many.

        Their threads are left to themselves, because a thread cannot be stopped: `replace_threads` gives their places
        to others, and whoever owns the process should replace it.
        """
        if time.monotonic() < self.overdue_at:
            return 0
        given_up = 0
        for held, start in list(self._started.items()):
            seconds = time.monotonic() - start.moment
            if seconds < self._deadline or self._started.pop(held, None) is None:
                continue
            given_up += 1
            self._counters["overdue"] += 1
            fields = {"deadline": self._deadline, "traceback": stack_of(start.thread)}
            emit(logger, logging.ERROR, "task_overdue", **ids(held.delivery), **fields)
            late = overdue(self._deadline)
            self._observers.task_failed(held.delivery, "raised", late)
            self._observers.ran(held.delivery, "raised", type_name(late), seconds, 0)
            held.settlement = settle(held.delivery, outcome_of(late), self._policy_of(held.delivery))
            self.finish(held)
        return given_up

    def replace_threads(self, count: int) -> None:
        """Start as many threads as were given up; where no more are to be had, fewer work."""
        with contextlib.suppress(RuntimeError):
            for _ in range(count):
                replacement = self._thread(len(self._threads) + 1)
                replacement.start()
                self._threads.append(replacement)

    def submit(self, held: Held) -> None:
        self._waiting.put(held)

    def finish(self, held: Held) -> None:
        """Hand over what has a settlement, and wake the owner if it sleeps: appended first, so nothing is slept on."""
        held.finished = time.monotonic()
        self.done.append(held)
        if self.asleep:
            self.asleep = False
            self._ring()

    def withdraw(self) -> list[Held]:
        """Take back every delivery that no thread has started."""
        waiting: list[Held] = []
        try:
            while True:
                if (held := self._waiting.get_nowait()) is not None:
                    waiting.append(held)
        except Empty:
            return waiting

    def close(self) -> None:
        """Let the threads end after what they are running; does not wait for them."""
        self.withdraw()
        for _ in self._threads:
            self._waiting.put(None)

    def end_if_forked(self, delivery: Delivery | None = None, exc: BaseException | None = None) -> None:
        """End this process where it is a child that a task has forked, and that has come back from the task.

        The delivery belongs to the parent, which waits for the child, or for the task in the parent.

        Args:
            delivery: The delivery whose task has forked, for the log.
            exc: The exception by which the child left the task; None where the task returned.
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
        while (held := self._waiting.get()) is not None:
            if self._stopping():
                held.give_back("the worker stops")
            elif held.until <= time.monotonic():
                held.give_back("its lease was over before it was started")
            elif (late := expiry(held.delivery)) is not None:  # it may have waited here for long
                self._observers.rejected(held.delivery, late.error_type)
                held.settlement = settle(held.delivery, late, self._policy_of(held.delivery))
            elif (settlement := self._run(held)) is not None:
                held.settlement = settlement
            else:
                return  # it was given up, and another thread has this one's place
            self.finish(held)

    def _run(self, held: Held) -> Settlement | None:
        """Run a task and return what follows; None where that was decided meanwhile."""
        delivery = held.delivery
        self._started[held] = _Start(time.monotonic(), threading.get_ident())
        headers = None
        try:
            with self._observers.running(delivery) if self._observers else contextlib.nullcontext() as headers:
                outcome = self._outcome(held)
        except BaseException as exc:  # no rule of ours may cost a message or a thread
            outcome = Raised(*error_parts(exc))
        self.end_if_forked()
        if self._here is not None and self._here.is_current:
            self._here.after_task()
        if self._started.pop(held, None) is None:
            return None
        settlement = settle(delivery, outcome, self._policy_of(delivery))
        return settlement if headers is None else with_headers(settlement, headers)

    def _outcome(self, held: Held) -> Outcome:
        delivery = held.delivery
        started = time.monotonic()
        error_type = None
        try:
            outcome: Outcome = Returned.of(self._call(delivery))
        except BaseException as exc:  # a task may call sys.exit; its thread has others to run
            outcome = outcome_of(exc, self._task_of(delivery))
            error_type = type_name(exc)
            self._log_raised(delivery, exc, outcome, time.monotonic() - started)
            if self._observers and held in self._started:
                self._observers.task_failed(delivery, self._end(delivery, outcome), exc)
        seconds = time.monotonic() - started
        replaced = outcome.replaced if isinstance(outcome, Returned) else ()
        with self._count:
            self._counters["ran"] += 1
            self.busy += seconds
            self._counters["replaced"] += len(replaced)
        if replaced:
            paths = ", ".join(_ODD_KEY.sub('["*"]', path) for path in replaced)
            emit(logger, logging.WARNING, "result_made_to_fit", **ids(delivery), count=len(replaced), paths=paths)
        if self._observers and held in self._started:  # else it was given up, and that was told
            self._observers.ran(delivery, self._end(delivery, outcome), error_type, seconds, len(replaced))
        return outcome

    def _thread(self, number: int) -> threading.Thread:
        return threading.Thread(target=self._serve, name=f"unstract-wire-task-{number}", daemon=True)

    def _task_of(self, delivery: Delivery) -> Callable[..., Any]:
        if delivery.payload is None:
            raise RuntimeError("a malformed message was submitted to be run")
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
