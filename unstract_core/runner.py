"""The worker threads of a consumer: they run tasks and make settlements, and never touch the transport."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from unstract_core.continuation import Outcome, Raised, RetryAsked, RetryPolicy, Returned, settle
from unstract_core.events import emit
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery, Settlement, Verdict

logger = logging.getLogger(__name__)


class Runner:
    """Runs deliveries on `concurrency` threads, first come first served, and collects what is to be settled.

    `ring` is called when something was finished while the owner said that it is `asleep`.
    """

    def __init__(
        self, tasks: Mapping[str, Callable[..., Any]], concurrency: int, policy: RetryPolicy, ring: Callable[[], None]
    ) -> None:
        self.done: deque[Settlement] = deque()
        self.asleep = False
        self.ran = 0
        self.replaced = 0
        self._tasks = tasks
        self._policy = policy
        self._ring = ring
        self._waiting: SimpleQueue[Delivery | None] = SimpleQueue()
        self._withdrawn: set[tuple[str, int]] = set()
        self._count = threading.Lock()
        self._threads = [
            threading.Thread(target=self._serve, name=f"unstract-wire-task-{number}", daemon=True)
            for number in range(1, concurrency + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, delivery: Delivery) -> None:
        self._waiting.put(delivery)

    def finish(self, settlement: Settlement) -> None:
        """Hand over a settlement; wakes the owner if it sleeps. Append before the check: nothing may be slept on."""
        self.done.append(settlement)
        if self.asleep:
            self.asleep = False
            self._ring()

    def withdraw(self, delivery: Delivery) -> None:
        """Do not start this delivery any more; one that runs already is left alone."""
        self._withdrawn.add((delivery.id, delivery.attempt))

    def withdraw_all(self) -> list[Delivery]:
        """Take back every delivery that no thread has started."""
        waiting: list[Delivery] = []
        try:
            while True:
                if (delivery := self._waiting.get_nowait()) is not None:
                    waiting.append(delivery)
        except Empty:
            return waiting

    def close(self) -> None:
        """Let the threads end after what they are running; does not wait for them."""
        for _ in self._threads:
            self._waiting.put(None)

    def _serve(self) -> None:
        while (delivery := self._waiting.get()) is not None:
            if self._withdrawn and (delivery.id, delivery.attempt) in self._withdrawn:
                self._withdrawn.discard((delivery.id, delivery.attempt))
                self.finish(Settlement(delivery, Verdict.RETRY, reason="withdrawn: its lease was lost"))
                continue
            outcome = self._outcome(delivery)
            self.finish(settle(delivery, outcome, self._policy))

    def _outcome(self, delivery: Delivery) -> Outcome:
        payload = delivery.payload
        started = time.monotonic()
        try:
            value = self._call(payload)
            outcome: Outcome = Returned.of(value)
        except BaseException as exc:  # a task may call sys.exit; its thread has others to run
            outcome = Raised.of(exc)
            self._log_raised(delivery, exc, outcome, time.monotonic() - started)
        with self._count:
            self.ran += 1
            if isinstance(outcome, Returned) and outcome.replaced:
                self.replaced += len(outcome.replaced)
        if isinstance(outcome, Returned) and outcome.replaced:
            shown = ", ".join(outcome.replaced)
            emit(
                logger,
                logging.WARNING,
                "result_made_to_fit",
                **ids(delivery),
                count=len(outcome.replaced),
                paths=shown,
            )
        return outcome

    def _call(self, payload: TaskPayload | None) -> object:
        if payload is None:
            raise RuntimeError("a malformed message was submitted to be run")
        return self._tasks[payload.task_name](*payload.args, **payload.kwargs)

    def _log_raised(self, delivery: Delivery, exc: BaseException, outcome: Outcome, seconds: float) -> None:
        frames = traceback.extract_tb(exc.__traceback__)
        emit(
            logger,
            logging.INFO if isinstance(outcome, RetryAsked) else logging.WARNING,
            "task_retry_asked" if isinstance(outcome, RetryAsked) else "task_raised",
            **ids(delivery),
            error_type=type(exc).__name__,
            where=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
            seconds=round(seconds, 3),
        )


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
