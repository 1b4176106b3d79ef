"""The whole way of a document through PostgreSQL: dispatched, executed, continued, saved.

`make demo` runs this on an embedded PostgreSQL; UNSTRACT_WIRE_URL=postgresql://... takes a schema of its own on yours.
An executor worker and a callback worker, two processes, are started through the real command line. Every document is
dispatched as the product's views do it (product.py); one of them is broken, and its error callback gets the real
reason. One more is dispatched by a caller that waits for its reply.

The extraction is rules in place of a model (extraction/), and so is free and always the same; nothing else is staged.
Ctrl-C leaves nothing running. The exit code is 0 only if everything that was dispatched is accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from examples import callbacks, progress
from examples.database import URL_VARIABLE, Database, database
from examples.processes import Worker, Workers, ignore_signals, leave_on_signals
from examples.product import (
    CALLBACK_QUEUE,
    EXECUTOR_QUEUE,
    Dispatched,
    call_for_document,
    context_for,
    dispatch_document,
)
from examples.screen import Screen
from examples.tally import Evidence, Tally, take_stock
from examples.watch import Watch
from unstract_core import ContractError, Dispatcher, ExecutionResult, ExecutorDispatcher, load_transport

DOCUMENTS = Path(__file__).resolve().parent / "documents"
BROKEN = frozenset({"invoice-marlow-print"})
CALLED = "receipt-harbour-kitchen"
WORKERS = (
    Worker("executor", "examples.executor:tasks", EXECUTOR_QUEUE, threads=2),
    Worker("callback", "examples.callbacks:tasks", CALLBACK_QUEUE, threads=1),
)


@attrs.frozen
class Demo:
    """What one run works with. `deadline` is on the monotonic clock; `transport` is the producer's own."""

    screen: Screen
    transport: Any
    workers: Workers
    watch: Watch
    output: Path
    deadline: float

    @property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.transport)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    leave_on_signals()
    try:
        return run(options)
    except (ContractError, OSError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 2
    except SystemExit:
        print("\ninterrupted: the workers and the database are stopped", file=sys.stderr)
        raise


def run(options: argparse.Namespace) -> int:
    """Set up, play, and clear everything away again, whatever happened. Returns the exit code."""
    screen = Screen()
    with contextlib.ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="wire-demo-")))
        _log_to(scratch / "demo.log", cleanup)
        try:
            tally = play(set_up(screen, options, scratch, cleanup))
        except Exception:
            screen.logs(scratch)
            raise
        else:
            if tally.missing:
                screen.logs(scratch)
            screen.verdict(f"{tally.line} ({screen.seconds:.1f} s)", tally.missing)
        finally:
            ignore_signals()
    return 1 if tally.missing else 0


def set_up(screen: Screen, options: argparse.Namespace, scratch: Path, cleanup: contextlib.ExitStack) -> Demo:
    """Start the database, make the tables, start the workers; `cleanup` undoes all of it in turn."""
    screen.heading("Documents through a queue in PostgreSQL")
    screen.fact("extraction", "by rules, which stand in here for a call of a language model")
    place: Database = cleanup.enter_context(database(scratch))
    screen.fact("database", place.description)
    transport: Any = cleanup.enter_context(contextlib.closing(load_transport(place.url)))
    transport.migrate()
    screen.fact("tables", f"created in schema {place.schema}")
    output = cleanup.enter_context(_output_directory(options.output))
    events = scratch / "events.jsonl"
    environment = {
        URL_VARIABLE: place.url,
        progress.EVENTS_VARIABLE: str(events),
        callbacks.OUTPUT_VARIABLE: str(output),
    }
    workers = Workers(scratch, environment)
    cleanup.callback(workers.stop)
    for worker in WORKERS:
        if worker.name == options.without:
            screen.fact(f"{worker.name} worker", "left out, as --without asks")
            continue
        pid = workers.start(worker)
        screen.fact(f"{worker.name} worker", f"pid {pid}, queue {worker.queue}, {worker.threads} at a time")
    watch = Watch(events, screen, workers)
    return Demo(screen, transport, workers, watch, output, time.monotonic() + options.deadline)


def play(demo: Demo) -> Tally:
    """Dispatch, watch, call, and count what came of it."""
    demo.screen.heading("Dispatched with callbacks")
    dispatched = [dispatch(demo, path) for path in sorted(DOCUMENTS.glob("*.txt")) if path.stem != CALLED]
    demo.watch.until(lambda: all(demo.watch.ended(one.run_id) for one in dispatched), demo.deadline)
    demo.screen.heading("Dispatched by a caller that waits")
    answer = call(demo, DOCUMENTS / f"{CALLED}.txt")
    exits = demo.workers.stop()
    queues = demo.transport.queues([EXECUTOR_QUEUE, CALLBACK_QUEUE])
    demo.screen.heading("The queues after the workers have left")
    demo.screen.queues(queues)
    demo.screen.heading(f"Saved in {_shown(demo.output)}")
    demo.screen.files(demo.output)
    return take_stock(
        Evidence(
            dispatched=dispatched,
            broken=BROKEN,
            callbacks={one.task_id: demo.watch.ended(one.run_id) for one in dispatched},
            statuses={one.task_id: demo.dispatcher.status(one.task_id) for one in dispatched},
            output=demo.output,
            answer=answer,
            queues=queues,
            exits=exits,
        )
    )


def dispatch(demo: Demo, path: Path) -> Dispatched:
    one = dispatch_document(ExecutorDispatcher(demo.dispatcher), path)
    demo.watch.documents[one.run_id] = one.document
    demo.screen.stage("dispatched", one.document, f"task {one.task_id[:8]}...")
    demo.watch.catch_up()
    return one


def call(demo: Demo, path: Path) -> ExecutionResult:
    """Block one thread on the reply, as a web server's would be, and show on this one what happens meanwhile."""
    context = context_for(path)
    answers: list[ExecutionResult] = []

    def wait_for_reply() -> None:
        timeout = max(1.0, demo.deadline - time.monotonic())
        answers.append(call_for_document(ExecutorDispatcher(demo.dispatcher), context, timeout))

    demo.watch.documents[context.run_id] = path.stem
    demo.screen.stage("called", path.stem)
    threading.Thread(target=wait_for_reply, daemon=True).start()
    demo.watch.until(lambda: bool(answers), demo.deadline + 2.0)
    answer = answers[0] if answers else ExecutionResult.failure("no reply, and a worker has ended")
    demo.screen.answer(path.stem, answer)
    return answer


def _log_to(path: Path, cleanup: contextlib.ExitStack) -> None:
    """Keep this process's log out of the terminal; its end is shown beside the workers' when something fails."""
    handler = logging.FileHandler(path)
    logging.root.addHandler(handler)
    cleanup.callback(logging.root.removeHandler, handler)


@contextlib.contextmanager
def _output_directory(parent: Path) -> Iterator[Path]:
    """Make a directory for this run alone, and remove it if nothing was saved; earlier runs' stay as they are."""
    now = datetime.datetime.now().astimezone()
    directory = parent.resolve() / f"{now:%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:4]}"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description="Documents through a queue in PostgreSQL.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where to save (%(default)s)")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds until it gives up (%(default)s)")
    parser.add_argument(
        "--without", choices=[worker.name for worker in WORKERS], help="start without this worker, to see it missed"
    )
    return parser.parse_args(arguments)
