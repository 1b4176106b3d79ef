"""The place of one child: its process, the state of that process, and the time of the next start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

import attrs

from unstract_core.cli.supervisor.child import VARIABLE, ChildReport, Order, Role

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
LOOPING = 5
"""So many deaths in a row, none after a minute of life, are a crash loop."""
_MINUTE, _FORGOTTEN = 60.0, 300.0


@attrs.define
class Backoff:
    """How long to wait before the next start: twice as long after each death, until one has lived for five minutes."""

    deaths: int = 0
    """In a row, none of them after a minute of life."""
    _pause: float = 0.0

    @property
    def looping(self) -> bool:
        return self.deaths >= LOOPING

    def note_alive(self, seconds: float) -> None:
        """Note that a child has been at work for so long."""
        if seconds >= _MINUTE:
            self.deaths = 0
        if seconds >= _FORGOTTEN:
            self._pause = 0.0

    def merge(self, other: Backoff) -> None:
        """Keep the longer of two rows of deaths, and the longer pause: `other` becomes part of this one."""
        self.deaths, self._pause = max(self.deaths, other.deaths), max(self._pause, other._pause)

    def note_death(self, lived: float) -> float:
        """Note a death after so many seconds at work; return the seconds until the next start."""
        self.note_alive(lived)
        self.deaths += 1
        self._pause = min(LONGEST_PAUSE, max(SHORTEST_PAUSE, self._pause * 2))
        return self._pause


@attrs.define(eq=False)
class WorkerProcess:
    """One of the places, numbered from 1, and one process in it. Times are on the monotonic clock.

    Args:
        number: The place.
        backoff: That of the place. A spare process has its own, which joins that of the place when it takes over.
        orders: The write end of the pipe that the process reads.
        guard: The write end of the pipe at whose end the guard of the process's group ends that group.
        spare: The process that is to follow, which prepares while this one works on.
        is_spare: Whether this process is such a one, and has got no order to take over.
        spare_wanted: Whether the process has asked for another to prepare.
        ready_at: When a spare process had prepared; None before.
        refused: Whether the process could not work, and another one reports why.
        leaving_since: When the process began to leave.
        lateness_logged: Whether the supervisor has logged that the process takes long to leave.
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
    """When its process had subscribed."""
    last_report_at: float = 0.0
    away: bool = False
    silent: bool = False
    pipe_closed: bool = False
    """Its process has closed its end of the pipe, and may live on."""
    leave_reason: ChildReport | None = None
    """Why its process makes room for another."""
    leaving_since: float = 0.0
    lateness_logged: bool = False

    @property
    def lived(self) -> float:
        """For how many seconds its process has been at work."""
        return 0.0 if self.started_at is None else time.monotonic() - self.started_at

    @property
    def healthy_for(self) -> float:
        """For how many seconds its process has been at work or, where it has not begun, ready to follow another."""
        since = self.ready_at if self.started_at is None else self.started_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def state(self) -> str:
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
        """Start a process, which gets a pipe for its orders and one for its reports. Raises OSError.

        It has a session of its own: what is typed at the terminal is for the parent alone.
        """
        self.started_at, self.away, self.silent, self.pipe_closed, self.leave_reason = None, False, False, False, None
        self.is_spare, self.spare_wanted, self.ready_at, self.lateness_logged = role.spare, False, None, False
        with contextlib.ExitStack() as failed, contextlib.ExitStack() as theirs:
            failed.callback(self.close)
            self.reports, reports = _pipe(theirs, ours=0)
            self.orders, life = _pipe(theirs, ours=1)
            self.guard, watched = _pipe(theirs, ours=1)
            self.process = subprocess.Popen(  # noqa: S603 - the command that this process itself was started by
                command,
                env={**environment, VARIABLE: f"{life},{reports},{watched},{self.guard},{role}"},
                pass_fds=(life, reports, watched, self.guard),
                start_new_session=True,
            )
            failed.pop_all()
        self.last_report_at = time.monotonic()

    def order(self, order: Order) -> None:
        """Send the process an order, without waiting: it may have ended, or read nothing."""
        with contextlib.suppress(OSError):
            os.write(self.orders, order.value)

    def stop(self) -> None:
        """Ask the process to leave: by a signal, and by an order, which comes through where a task has the signal."""
        self.order(Order.STOP)
        self.signal(signal.SIGTERM)

    def read_reports(self) -> Iterator[ChildReport]:
        """Yield the reports that have come from the process since the last call."""
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self.reports, 4096):
                self.last_report_at = time.monotonic()
                for kind in said:
                    with contextlib.suppress(ValueError):  # a task has written into what is not its own
                        yield ChildReport(bytes([kind]))
            self.pipe_closed = True

    def signal(self, number: signal.Signals) -> None:
        """Signal the process. SIGKILL goes to its whole group, with the programs that its tasks have started."""
        if self.process is not None and self.process.poll() is None:
            if number == signal.SIGKILL:
                self.end_group()
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def end_group(self) -> None:
        """Kill the process, if it has not ended, and the programs that its tasks have started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: nothing but zombies is left of it
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        self.process = None
        with contextlib.suppress(OSError):
            os.write(self.guard, b"-")  # what the tasks of a process that left in good order have started may go on
        for end in (self.reports, self.orders, self.guard):
            if end >= 0:
                os.close(end)
        self.reports = self.orders = self.guard = -1


def _pipe(theirs: contextlib.ExitStack, *, ours: int) -> tuple[int, int]:
    """Return the ends of a new pipe: first `ours` (0 to read, 1 to write), which never blocks, then that of the child.

    The child's end is closed with `theirs`. Raises OSError where there is no descriptor left.
    """
    ends = os.pipe()
    theirs.callback(os.close, ends[1 - ours])
    os.set_blocking(ends[ours], False)
    return ends[ours], ends[1 - ours]
