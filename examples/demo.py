"""Send documents through a queue: dispatch, task, callback, saved output.

`make demo` runs this on an embedded PostgreSQL; UNSTRACT_WIRE_URL=postgresql://... uses a new schema on your server.
The demo starts an executor worker and a callback worker as two processes. It dispatches every document as the product's
views do (product.py). One document is broken, and its error callback gets the original error. One more document is
dispatched by a caller that waits for the reply.

With `--transport celery` the messages go over Celery's wire, through the RabbitMQ of UNSTRACT_WIRE_BROKER or of this
machine. If none answers, the demo uses kombu's own broker and runs inside one process.

The extraction uses rules instead of a model (extraction/), so it is free and deterministic; everything else is real.
Ctrl-C leaves no process running. The exit code is 0 only if every dispatch is accounted for.
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

import attrs

from examples import callbacks, progress
from examples.extraction import ExtractionError, extract
from examples.place import Place
from examples.processes import URL_VARIABLE, ignore_signals, leave_on_signals
from examples.product import PRODUCT, Dispatched, Queues, call_for_document, context_for, dispatch_document
from examples.screen import Screen
from examples.tally import Evidence, Tally, take_stock
from examples.watch import Watch
from examples.workers import Worker, Workers
from unstract_core import ContractError, Dispatcher, ExecutionResult, ExecutorDispatcher, Reply
from unstract_core.discovery import import_object

DOCUMENTS = Path(__file__).resolve().parent / "documents"
BROKEN = frozenset({"invoice-marlow-print"})
CALLED = "receipt-harbour-kitchen"


@attrs.frozen
class Way:
    """A transport in the words of the demo.

    Attributes:
        opens: "module:name" of the function that opens its place; its driver is imported then.
    """

    heading: str
    opens: str
    cleared: str


WAYS = {
    "postgres": Way(
        "Documents through a queue in PostgreSQL",
        "examples.database:on_postgres",
        "the workers and the database are stopped",
    ),
    "celery": Way(
        "Documents through a message broker, over Celery's wire",
        "examples.broker:on_broker",
        "the workers are stopped, and this run's queues deleted",
    ),
}


@attrs.frozen
class Demo:
    """The state of one run.

    Attributes:
        deadline: The end of the run on the monotonic clock.
    """

    screen: Screen
    place: Place
    workers: Workers
    watch: Watch
    output: Path
    deadline: float

    @property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.place.transport)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    leave_on_signals()
    try:
        return run(options)
    except (ContractError, OSError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 2
    except SystemExit:
        print(f"\ninterrupted: {WAYS[options.transport].cleared}", file=sys.stderr)
        raise


def run(options: argparse.Namespace) -> int:
    """Set up, play, and clean up after every outcome; return the exit code."""
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
    """Open the place and start the workers; `cleanup` undoes each step in reverse."""
    way = WAYS[options.transport]
    screen.heading(way.heading)
    screen.fact("extraction", "by rules, instead of a call of a language model")
    place: Place = cleanup.enter_context(import_object(way.opens, f"--transport {options.transport}")(scratch))
    for name, text in place.facts:
        screen.fact(name, text)
    if not place.transport.capabilities.status:
        screen.fact("statuses", "none are stored; the evidence is the callbacks and the saved outputs")
    output = cleanup.enter_context(_output_directory(options.output))
    events = scratch / "events.jsonl"
    environment = {
        progress.EVENTS_VARIABLE: str(events),
        callbacks.OUTPUT_VARIABLE: str(output),
    }
    workers = place.workers(scratch, environment)
    cleanup.callback(workers.stop)
    for worker in workers_of(place.queues):
        if worker.name == options.without:
            screen.fact(f"{worker.name} worker", "not started, because of --without")
            continue
        where = workers.start(worker)
        screen.fact(f"{worker.name} worker", f"{where}, queue {worker.queue}, {worker.threads} at a time")
    watch = Watch(events, screen, workers)
    return Demo(screen, place, workers, watch, output, time.monotonic() + options.deadline)


def workers_of(queues: Queues) -> list[Worker]:
    return [
        Worker("executor", "examples.executor:tasks", queues.executor, threads=2),
        Worker("callback", "examples.callbacks:tasks", queues.callbacks, threads=1),
    ]


def play(demo: Demo) -> Tally:
    """Dispatch, watch, call, and count the results."""
    demo.screen.heading("Dispatched with callbacks")
    dispatched = [dispatch(demo, path) for path in sorted(DOCUMENTS.glob("*.txt")) if path.stem != CALLED]
    demo.watch.until(lambda: all(demo.watch.ended(one.run_id) for one in dispatched), demo.deadline)
    demo.screen.heading("Dispatched by a caller that waits")
    answer = call(demo, DOCUMENTS / f"{CALLED}.txt")
    exits = demo.workers.stop()
    queues = demo.place.left()
    demo.screen.heading("The queues after the workers have stopped")
    demo.screen.queues(queues)
    demo.screen.heading(f"Saved in {_shown(demo.output)}")
    demo.screen.files(demo.output)
    return take_stock(
        Evidence(
            dispatched=dispatched,
            broken={document: error_of(DOCUMENTS / f"{document}.txt") for document in BROKEN},
            callbacks={one.task_id: demo.watch.ended(one.run_id) for one in dispatched},
            statuses=statuses_of(demo, dispatched),
            output=demo.output,
            answer=answer,
            names=demo.place.queues.names,
            queues=queues,
            exits=exits,
        )
    )


def dispatch(demo: Demo, path: Path) -> Dispatched:
    one = dispatch_document(ExecutorDispatcher(demo.dispatcher), path, demo.place.queues)
    demo.watch.documents[one.run_id] = one.document
    demo.screen.stage("dispatched", one.document, f"task {one.task_id[:8]}...")
    demo.watch.catch_up()
    return one


def call(demo: Demo, path: Path) -> ExecutionResult:
    """Block one thread on the reply, like a web server's, and show progress on this one."""
    context = context_for(path, demo.place.queues)
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


