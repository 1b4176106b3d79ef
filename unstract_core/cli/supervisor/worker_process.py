"""One child process of the supervisor: its pipes, its state, and the time of its next start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

import attrs

from unstract_core.cli.supervisor.backoff import Backoff
from unstract_core.cli.supervisor.protocol import VARIABLE, ChildReport, Order, Role


@attrs.define(eq=False)
class WorkerProcess:
    """One process for a slot of the supervisor. Times are on the monotonic clock.

    Attributes:
        number: The number of the slot, from 1.
        backoff: The back-off of the slot. A spare process has its own, which is merged when it takes over.
        process: The process; None while there is none.
        reports: The read end of the pipe with the reports; -1 without a process.
        orders: The write end of the pipe for the orders; -1 without a process.
        guard: The write end of the pipe that keeps the guard of the process group waiting; -1 without a process.
        spare: The spare process for this slot, which prepares while this process works; None for none.
        is_spare: Whether this process is a spare that has not taken over yet.
        spare_wanted: Whether the process has asked for a spare.
        ready_at: When this spare process reported that it is ready; None before.
        refused: Whether the process exited because it cannot work, and another process reports the error.
        start_at: The earliest time of the next start.
        started_at: When the process subscribed; None before.
        last_report_at: When the last report was received, or when the process was started.
        away: Whether its transport is unavailable.
        silent: Whether the supervisor has logged that the process sends no reports.
        pipe_closed: Whether the process has closed its end of the report pipe; it may still run.
        leave_reason: Why the process ends and is replaced; None while it works normally.
        leaving_since: When the process began to finish its last tasks.
        lateness_logged: Whether the supervisor has logged that the process is slow to exit.
    """

    number: int
    backoff: Backoff = attrs.field(factory=Backoff)
    process: subprocess.Popen[bytes] | None = None
    reports: int = -1
    orders: int = -1
    guard: int = -1
    spare: WorkerProcess | None = None
    is_spare: bool = False
    spare_wanted: bool = False
    ready_at: float | None = None
    refused: bool = False
    start_at: float = 0.0
    started_at: float | None = None
    last_report_at: float = 0.0
    away: bool = False
    silent: bool = False
    pipe_closed: bool = False
    leave_reason: ChildReport | None = None
    leaving_since: float = 0.0
    lateness_logged: bool = False

    @property
    def lived(self) -> float:
        """Seconds since the process subscribed; 0 before."""
        return 0.0 if self.started_at is None else time.monotonic() - self.started_at

    @property
    def healthy_for(self) -> float:
        """Seconds since the process subscribed or, for a spare process, since it was ready; 0 before."""
        since = self.ready_at if self.started_at is None else self.started_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def state(self) -> str:
        """The state of the process, as /healthz shows it."""
        if self.process is None:
            return "dead" if self.backoff.deaths else "waiting"
        if self.silent:
            return "silent"
        if self.leave_reason is not None:
            return "recycling"
        if self.is_spare and self.ready_at is not None:
            return "spare"
        return "starting" if self.started_at is None else "running"

    def start(self, command: Sequence[str], environment: Mapping[str, str], role: Role) -> None:
        """Start the process, with one pipe for its orders and one for its reports.

        The process gets a new session, so that a signal from the terminal reaches only the supervisor.

        Args:
            command: The command with its arguments.
            environment: The environment variables.
            role: The role of the process.

        Raises:
            OSError: No process can be started, or no file can be opened. No pipe remains open.
        """
        self.started_at, self.away, self.silent, self.pipe_closed, self.leave_reason = None, False, False, False, None
        self.is_spare, self.spare_wanted, self.ready_at, self.lateness_logged = role.spare, False, None, False
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as child_ends:
            on_failure.callback(self.close)
            self.reports, reports = _pipe(child_ends, ours=0)
            self.orders, life = _pipe(child_ends, ours=1)
            self.guard, watched = _pipe(child_ends, ours=1)
            self.process = subprocess.Popen(  # noqa: S603 - the command that this process itself was started by
                command,
                env={**environment, VARIABLE: f"{life},{reports},{watched},{self.guard},{role}"},
                pass_fds=(life, reports, watched, self.guard),
                start_new_session=True,
            )
            on_failure.pop_all()
        self.last_report_at = time.monotonic()

    def order(self, order: Order) -> None:
        """Send an order without waiting, because the process may have exited, or may not read it."""
        with contextlib.suppress(OSError):
            os.write(self.orders, order.value)

    def stop(self) -> None:
        """Ask the process to stop, by SIGTERM and by an order: a task may have replaced the handler of the signal."""
        self.order(Order.STOP)
        self.signal(signal.SIGTERM)

    def read_reports(self) -> Iterator[ChildReport]:
        """Yield the reports that were received since the last call."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reports, 4096):
                self.last_report_at = time.monotonic()
                for byte in data:
                    with contextlib.suppress(ValueError):  # a task may write to any open file
                        yield ChildReport(bytes([byte]))
            self.pipe_closed = True

    def signal(self, number: signal.Signals) -> None:
        """Signal the process. SIGKILL also reaches the programs that its tasks have started."""
        if self.process is not None and self.process.poll() is None:
            if number == signal.SIGKILL:
                self.end_group()
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def end_group(self) -> None:
        """Kill the process, if it still runs, and the programs that its tasks have started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group has only zombies
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes of a process that has exited."""
        self.process = None
        with contextlib.suppress(OSError):
            os.write(self.guard, b"-")  # programs that a task started may outlive a process that ended well
        for end in (self.reports, self.orders, self.guard):
            if end >= 0:
                os.close(end)
        self.reports = self.orders = self.guard = -1


def _pipe(child_ends: contextlib.ExitStack, *, ours: int) -> tuple[int, int]:
    """Open a pipe, and return the supervisor's end, which never blocks, and the child's end.

    Args:
        child_ends: Closes the child's end in this process.
        ours: Which end the supervisor gets: 0 for the read end, 1 for the write end.

    Raises:
        OSError: No more files can be opened.
    """
    ends = os.pipe()
    child_ends.callback(os.close, ends[1 - ours])
    os.set_blocking(ends[ours], False)
    return ends[ours], ends[1 - ours]
