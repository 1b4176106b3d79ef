"""A worker that kills itself at a given line: `python -m postgres.crashing URL SCHEMA QUEUE BATCH`.

For each line `THREAD N` on standard input it forks a worker on the queue. The worker claims BATCH messages and kills
itself with SIGKILL when THREAD (`io` or `task`) begins the N-th line of the package after the first task returned. For
an empty line the worker runs to the end, and its lines are counted. Each result is a line of JSON: an Ending.

The end is the next call of `receive`, because the settlement is committed by then. A task returns when the I/O thread
waits, and several tasks are settled only when all have returned. So each thread runs the same lines every time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import attrs

from transports.postgres import PostgresTransport
from transports.postgres import transport as postgres_transport
from unstract_core import Consumer, Delivery, Settlement, Subscription, Tasks
from unstract_core.worker.loop import Loop

LEASE = 1000.0
"""Seconds: no lease ends by itself while a test runs."""

BACKOFF = 3000.0
"""Seconds until a retry, less a quarter at most, so that a leased message differs from a delayed one."""

MAX_ATTEMPTS = 5

PACKAGES = ("unstract_core.", "transports.postgres.")


@attrs.frozen
class Ending:
    """The end of a worker: the line at which it was killed, or None and the lines that each thread has run."""

    died_at: str | None
    lines: dict[str, list[str]]


class Tracer:
    """Counts the lines of the package on each thread, once it is `armed`, and kills the process at one of them."""

    def __init__(self, fatal: tuple[str, int] | None, report: int) -> None:
        self.armed = False
        self.lines: dict[str, list[str]] = {"io": [], "task": []}
        self._fatal = fatal
        self._report = report
        self._io = threading.get_ident()

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if str(frame.f_globals.get("__name__")).startswith(PACKAGES) else None

    def report(self, ending: Ending) -> None:
        os.write(self._report, json.dumps(attrs.asdict(ending)).encode())

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if self.armed and event == "line":
            thread = "io" if threading.get_ident() == self._io else "task"
            place = f"{frame.f_globals['__name__']}:{frame.f_lineno}"
            self.lines[thread].append(place)
            if self._fatal == (thread, len(self.lines[thread])):
                self.report(Ending(place, {}))
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


class Watched:
    """A subscription that collects `batch` messages, and ends the worker after their settlement."""

    def __init__(self, subscription: Subscription, worker: CrashingWorker) -> None:
        self._subscription = subscription
        self._worker = worker
        self._settled = 0

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        if self._settled:
            self._worker.end()
        if self._worker.batch > 1 and self._worker.received:
            self._worker.collects = True
            finished = self._worker.loop._in_flight._finished
            while len(finished) < self._worker.batch:  # a property would add lines to those that are counted
                time.sleep(0.0005)
            return ()
        deliveries = self._subscription.receive(limit=limit, wait=wait)
        self._worker.received += len(deliveries)
        return deliveries

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return self._subscription.renew(deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if len(settlements) != self._worker.batch:
            raise SystemExit(f"{len(settlements)} were settled together, not {self._worker.batch}")
        effective = self._subscription.settle(settlements)
        self._settled += sum(effective)
        return effective

    def wake(self) -> None:
        self._subscription.wake()

    def close(self) -> None:
        self._subscription.close()


class CrashingWorker(PostgresTransport):
    """A transport and the consumer on it, in a process of their own."""

    def __init__(self, url: str, schema: str, queue: str, batch: int, tracer: Tracer) -> None:
        super().__init__(url, schema)
        self.batch = batch
        self.received = 0
        self.collects = False
        self._tracer = tracer
        self._main = threading.get_ident()
        self._consumer = Consumer(
            self,
            self._tasks(),
            [queue],
            prefetch=batch,
            lease=LEASE,
            max_attempts=MAX_ATTEMPTS,
            backoff=BACKOFF,
            backoff_max=BACKOFF,
        )

    @property
    def loop(self) -> Loop:
        loop = self._consumer._running
        assert loop is not None
        return loop

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Any:
        return Watched(super().subscribe(queues, lease=lease), self)

    def run(self) -> None:
        threading.settrace(self._tracer)
        sys.settrace(self._tracer)
        self._consumer.run()

    def end(self) -> None:
        """Wait for the end of the task's thread, report the counted lines, and exit."""
        threads = self.loop._threads
        threads.close()
        for thread in threads._threads:
            thread.join()
        self._tracer.report(Ending(None, self._tracer.lines))
        os._exit(0)

    def _tasks(self) -> Tasks:
        tasks = Tasks()

        def returns(label: str) -> object:
            self._arm()
            return {"of": label}

        def fails(label: str) -> None:
            self._arm()
            raise ValueError(label)

        tasks.register("returns")(returns)
        tasks.register("raises")(fails)
        tasks.register("raises once")(fails)
        return tasks

    def _arm(self) -> None:
        while not self._waits():
            time.sleep(0.0005)
        self._tracer.armed = True

    def _waits(self) -> bool:
        """Whether the I/O thread waits until a task, or all tasks of a batch, return."""
        return self.collects if self.batch > 1 else sys._current_frames()[self._main].f_code.co_name == "select"


class Crashing:
    """The test's access to the process that forks workers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, fatal: tuple[str, int] | None = None) -> Ending:
        """Run one worker to its end, or to the `fatal` line of a thread."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{fatal[0]} {fatal[1]}\n" if fatal else "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks the workers has ended"
        return Ending(**json.loads(answer))


@contextlib.contextmanager
def crashing(url: str, schema: str, queue: str, batch: int) -> Iterator[Crashing]:
    """Start the process that forks the workers of one queue, and end it at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "postgres.crashing", url, schema, queue, str(batch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with process:  # closes its standard input, which ends it
        yield Crashing(process)


def main(url: str, schema: str, queue: str, batch: str) -> None:
    # The check of the tables would take half of the time of a worker that lives for milliseconds.
    vars(postgres_transport)["check_tables"] = lambda execute, statements: None
    PostgresTransport(url, schema).close()
    logging.getLogger().addHandler(logging.NullHandler())
    gc.freeze()
    for line in sys.stdin:
        words = line.split()
        mine, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            tracer = Tracer((words[0], int(words[1])) if words else None, theirs)
            CrashingWorker(url, schema, queue, int(batch), tracer).run()
            os._exit(1)
        os.close(theirs)
        with open(mine) as report:
            answer = report.read()
        _, status = os.waitpid(child, 0)
        if not answer or os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
            raise SystemExit(f"a worker ended with an unexpected status: {status}")
        print(answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
