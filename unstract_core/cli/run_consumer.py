"""The run of a worker's consumer, from `worker_started` to `worker_stopped` and the exit code of the process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol, cast

import attrs

from unstract_core.cli.app_import import Terminated
from unstract_core.cli.context import CliContext
from unstract_core.cli.process_exit import EXIT_TIMEOUT, FAILED, flush, ignore_signals
from unstract_core.errors import TransportUnavailable
from unstract_core.forking import handling
from unstract_core.observability.log_events import OwnText, emit
from unstract_core.transport import Subscription, Transport
from unstract_core.values import error_text
from unstract_core.worker.consumer import Consumer

logger = logging.getLogger("unstract_wire.worker")

_COUNTERS = ("ran", "settled", "retried", "buried", "given_back", "lost", "refused", "replaced", "overdue")
_MOMENT = 0.5


class Supervision(Protocol):
    """The part of the supervisor that the run of a consumer uses; `supervisor.child.Parent` implements it."""

    first: bool
    """Whether no child of the supervisor has ever started. An unavailable transport is then an error."""

    def wait_for_turn(self, seconds: float) -> bool: ...
    def report_started(self) -> None: ...
    def report_unavailable(self) -> None: ...
    def end_group_if_gone(self) -> None: ...


def run(consumer: Consumer, cli: CliContext, parent: Supervision | None, received: Sequence[int]) -> None:
    """Run the consumer until a signal stops it.

    Args:
        consumer: The consumer.
        cli: The context of the command.
        parent: The supervisor; None for a worker without one.
        received: The signals that the process has received. If there is one, the consumer does not run.

    Raises:
        Terminated: The process received a signal before the run.
        TransportUnavailable: The transport is unavailable, and no child of this supervisor has ever started.
    """
    code: int | None = None
    started_at = 0.0
    returned = threading.Event()

    def announce() -> None:
        nonlocal started_at
        started_at = time.monotonic()
        emit(
            logger,
            logging.INFO,
            "worker_started",
            transport=OwnText(cli.mask(cli.url)),
            queues=",".join(consumer.queues),
            tasks=",".join(sorted(consumer.tasks)),
            concurrency=consumer.concurrency,
            lease=consumer.lease,
            pid=os.getpid(),
        )
        if parent is not None:
            cli.silent = False
            parent.report_started()

    def wait_for_turn() -> None:
        """Wait for the order to take over, if this child is a spare."""
        while parent is not None and not parent.wait_for_turn(_MOMENT):
            if consumer.stopping:
                raise SystemExit(0)

    def wait(error: TransportUnavailable) -> None:
        """Wait for the transport for a moment, if it has worked for an earlier child of this supervisor."""
        if parent is None or parent.first:
            raise error
        parent.report_unavailable()
        time.sleep(_MOMENT)
        if consumer.stopping:
            raise SystemExit(0)

    def log_stopped() -> None:
        if started_at:
            counts = {name: consumer.counters[name] for name in _COUNTERS}
            emit(logger, logging.INFO, "worker_stopped", seconds=round(time.monotonic() - started_at, 3), **counts)

    def exit_if_held_up() -> None:
        """Exit if the task on the main thread has not returned in time after the end of the run."""
        overdue = consumer.counters["overdue"]
        seconds = _MOMENT if overdue else EXIT_TIMEOUT
        if returned.wait(seconds):
            return
        log_stopped()
        if not overdue:
            emit(logger, logging.WARNING, "exit_held_up", pid=os.getpid(), seconds=seconds)
        _end(0 if overdue else FAILED, parent)

    consumer.transport = cast(Transport, _WaitingTransport(consumer.transport, wait_for_turn, announce, wait))
    if received:
        raise Terminated(128 + received[0])
    try:
        if parent is not None and consumer.concurrency == 1:
            consumer.run_tasks_here(ended=exit_if_held_up)
        else:
            consumer.run(leave_at_second_signal=parent is None)  # a supervisor kills a child that takes too long
    except SystemExit as second_signal:
        code = int(second_signal.code or 0)
    finally:
        if parent is not None:
            ignore_signals()  # the supervisor sends an order and a signal; the signal may come later
        returned.set()
        log_stopped()
    if code is None and consumer.counters["overdue"]:
        code = 0
    if code is not None:
        _end(code, parent)


def _end(code: int, parent: Supervision | None) -> NoReturn:
    """Exit at once, because a normal exit waits for threads that a task has started, or that hang in a task."""
    flush()
    if parent is not None:
        parent.end_group_if_gone()
    os._exit(code)


@attrs.frozen
class _WaitingTransport:
    """A transport that waits until it can subscribe.

    Args:
        transport: The transport itself.
        prepare: Called before the first try; may raise.
        announce: Called when the consumer has subscribed.
        wait: Called after each try at which the transport was unavailable; may raise.
    """

    transport: Transport
    prepare: Callable[[], None]
    announce: Callable[[], None]
    wait: Callable[[TransportUnavailable], None]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        self.prepare()
        logged = False
        while True:
            try:
                subscription = self.transport.subscribe(queues, lease=lease)
            except TransportUnavailable as exc:
                self.wait(exc)
                if not logged:
                    logged = True
                    fields = {"error_type": type(exc).__name__, "error": error_text(exc)}
                    emit(logger, logging.WARNING, "transport_away", **fields, held=0)
            else:
                self.announce()
                return subscription

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[Sequence[int]]:
    """Raise Terminated on SIGTERM, until the consumer has its own handler: process 1 of a container would ignore it.

    The signal is also appended to the list that is yielded: Python discards an exception that is raised while an
    object is finalized.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> NoReturn:
        received.append(number)
        raise Terminated(128 + number)

    with handling((signal.SIGTERM,), handle):
        yield received
