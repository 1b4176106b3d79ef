"""The supervisor of a worker: it starts child processes, replaces those that end, and stops all of them together.

It imports neither the app nor a driver, and claims no message, so its death loses none. One thread does everything
here; signals and reports of children wake it. Any thread may call `health`.

All children start at the same time. Until one of them has subscribed, only the first child reports an error that no
restart can fix, and this error ends the supervisor. While a child is near a limit, it continues to work and a spare
child prepares. The spare takes over when the child ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unstract_core.cli.health_server import Health
from unstract_core.cli.process_exit import FAILED
from unstract_core.cli.supervisor.health import pool_health
from unstract_core.cli.supervisor.pool import WorkerPool
from unstract_core.cli.supervisor.protocol import ChildReport, Role
from unstract_core.cli.supervisor.signals import STOP_SIGNALS, exit_name, reap_orphans, woken_by_signals
from unstract_core.cli.supervisor.worker_process import WorkerProcess
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.supervisor")

KILLED = 128 + signal.SIGKILL
_LONGEST_WAIT = 5.0
_REAP_TIMEOUT = 5.0
_REQUESTED_EXITS = {0, *(code for number in STOP_SIGNALS for code in (-number, 128 + number))}


class Supervisor:
    """Runs a command in child processes until SIGTERM or SIGINT."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        processes: int,
        grace: float,
        silence_limit: float,
        on_exit: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """Prepare the children without starting them.

        Args:
            command: The command of a child, with its arguments.
            environment: The environment variables of a child.
            processes: The number of slots; each has one active child.
            grace: Seconds that all children together have to finish after the first signal.
            silence_limit: Seconds after which a child without a report is logged as silent, and a child that has not
                exited is logged as slow.
            on_exit: Called with the pid of each child that has exited.
        """
        self._command = command
        self._environment = environment
        self._grace = grace
        self._silence_limit = silence_limit
        self._on_exit = on_exit
        self._pool = WorkerPool(processes)
        self._ever_started = False
        self._signals: list[int] = []
        self._signals_handled = 0
        self._kill_at = math.inf
        self._killed = 0
        self._deaths = 0
        self._forced_exit: int | None = None

    def run(self) -> int:
        """Run the children, and return the exit code when all of them have ended.

        Returns:
            - 0 if all children ended by themselves
            - 1 if a child died while the worker stopped
            - 137 if some were killed after the grace period
            - 128 + N after a second signal with number N
            - 2 if the first child cannot work at all
        """
        started_at = time.monotonic()
        slots = len(self._pool.active)
        emit(logger, logging.INFO, "supervisor_started", processes=slots, grace=self._grace, pid=os.getpid())
        with woken_by_signals(self._signals) as selector:
            while (code := self._exit_code()) is None:
                self._start_due_children()
                self._wait(selector)
                self._handle_signals()
                self._reap()
                self._check_children()
            self._kill_all()
        seconds = round(time.monotonic() - started_at, 3)
        emit(logger, logging.INFO, "supervisor_stopped", seconds=seconds, killed=self._killed, exit=code)
        return code

    def health(self) -> Health:
        """Return the health of all children."""
        return pool_health(self._pool, self._silence_limit)

    def _exit_code(self) -> int | None:
        if self._forced_exit is not None:
            return self._forced_exit
        if not self._pool.stopping or self._pool.running():
            return None
        return KILLED if self._killed else int(self._deaths > 0)

    def _start_due_children(self) -> None:
        if self._pool.stopping:
            return
        self._pool.add_wanted_spares()
        for child in self._pool.all():
            if child.process is not None or child.start_at > time.monotonic():
                continue
            first = not self._ever_started
            share = (child.number - 1) / len(self._pool.active) if first else 0.0
            role = Role(first, silent=first and child.number > 1, spare=child.is_spare, share=share)
            try:
                child.start(self._command, self._environment, role)
            except OSError as exc:
                self._handle_death(child, type(exc).__name__, None)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        """Wait for a report, for a signal, or until something is due."""
        running = self._pool.running()
        moments = [time.monotonic() + _LONGEST_WAIT, self._kill_at]
        if not self._pool.stopping:
            moments += [child.start_at for child in self._pool.all() if child.process is None]
        moments += [child.last_report_at + self._silence_limit for child in running if not child.silent]
        with contextlib.ExitStack() as stack:
            for child in running:
                if not child.pipe_closed:
                    selector.register(child.reports, selectors.EVENT_READ)
                    stack.callback(selector.unregister, child.reports)
            for key, _ in selector.select(max(0.0, min(moments) - time.monotonic())):
                if key.data is self._signals:
                    os.read(key.fd, 4096)

    def _handle_signals(self) -> None:
        """Stop all children at the first signal, and exit at once at the second or after the grace period."""
        numbers = self._signals[self._signals_handled :]
        self._signals_handled += len(numbers)
        if numbers and not self._pool.stopping:
            self._kill_at = time.monotonic() + self._grace
            name = signal.Signals(numbers[0]).name
            emit(logger, logging.INFO, "supervisor_stopping", signal=name, grace=self._grace)
            self._pool.stop()
            numbers = numbers[1:]
        if numbers:
            self._forced_exit = 128 + numbers[0]
        elif time.monotonic() >= self._kill_at:
            self._kill_all()

    def _reap(self) -> None:
        """Read the reports of all children, and handle those that have exited."""
        for child in self._pool.running():
            if child.process is None:
                continue
            status = child.process.poll()
            for report in child.read_reports():
                self._handle_report(child, report)
            if status is not None:
                pid = child.process.pid
                self._handle_exit(child, pid, status)
                with contextlib.suppress(Exception):  # a failure of the metrics must not stop the supervision
                    self._on_exit(pid)
        if sys.platform == "linux":
            reap_orphans({child.process.pid for child in self._pool.running() if child.process is not None})

    def _handle_report(self, child: WorkerProcess, report: ChildReport) -> None:
        if child.process is None:
            return
        if child.silent:
            child.silent = False
            emit(logger, logging.INFO, "child_heard_again", **_ids(child))
        if report is ChildReport.STARTED:
            child.started_at = time.monotonic()
            self._note_start()
            emit(logger, logging.INFO, "child_started", **_ids(child))
        elif report.ends_child:
            if child.leave_reason is None:
                child.leaving_since = time.monotonic()
            child.leave_reason = report if report is ChildReport.OVERDUE else child.leave_reason or report
            self._pool.hand_over(child)
        elif report is ChildReport.LIMIT_NEAR:
            child.spare_wanted = True
        elif report is ChildReport.SPARE_UNNEEDED:
            child.spare_wanted = False
            self._pool.dismiss_spare(child)
        elif report is ChildReport.READY:
            child.ready_at = time.monotonic()
        else:
            child.away = report is ChildReport.UNAVAILABLE

    def _note_start(self) -> None:
        """Record that a child has started. From now on, a child that cannot work counts as a crash."""
        self._ever_started = True
        for child in self._pool.active:
            if child.refused:
                child.refused = False
                self._handle_death(child, FAILED, None)

    def _handle_exit(self, child: WorkerProcess, pid: int, status: int) -> None:
        """Log the exit of a child, and decide which process its slot gets."""
        died, stopping = self._is_death(child, status), self._pool.stopping
        lived, reason = child.lived, child.leave_reason
        if died or reason is ChildReport.OVERDUE:
            child.end_group()
        child.close()
        had_left = self._pool.remove_leaving(child)
        if not stopping and not self._ever_started and status == FAILED:
            if child.number == 1:
                self._forced_exit = status
            else:
                child.refused, child.start_at = True, math.inf
        elif died:
            self._handle_death(child, exit_name(status), pid, lived, had_left=had_left)
            if child.spare is not None:
                self._pool.hand_over(child)
        elif not stopping and reason is ChildReport.SPARE_UNNEEDED:
            emit(logger, logging.INFO, "spare_stopped", slot=child.number, pid=pid)
        elif not stopping and reason is not None:
            fields = {"reason": reason.name.lower(), "lived": round(lived, 1)}
            emit(logger, logging.INFO, "child_recycled", slot=child.number, pid=pid, **fields)

    def _is_death(self, child: WorkerProcess, status: int) -> bool:
        """Whether a child has exited without a request, or not in the way that was requested."""
        if not self._pool.stopping and child.leave_reason is not ChildReport.SPARE_UNNEEDED:
            return status != 0 or child.leave_reason is None
        return status not in _REQUESTED_EXITS

    def _handle_death(
        self, child: WorkerProcess, status: str | int, pid: int | None, lived: float = 0.0, *, had_left: bool = False
    ) -> None:
        """Log a death, and set the time of the next start.

        Args:
            child: The child that died, or could not be started.
            status: The exit code, or the name of the signal or of the error.
            pid: The process id; None if no process is known.
            lived: Seconds since the child subscribed.
            had_left: Whether the child had given up its slot. Its time of work then does not reset the count of deaths.
        """
        fields: dict[str, Any] = {"slot": child.number, "pid": pid, "exit": status, "lived": round(lived, 1)}
        spare = {"spare": True} if child.is_spare else {}
        if self._pool.stopping:
            self._deaths += 1
            emit(logger, logging.WARNING, "child_died", **fields, **spare)
            return
        was_looping = child.backoff.looping
        pause = child.backoff.note_death(0.0 if had_left else child.healthy_for)
        child.start_at = time.monotonic() + pause
        restart = {} if had_left else {"restart_in": pause}
        emit(logger, logging.WARNING, "child_died", **fields, **spare, **restart)
        if child.backoff.looping and not was_looping:
            deaths = child.backoff.deaths
            emit(logger, logging.ERROR, "crash_loop", slot=child.number, deaths=deaths, exit=status, **spare)

    def _check_children(self) -> None:
        """Log each child that is silent or slow to exit, and each crash loop that is over."""
        for child in self._pool.running():
            was_looping = child.backoff.looping
            if child not in self._pool.leaving:  # a child that hangs there would hide the deaths of its successors
                child.backoff.note_alive(child.healthy_for)
            if was_looping and not child.backoff.looping:
                emit(logger, logging.INFO, "crash_loop_over", **_ids(child))
            silent_for = time.monotonic() - child.last_report_at
            if silent_for >= self._silence_limit and not child.silent:
                child.silent = True
                emit(logger, logging.ERROR, "child_silent", **_ids(child), seconds=round(silent_for, 1))
            leaving_for = 0.0 if child.leave_reason is None else time.monotonic() - child.leaving_since
            if leaving_for >= self._grace and child.leave_reason is ChildReport.SPARE_UNNEEDED:
                child.signal(signal.SIGKILL)  # it has no message, and its slot must not wait for it
            if leaving_for >= self._silence_limit and not child.lateness_logged:
                child.lateness_logged = True
                emit(logger, logging.WARNING, "child_still_leaving", **_ids(child), seconds=round(leaving_for, 1))

    def _kill_all(self) -> None:
        """Kill all children that still run, and wait until they have exited."""
        running = self._pool.running()
        for child in running:
            if child.process is not None and child.process.poll() is None:
                if self._ever_started or self._forced_exit != FAILED:  # else the first child has reported the error
                    self._killed += 1
                    emit(logger, logging.WARNING, "child_killed", **_ids(child))
                child.signal(signal.SIGKILL)
        deadline = time.monotonic() + _REAP_TIMEOUT
        for child in running:
            if child.process is not None:
                with contextlib.suppress(Exception):  # an uninterruptible sleep, which no signal ends
                    child.process.wait(max(0.0, deadline - time.monotonic()))
                child.close()


def _ids(child: WorkerProcess) -> dict[str, object]:
    """Return the fields that name a child in a log event."""
    return {"slot": child.number, "pid": None if child.process is None else child.process.pid}