def statuses_of(demo: Demo, dispatched: Sequence[Dispatched]) -> dict[str, Reply | None] | None:
    if not demo.place.transport.capabilities.status:
        return None
    return {one.task_id: demo.dispatcher.status(one.task_id) for one in dispatched}


def error_of(path: Path) -> str:
    """Return the error that the executor raises for a broken document, in the form that its callback gets."""
    try:
        extract(path.read_text(encoding="utf-8"))
    except ExtractionError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "nothing at all"


def _log_to(path: Path, cleanup: contextlib.ExitStack) -> None:
    """Send this process's log to a file, whose end is shown with the workers' logs after a failure."""
    handler = logging.FileHandler(path)
    logging.root.addHandler(handler)
    cleanup.callback(logging.root.removeHandler, handler)


@contextlib.contextmanager
def _output_directory(parent: Path) -> Iterator[Path]:
    """Create a directory for this run, and remove it if it stays empty; the directories of earlier runs are kept."""
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
    parser = argparse.ArgumentParser(
        prog="demo", description="Documents through a queue: dispatched, executed, continued, saved."
    )
    parser.add_argument(
        "--transport",
        choices=WAYS,
        default="postgres",
        help=f"postgres: the server that {URL_VARIABLE} names, else an embedded one; celery: the RabbitMQ that "
        "UNSTRACT_WIRE_BROKER names, else the one on this machine, else kombu's broker in one process (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where to save (%(default)s)")
    parser.add_argument("--deadline", type=float, default=30.0, help="the longest run in seconds (%(default)s)")
    parser.add_argument(
        "--without",
        choices=[worker.name for worker in workers_of(PRODUCT)],
        help="do not start this worker; the tally reports it",
    )
    return parser.parse_args(arguments)
