"""The run of a worker's consumer, from its first log line to its last, and to the exit code of its process."""

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
from unstract_core.cli.process_exit import FAILED, HELD_UP, flush, ignore_signals
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
    """The supervisor of this process, as the run of a consumer sees it; `supervisor.child.Parent` implements it."""

    first: bool
    """Whether no child of the supervisor has ever started: an unavailable transport is then an error at once."""

    def wait_for_turn(self, seconds: float) -> bool: ...
    def report_started(self) -> None: ...
    def report_unavailable(self) -> None: ...
    def end_group_if_gone(self) -> None: ...


def run(consumer: Consumer, cli: CliContext, parent: Supervision | None, asked: Sequence[int]) -> None:
    """Run it, unless a signal has `asked` already to leave."""
    code: int | None = None
    started = 0.0
    back = threading.Event()

    def announce() -> None:
        nonlocal started
        started = time.monotonic()
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

    def prepared() -> None:
        """Wait for the place of another child, where this one is to take it."""
        while parent is not None and not parent.wait_for_turn(_MOMENT):
            if consumer.stopping:
                raise SystemExit(0)

    def wait(away: TransportUnavailable) -> None:
        """Wait for a moment, where the transport may be waited for: it has worked for a child before this one."""
        if parent is None or parent.first:
            raise away
        parent.report_unavailable()
        time.sleep(_MOMENT)
        if consumer.stopping:
            raise SystemExit(0)

    def stopped() -> None:
        if started:
            counts = {name: consumer.counters[name] for name in _COUNTERS}
            emit(logger, logging.INFO, "worker_stopped", seconds=round(time.monotonic() - started, 3), **counts)

    def held_up() -> None:
        """End this process if the main thread does not come back from its task, once the run has ended."""
        overdue = consumer.counters["overdue"]
        seconds = _MOMENT if overdue else HELD_UP
        if back.wait(seconds):
            return
        stopped()
        if not overdue:
            emit(logger, logging.WARNING, "exit_held_up", pid=os.getpid(), seconds=seconds)
        _end(0 if overdue else FAILED, parent)

    consumer.transport = cast(Transport, _Announced(consumer.transport, prepared, announce, wait))
    if asked:
        raise Terminated(128 + asked[0])
    try:
        if parent is not None and consumer.concurrency == 1:
            consumer.run_tasks_here(ended=held_up)
        else:
            consumer.run(leave_at_second_signal=parent is None)  # a parent kills what takes too long
    except SystemExit as second_signal:
        code = int(second_signal.code or 0)
    finally:
        if parent is not None:
            ignore_signals()  # the order to stop came by the pipe as well, and the signal may be still on its way
        back.set()
        stopped()
    if code is None and consumer.counters["overdue"]:
        code = 0
    if code is not None:
        _end(code, parent)


def _end(code: int, parent: Supervision | None) -> NoReturn:
    """End this process at once: a thread that a task has started, or that hangs in one, would hold up a normal exit."""
    flush()
    if parent is not None:
        parent.end_group_if_gone()
    os._exit(code)


@attrs.frozen
class _Announced:
    """A transport that tells when it was subscribed to: from then on the worker works.

    `prepared` is called before the first try, `wait` as long as the transport is away; both may raise.
    """

    transport: Transport
    prepared: Callable[[], None]
    announce: Callable[[], None]
    wait: Callable[[TransportUnavailable], None]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        self.prepared()
        told = False
        while True:
            try:
                subscription = self.transport.subscribe(queues, lease=lease)
            except TransportUnavailable as away:
                self.wait(away)
                if not told:
                    told = True
                    why = {"error_type": type(away).__name__, "error": error_text(away)}
                    emit(logger, logging.WARNING, "transport_away", **why, held=0)
            else:
                self.announce()
                return subscription

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@contextlib.contextmanager
def sigterm_leaves() -> Iterator[Sequence[int]]:
    """Let SIGTERM end the process before the consumer minds it: as process 1 of a container it would be ignored.

    It is also noted in the list that is yielded: an exception goes nowhere while an object is being finalized.
    """
    asked: list[int] = []

    def leave(number: int, snapshot: object) -> NoReturn:
        asked.append(number)
        raise Terminated(128 + number)

    with handling((signal.SIGTERM,), leave):
        yield asked
