"""The parent of a supervised worker: it keeps each place filled with a child, and ends them all together.

It imports neither the app nor a driver, and holds no message, so its end loses none. One thread does everything here,
read_end by signals and by reports of children; `health` is for any thread. All children are started side by side. Until
one has subscribed, the first alone reports an error that no restart fixes, and that ends the supervisor too. A child
that comes near a limit works on while another prepares, and that one takes over when the child leaves.
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
from collections.abc import Callable, Iterator, Mapping, Sequence

from unstract_core.cli.health_server import Health
from unstract_core.cli.process_exit import FAILED
from unstract_core.cli.supervisor.child import ChildReport, Order, Role
from unstract_core.cli.supervisor.worker_process import WorkerProcess
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.supervisor")

KILLED = 128 + signal.SIGKILL
_LONGEST_WAIT = 5.0
_REAP_TIMEOUT = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_REQUESTED_EXITS = {0, *(code for number in _STOPPING for code in (-number, 128 + number))}


class Supervisor:
    """Runs `command` in `processes` children until SIGTERM or SIGINT.

    Args:
        command: The command of a child, with its arguments.
        environment: The environment of a child.
        processes: How many places there are.
        grace: Seconds that all children together have to leave after the first signal.
        silence_limit: Seconds without a report after which a child is reported as silent, and seconds of leaving after
            which it is reported as slow.
        on_exit: Called with the pid of each child that has ended.
    """

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
        self._command = command
        self._environment = environment
        self._grace = grace
        self._silence_limit = silence_limit
        self._on_exit = on_exit
        self._active = [WorkerProcess(number) for number in range(1, processes + 1)]
        self._ever_started = False
        self._signals: list[int] = []
        self._signals_handled = 0
        self._kill_at: float | None = None
        self._killed = 0
        self._deaths = 0
        self._forced_exit: int | None = None
        self._leaving: list[WorkerProcess] = []

    def run(self) -> int:
        """Supervise, and return the exit code.

        0 when all children have left by themselves, 1 when one died meanwhile, 137 when some had to be killed, 128 + N
        after a second signal, and that of the first child (2) where it has found that nothing can work.
        """
        began = time.monotonic()
        emit(
            logger,
            logging.INFO,
            "supervisor_started",
            processes=len(self._active),
            grace=self._grace,
            pid=os.getpid(),
        )
        with self._woken_by_signals() as selector:
            while (code := self._exit_code()) is None:
                self._start_due_children()
                self._wait(selector)
                self._handle_signals()
                self._reap()
                self._check_children()
            self._kill_all()
        seconds = round(time.monotonic() - began, 3)
        emit(logger, logging.INFO, "supervisor_stopped", seconds=seconds, killed=self._killed, exit=code)
        return code

    def health(self) -> Health:
        """Return how the children are: healthy when each lives, was heard of lately, and none dies again and again."""
        reasons, children = [], []
        now = time.monotonic()
        if self._kill_at is not None:
            reasons.append("the worker stops")
        for child in self._all():
            process, state = child.process, child.state
            if state == "dead" and child in self._active:
                reasons.append(f"child {child.number} has died and is started again")
            if state == "silent":
                reasons.append(f"child {child.number} has not been heard of for {now - child.last_report_at:.0f} s")
            if child.backoff.looping and child not in self._leaving:
                spare = "the spare of " if child.is_spare else ""
                reasons.append(f"{spare}child {child.number} has died {child.backoff.deaths} times in a row")
            leaving = 0.0 if child.leave_reason is None or process is None else now - child.leaving_since
            if leaving >= self._silence_limit and child in self._active:
                reasons.append(
                    f"child {child.number} has taken no messages for {leaving:.0f} s: it leaves, and so does the one"
                    " before it; does a task hang? Give --task-deadline"
                )
            fields = {"slot": child.number, "state": state, "deaths": child.backoff.deaths, "away": child.away}
            if leaving:
                fields["leaving"] = round(leaving, 1)
            if process is not None:
                fields |= {
                    "pid": process.pid,
                    "heard": round(now - child.last_report_at, 1),
                    "lived": round(child.lived, 1),
                }
            children.append(fields)
        return Health(reasons, {"children": children})

    def _exit_code(self) -> int | None:
        if self._forced_exit is not None:
            return self._forced_exit
        if self._kill_at is None or any(child.process for child in self._all()):
            return None
        return KILLED if self._killed else int(self._deaths > 0)

    def _start_due_children(self) -> None:
        if self._kill_at is not None:
            return
        for child in self._active:
            wanted = child.process is not None and child.spare_wanted and child.spare is None
            if wanted and self._leaving_child(child.number) is None:
                child.spare = WorkerProcess(child.number, start_at=child.start_at, is_spare=True)
        for child in self._all():
            if child.process is not None or child.start_at > time.monotonic():
                continue
            first = not self._ever_started
            share = (child.number - 1) / len(self._active) if first else 0.0
            try:
                child.start(
                    self._command,
                    self._environment,
                    Role(first, silent=first and child.number > 1, spare=child.is_spare, share=share),
                )
            except OSError as exc:
                self._handle_death(child, type(exc).__name__, None)

    def _all(self) -> list[WorkerProcess]:
        """Return what is in the places, the processes that prepare to follow, and those that leave."""
        spares = [child.spare for child in self._active if child.spare is not None]
        return [*self._active, *spares, *self._leaving]

    def _leaving_child(self, number: int) -> WorkerProcess | None:
        """Return the process that has left a place to another one, and has not ended."""
        return next((child for child in self._leaving if child.number == number), None)

    def _hand_over(self, child: WorkerProcess) -> None:
        """Give the place of a process that leaves to the one that has prepared to follow, or to a new one at once.

        While an earlier process still leaves this place, the place stays with the process that has it. That ends when
        one of the two has ended: tasks that hang would otherwise add a process at each limit.
        """
        if child not in self._active or self._kill_at is not None:
            return
        if child.process is not None and self._leaving_child(child.number) is not None:
            return
        follower = child.spare or WorkerProcess(child.number, child.backoff)
        self._active[self._active.index(child)] = follower
        child.spare = None
        if follower.backoff is not child.backoff:
            child.backoff.merge(follower.backoff)
            follower.backoff = child.backoff
        follower.start_at = max(follower.start_at, child.start_at)
        if child.process is not None:
            self._leaving.append(child)
        if follower.is_spare:
            follower.is_spare = False
            follower.order(Order.TAKE_OVER)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        """Wait for a report, a signal or the next moment at which something is due."""
        moments = [time.monotonic() + _LONGEST_WAIT]
        if self._kill_at is not None:
            moments.append(self._kill_at)
        else:
            moments += [child.start_at for child in self._all() if child.process is None]
        moments += [
            child.last_report_at + self._silence_limit for child in self._all() if child.process and not child.silent
        ]
        with contextlib.ExitStack() as stack:
            for child in self._all():
                if child.process is not None and not child.pipe_closed:
                    selector.register(child.reports, selectors.EVENT_READ)
                    stack.callback(selector.unregister, child.reports)
            for key, _ in selector.select(max(0.0, min(moments) - time.monotonic())):
                if key.data is self:
                    os.read(key.fd, 4096)

    def _handle_signals(self) -> None:
        """Do what signals have asked for: the first ends all children in good order, the second at once."""
        asked = self._signals[self._signals_handled :]
        self._signals_handled += len(asked)
        if asked and self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace
            name = signal.Signals(asked[0]).name
            emit(logger, logging.INFO, "supervisor_stopping", signal=name, grace=self._grace)
            for child in self._all():
                child.stop()
            asked = asked[1:]
        if asked:
            self._forced_exit = 128 + asked[0]
        elif self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_all()

    def _reap(self) -> None:
        for child in self._all():
            if child.process is None:
                continue
            status = child.process.poll()
            for report in child.read_reports():
                self._handle_report(child, report)
            if status is not None:
                pid = child.process.pid
                self._handle_exit(child, pid, status)
                with contextlib.suppress(Exception):  # metrics are no reason to lose a worker, nor to be silent of it
                    self._on_exit(pid)
        if sys.platform == "linux":
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Let go of ended processes that are not ours: they fall to us where we are the first of a container.

        Ours are the children, and in our own process group what a library has started here.
        """
        ours = {child.process.pid for child in self._all() if child.process is not None}
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ours or os.getpgid(ended.si_pid) == os.getpgrp():
                    return  # other code waits for it; the next round sees to what is behind it
                os.waitpid(ended.si_pid, 0)

    def _handle_report(self, child: WorkerProcess, report: ChildReport) -> None:
        if child.process is None:
            return
        if child.silent:
            child.silent = False
            emit(logger, logging.INFO, "child_heard_again", slot=child.number, pid=child.process.pid)
        if report is ChildReport.STARTED:
            child.started_at = time.monotonic()
            self._note_start()
            emit(logger, logging.INFO, "child_started", slot=child.number, pid=child.process.pid)
        elif report.ends_child:
            if child.leave_reason is None:
                child.leaving_since = time.monotonic()
            child.leave_reason = report if report is ChildReport.OVERDUE else child.leave_reason or report
            self._hand_over(child)
        elif report is ChildReport.LIMIT_NEAR:
            child.spare_wanted = True
        elif report is ChildReport.SPARE_UNNEEDED:
            child.spare_wanted = False
            self._dismiss_spare(child)
        elif report is ChildReport.READY:
            child.ready_at = time.monotonic()
        else:
            child.away = report is ChildReport.UNAVAILABLE

    def _dismiss_spare(self, child: WorkerProcess) -> None:
        """Stop the process that prepares to follow another one, which goes on for longer than it seemed."""
        spare, child.spare = child.spare, None
        if spare is not None and spare.process is not None:
            spare.leave_reason, spare.leaving_since = ChildReport.SPARE_UNNEEDED, time.monotonic()
            self._leaving.append(spare)
            spare.stop()

    def _note_start(self) -> None:
        """Note that a child has started: what others could not do is a crash from now on."""
        self._ever_started = True
        for child in self._active:
            if child.refused:
                child.refused = False
                self._handle_death(child, FAILED, None)

    def _handle_exit(self, child: WorkerProcess, pid: int, status: int) -> None:
        """Let go of a child that has ended, and see to its place."""
        died, stopping = self._is_death(child, status), self._kill_at is not None
        lived, why = child.lived, child.leave_reason
        if died or why is ChildReport.OVERDUE:
            child.end_group()
        child.close()
        had_left = child in self._leaving
        if had_left:
            self._leaving.remove(child)
            place = self._active[child.number - 1]
            if place.leave_reason is not None and place.process is not None:
                self._hand_over(place)
        if not stopping and not self._ever_started and status == FAILED:
            if child.number == 1:
                self._forced_exit = status
            else:
                child.refused, child.start_at = True, math.inf
        elif died:
            self._handle_death(child, _exit_name(status), pid, lived, had_left=had_left)
            if child.spare is not None:
                self._hand_over(child)
        elif not stopping and why is ChildReport.SPARE_UNNEEDED:
            emit(logger, logging.INFO, "spare_stopped", slot=child.number, pid=pid)
        elif not stopping and why is not None:
            reason = why.name.lower()
            emit(
                logger, logging.INFO, "child_recycled", slot=child.number, pid=pid, reason=reason, lived=round(lived, 1)
            )

    def _is_death(self, child: WorkerProcess, status: int) -> bool:
        """Whether a child has ended otherwise than it says, or is asked to: by SIGTERM, where it had not begun."""
        if self._kill_at is None and child.leave_reason is not ChildReport.SPARE_UNNEEDED:
            return status != 0 or child.leave_reason is None
        return status not in _REQUESTED_EXITS

    def _handle_death(
        self, child: WorkerProcess, how: str | int, pid: int | None, lived: float = 0.0, *, had_left: bool = False
    ) -> None:
        """Log a death, and put off the next start. A process that `had_left` its place does not end a row of deaths."""
        told = {"slot": child.number, "pid": pid, "exit": how, "lived": round(lived, 1)}
        if child.is_spare:
            told["spare"] = True
        if self._kill_at is not None:
            self._deaths += 1
            emit(logger, logging.WARNING, "child_died", **told)
            return
        was_looping = child.backoff.looping
        pause = child.backoff.note_death(0.0 if had_left else child.healthy_for)
        child.start_at = time.monotonic() + pause
        if not had_left:
            told["restart_in"] = pause
        emit(logger, logging.WARNING, "child_died", **told)
        if child.backoff.looping and not was_looping:
            spare = {"spare": True} if child.is_spare else {}
            emit(logger, logging.ERROR, "crash_loop", slot=child.number, deaths=child.backoff.deaths, exit=how, **spare)

    def _check_children(self) -> None:
        """Report who has fallen silent, and who lives after all."""
        for child in self._all():
            if child.process is None:
                continue
            was_looping = child.backoff.looping
            if child not in self._leaving:  # one that hangs there would hide that the next ones die
                child.backoff.note_alive(child.healthy_for)
            if was_looping and not child.backoff.looping:
                emit(logger, logging.INFO, "crash_loop_over", slot=child.number, pid=child.process.pid)
            silent_for = time.monotonic() - child.last_report_at
            if silent_for >= self._silence_limit and not child.silent:
                child.silent = True
                seconds = round(silent_for, 1)
                emit(logger, logging.ERROR, "child_silent", slot=child.number, pid=child.process.pid, seconds=seconds)
            leaving = 0.0 if child.leave_reason is None else time.monotonic() - child.leaving_since
            if leaving >= self._grace and child.leave_reason is ChildReport.SPARE_UNNEEDED:
                child.signal(signal.SIGKILL)  # it holds no message, and its place must not wait for it
            if leaving >= self._silence_limit and not child.lateness_logged:
                child.lateness_logged = True
                seconds = round(leaving, 1)
                emit(
                    logger,
                    logging.WARNING,
                    "child_still_leaving",
                    slot=child.number,
                    pid=child.process.pid,
                    seconds=seconds,
                )

    def _kill_all(self) -> None:
        """Kill what is left, and wait for it to be gone."""
        left = [child for child in self._all() if child.process is not None]
        for child in left:
            if child.process is not None and child.process.poll() is None:
                if self._ever_started or self._forced_exit != FAILED:  # else none could work, and that was reported
                    self._killed += 1
                    emit(logger, logging.WARNING, "child_killed", slot=child.number, pid=child.process.pid)
                child.signal(signal.SIGKILL)
        deadline = time.monotonic() + _REAP_TIMEOUT
        for child in left:
            if child.process is not None:
                with contextlib.suppress(Exception):  # in an uninterruptible sleep, which no signal ends
                    child.process.wait(max(0.0, deadline - time.monotonic()))
                child.close()

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[selectors.BaseSelector]:
        """Be read_end by signals for as long as the block runs."""
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            read_end, wake_end = os.pipe()
            for end in (read_end, wake_end):
                stack.callback(os.close, end)
                os.set_blocking(end, False)
            selector.register(read_end, selectors.EVENT_READ, self)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False))
            for number in _STOPPING:
                stack.callback(signal.signal, number, signal.signal(number, lambda n, _: self._signals.append(n)))
            stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
            yield selector


def _exit_name(status: int) -> str | int:
    """Return the exit code, or the name of the signal that has ended a process."""
    try:
        return signal.Signals(-status).name if status < 0 else status
    except ValueError:
        return f"signal {-status}"
