"""Flip one flag under load: every dispatch has exactly one callback on its side.

`make flip` runs it. A producer dispatches continuously through RoutingDispatcher, and the flag is flipped ten times.
`on` is an embedded PostgreSQL. `off` is a Celery app on RabbitMQ (UNSTRACT_WIRE_BROKER, or the one on this machine)
with a real Celery worker. Our consumers run the executor on PostgreSQL, with the same Celery tasks, and the callbacks
on both sides. The run has its own queues. The exit code is 0 only if every dispatch is accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from examples import flip_app
from examples.broker import broker_url, own_queues, waiting
from examples.database import database
from examples.processes import ROOT, STOP_SECONDS, ignore_signals, leave_on_signals, uninterrupted
from examples.product import DocumentContext
from examples.threads import ConsumerThread
from transports.celery import CeleryAppDispatcher, CeleryTransport, celery_tasks
from unstract_core import (
    ContractError,
    Dispatcher,
    ExecutorDispatcher,
    RoutingDispatcher,
    Tasks,
    load_transport,
)

FLIPS = 10
BROKEN_EVERY = 7


@attrs.define
class FlipRecord:
    """The dispatches by task id, with their side and expected outcome, and the callbacks."""

    sent: dict[str, tuple[str, bool]] = attrs.field(factory=dict)
    callbacks: list[tuple[str, str, str]] = attrs.field(factory=list)

    def open(self) -> int:
        return len(self.sent) - len({task_id for task_id, _, _ in self.callbacks})

    def tasks(self, side: str) -> Tasks:
        """Return the callback tasks of one side's workers."""
        tasks = Tasks()

        @tasks.register("ide_prompt_complete")
        def complete(result: dict[str, Any], callback_kwargs: dict[str, Any]) -> None:
            same = result["data"]["document_id"] == callback_kwargs["document_id"]
            self.callbacks.append((callback_kwargs["executor_task_id"], side, "complete" if same else "mixed up"))

        @tasks.register("ide_prompt_error")
        def error(failed_task_id: str, callback_kwargs: dict[str, Any]) -> None:
            same = failed_task_id == callback_kwargs["executor_task_id"]
            self.callbacks.append((callback_kwargs["executor_task_id"], side, "error" if same else "mixed up"))

        return tasks

    def wrong(self) -> list[str]:
        """Yield a line for each dispatch that does not have exactly its one callback."""
        times = Counter(self.callbacks)
        expected = Counter((id, side, "error" if broken else "complete") for id, (side, broken) in self.sent.items())
        lost = [f"{id}: no {kind} on {side}" for id, side, kind in expected - times]
        return sorted(lost + [f"{id}: {kind} on {side} too often" for id, side, kind in times - expected])


class Flag:
    """The gate: a flag that any thread may flip. `answers` are its answers by run."""

    def __init__(self) -> None:
        self.on = False
        self.flips = 0
        self.answers: dict[str, bool] = {}

    def __call__(self, context: Any) -> bool:
        answer = self.answers[context.run_id] = self.on
        return answer

    def flip(self) -> None:
        self.on = not self.on
        self.flips += 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flip_the_flag", description="A flag flipped under load, and a tally.")
    parser.add_argument("--between", type=int, default=40, help="dispatches between two flips (%(default)s)")
    parser.add_argument("--deadline", type=float, default=60.0, help="the longest run in seconds (%(default)s)")
    options = parser.parse_args(arguments)
    leave_on_signals()
    try:
        return run(options.between, time.monotonic() + options.deadline)
    except (ContractError, OSError) as exc:
        print(f"flip_the_flag: {exc}", file=sys.stderr)
        return 2


