"""`unstract-wire worker`: a consumer in a process of its own, from its first log line to its exit code."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import attrs
import click

from unstract_core import discovery
from unstract_core.cli.loading import Left, loading, make_here_importable
from unstract_core.cli.output import printable, utc
from unstract_core.cli.session import Session, common, queue_name
from unstract_core.consumer import Consumer
from unstract_core.errors import ConfigurationError
from unstract_core.events import emit
from unstract_core.transport import Subscription, Transport

logger = logging.getLogger(__name__)

_COUNTERS = ("ran", "settled", "retried", "buried", "given_back", "lost", "refused", "replaced")


@click.command()
@click.option("--app", metavar="MODULE:NAME", required=True, help="The tasks: a Tasks(), or any mapping of functions.")
@click.option(
    "--queue", "queues", type=queue_name, metavar="NAME", multiple=True, required=True, help="A queue; may be repeated."
)
@click.option(
    "--concurrency", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Tasks run at once."
)
@click.option(
    "--lease",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a dead worker's messages wait for another; a living worker renews them.",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Deliveries until a message that keeps failing becomes a dead letter.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1),
    metavar="N",
    help="Messages held at once, running ones too. Default: adaptive.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    metavar="LEVEL",
    default="INFO",
    show_default=True,
    help="What is logged to standard error: from DEBUG, INFO, WARNING, ERROR or CRITICAL on.",
)
@common()
@click.pass_obj
def worker(
    session: Session,
    app: str,
    queues: tuple[str, ...],
    concurrency: int,
    lease: float,
    max_attempts: int,
    prefetch: int | None,
    log_level: str,
) -> None:
    """Run the tasks of some queues until SIGTERM or SIGINT.

    The app is imported, the current directory first: --app myproject.tasks:tasks is `tasks` in myproject/tasks.py.
    On the first signal the worker takes nothing new, finishes what runs, settles it and exits with 0. A second one
    makes it leave at once with 128 + the signal's number; its messages run again when their lease is over.
    """
    with _log_to_stderr(session, log_level), _sigterm_leaves():
        tasks = _tasks(app)
        with session.transport() as transport:
            consumer = Consumer(
                transport,
                tasks,
                queues,
                concurrency=concurrency,
                lease=lease,
                max_attempts=max_attempts,
                prefetch=prefetch,
            )
            _run(consumer, session)


def _run(consumer: Consumer, session: Session) -> None:
    code: int | None = None
    started = 0.0

    def announce() -> None:
        nonlocal started
        started = time.monotonic()
        emit(
            logger,
            logging.INFO,
            "worker_started",
            transport=session.mask(session.url),
            queues=",".join(consumer.queues),
            tasks=",".join(sorted(consumer.tasks)),
            concurrency=consumer.concurrency,
            lease=consumer.lease,
            pid=os.getpid(),
        )

    consumer.transport = cast(Transport, _Announced(consumer.transport, announce))
    try:
        consumer.run()
    except SystemExit as second_signal:
        code = int(second_signal.code or 0)
    finally:
        if started:
            counts = {name: consumer.counters[name] for name in _COUNTERS}
            emit(logger, logging.INFO, "worker_stopped", seconds=round(time.monotonic() - started, 3), **counts)
    if code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # a thread that a task has started would hold up a normal exit


@attrs.frozen
class _Announced:
    """A transport that tells when it was subscribed to: from then on the worker works."""

    transport: Transport
    announce: Callable[[], None]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        subscription = self.transport.subscribe(queues, lease=lease)
        self.announce()
        return subscription

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def _tasks(app: str) -> Mapping[str, Callable[..., Any]]:
    module, _, name = app.partition(":")
    if not module or not name:
        raise ConfigurationError(f"--app takes module:name, such as myproject.tasks:tasks, not {app!r}")
    make_here_importable()
    with loading(f"--app {app}"):
        found = discovery.import_object(app, "--app")
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"--app {app} is a {type(found).__name__}; it must be a Tasks(), or a mapping of task names to functions"
        )
    if odd := [name for name in found if not isinstance(name, str) or not name]:
        raise ConfigurationError(f"--app {app} has a task whose name is not a string: {odd[0]!r}")
    return found


@contextlib.contextmanager
def _sigterm_leaves() -> Iterator[None]:
    """Let SIGTERM end the process before the consumer minds it: as process 1 of a container it would be ignored."""

    def leave(number: int, frame: object) -> NoReturn:
        raise Left(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _log_to_stderr(session: Session, level: str) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine(session))
    previous = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(level.upper())
    try:
        yield
    finally:
        logging.root.setLevel(previous)
        logging.root.removeHandler(handler)


class _LogLine(logging.Formatter):
    """One line a record (a traceback follows on lines of its own): UTC time, level, logger, message."""

    def __init__(self, session: Session) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._session = session

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return utc(datetime.datetime.fromtimestamp(record.created, datetime.UTC), "milliseconds")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return self._session.mask(super().format(record))