def run(between: int, deadline: float) -> int:
    """Set up both sides, dispatch and flip, and count; return the exit code."""
    run_id = uuid.uuid4().hex[:8]
    url = broker_url()
    executor, callback_queue = f"flip_{run_id}", f"flip_callbacks_{run_id}"
    executor_queue = f"celery_executor_{executor}"
    record, flag = FlipRecord(), Flag()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(ignore_signals)
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="wire-flip-")))
        logging.root.addHandler(logging.FileHandler(scratch / "flip.log"))  # the intended errors are logged to a file
        broker = cleanup.enter_context(contextlib.closing(CeleryTransport(url)))
        broker.subscribe([callback_queue], lease=1).close()  # raises if no broker answers
        answers = flip_app.app.thread_oid  # the app's result queue, which this example does not read
        cleanup.enter_context(own_queues(url, [executor_queue, callback_queue, answers]))
        place = cleanup.enter_context(database(scratch))
        postgres: Any = cleanup.enter_context(contextlib.closing(load_transport(place.url)))
        postgres.migrate()
        print(f"on:  {place.description}; our consumers")
        print("off: a Celery app on RabbitMQ, a Celery worker for the executor, our consumer for the callbacks")
        cleanup.callback(ConsumerThread(postgres, celery_tasks(flip_app.app), executor_queue, concurrency=2).stop)
        cleanup.callback(ConsumerThread(postgres, record.tasks("on"), callback_queue, concurrency=2).stop)
        cleanup.callback(ConsumerThread(broker, record.tasks("off"), callback_queue, concurrency=2).stop)
        cleanup.enter_context(_celery_worker(scratch, executor_queue))
        executors = RoutingDispatcher(
            gate=flag,
            on=ExecutorDispatcher(Dispatcher(postgres)),
            off=CeleryAppDispatcher(flip_app.app),
        )
        _produce(executors, flag, record, executor, callback_queue, between, deadline)
        while record.open() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # time for a second callback
        found = _statuses(executors, record)
        left = sum(waiting(url, name) for name in (executor_queue, callback_queue))
        states = [state for state in postgres.queues() if state.ready or state.in_flight or state.delayed or state.dead]
    return _tell(record, flag, found, left + len(states))


def _produce(
    executors: RoutingDispatcher,
    flag: Flag,
    record: FlipRecord,
    executor: str,
    queue: str,
    between: int,
    deadline: float,
) -> None:
    """Dispatch continuously while another thread flips the flag after a number of dispatches."""
    number = 0
    while flag.flips < FLIPS + 1 and time.monotonic() < deadline:
        for _ in range(between):
            number += 1
            _dispatch(executors, flag, record, executor, queue, number)
        flipper = threading.Thread(target=flag.flip)
        flipper.start()
        while flipper.is_alive():  # a flip happens between any two dispatches
            number += 1
            _dispatch(executors, flag, record, executor, queue, number)
    flag.flips -= 1  # the last flip had no later dispatch


def _dispatch(
    executors: RoutingDispatcher, flag: Flag, record: FlipRecord, executor: str, queue: str, number: int
) -> None:
    broken = number % BROKEN_EVERY == 0
    task_id, document = str(uuid.uuid4()), f"document-{number}"
    context = DocumentContext(
        executor_name=executor,
        run_id=f"run-{number}",
        executor_params={"document_id": document, "broken": broken},
        request_id=f"request-{number}",
        log_events_id=f"events-{number}",
    )
    kwargs = {"callback_kwargs": {"executor_task_id": task_id, "document_id": document}}
    executors.dispatch_with_callback(
        context,
        on_success=flip_app.app.signature("ide_prompt_complete", kwargs=kwargs, queue=queue),
        on_error=flip_app.app.signature("ide_prompt_error", kwargs=kwargs, queue=queue),
        task_id=task_id,
    )
    record.sent[task_id] = ("on" if flag.answers[context.run_id] else "off", broken)


def _statuses(executors: RoutingDispatcher, record: FlipRecord) -> int:
    """Return the number of dispatches with a status, independent of the flag; Celery's rpc:// stores none."""
    replies = [executors.status(task_id) for task_id, (side, _) in record.sent.items() if side == "on"]
    return sum(reply is not None for reply in replies)


def _tell(record: FlipRecord, flag: Flag, found: int, left: int) -> int:
    """Print the tally, and return the exit code."""
    sides = Counter(side for side, _ in record.sent.values())
    kinds = Counter(kind for _, _, kind in record.callbacks)
    wrong = record.wrong()
    complete = not wrong and flag.flips == FLIPS and found == sides["on"] and not left
    print(f"{flag.flips} flips, {len(record.sent)} dispatched: {sides['on']} on, {sides['off']} off")
    print(f"{len(record.callbacks)} callbacks: {kinds['complete']} complete, {kinds['error']} error")
    print(f"{found} of {sides['on']} statuses found on PostgreSQL, after the flips; {left} messages left in the queues")
    for line in wrong[:10]:
        print(f"  {line}")
    print("every dispatch has exactly one callback, none lost: complete" if complete else "NOT complete")
    return 0 if complete else 1


@contextlib.contextmanager
def _celery_worker(scratch: Path, queue: str) -> Iterator[None]:
    """Run a Celery worker for the executor's queue, and wait until it consumes."""
    options = ["--pool", "prefork", "--concurrency", "2", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    command = [sys.executable, "-m", "celery", "--app", "examples.flip_app", "worker", "--queues", queue, *options]
    log = scratch / "celery.log"
    with log.open("wb") as output, uninterrupted():
        process = subprocess.Popen(
            [*command, "--hostname", f"flip-{queue}@%h"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 30.0
        while b" ready." not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"the Celery worker did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
