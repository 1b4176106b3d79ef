"""The child of a supervisor: the orders that it receives and the reports that it sends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from unstract_core.cli.supervisor.group_guard import start_group_guard
from unstract_core.cli.supervisor.protocol import VARIABLE, ChildReport, Order, Role
from unstract_core.forking import reset_in_child

ABANDONED = 128 + signal.SIGKILL


class Parent:
    """The child's interface to its supervisor.

    Attributes:
        first: Whether no child of this supervisor has ever started.
        role: The role of this child.
        leaving: Why this child ends and needs a replacement; None while it runs normally.
        born: When this process began, on the monotonic clock.
        preparation: Seconds from `born` until this process was ready to subscribe; 0 before.
    """

    def __init__(self, life: int, reports: int, *, first: bool, role: Role | None = None, guard: int = -1) -> None:
        """Use the pipe ends of this process.

        Args:
            life: The read end of the pipe with the orders.
            reports: The write end of the pipe for the reports.
            first: Whether no child of this supervisor has ever started.
            role: The role of this child. None: a role with this `first` alone.
            guard: The write end of the guard's pipe; -1 for none.
        """
        self.first = first
        self.role = role or Role(first)
        self.leaving: ChildReport | None = None
        self.born = time.monotonic()
        self.preparation = 0.0
        self._take_over = threading.Event()
        self._gone = False
        self._life = life
        self._reports = reports
        self._guard = guard
        self._stop: Callable[[], None] = _terminate
        reset_in_child(self)
        for end in (life, reports):
            os.set_inheritable(end, False)  # programs that tasks start must not inherit the pipes
        os.set_blocking(reports, False)

    @classmethod
    def of_this_process(cls) -> Parent | None:
        """Return the supervisor of this process; None if this process has none."""
        variable = os.environ.pop(VARIABLE, "")  # a program that a task starts is no child of the supervisor
        if not variable:
            return None
        *ends, text = variable.split(",", 4)
        life, reports, watched, guard = map(int, ends)
        role = Role.of(text)
        start_group_guard(watched, guard)
        os.set_inheritable(guard, False)
        return cls(life, reports, first=role.first, role=role, guard=guard)

    def wait_for_turn(self, seconds: float) -> bool:
        """Report that this child is ready, and wait at most `seconds` for the order to take over.

        Returns:
            Whether this child may subscribe now. A child that is not a spare may do so at once.
        """
        self.preparation = self.preparation or time.monotonic() - self.born
        if not self.role.spare or self._take_over.is_set():
            return True
        self.report(ChildReport.READY)
        return self._take_over.wait(seconds)

    def report(self, report: ChildReport) -> None:
        """Send a report without waiting, because a stopped or dead supervisor does not read it."""
        if report.ends_child:
            self.leaving = report
        with contextlib.suppress(OSError):
            os.write(self._reports, report.value)

    def report_started(self) -> None:
        """Report that the consumer has subscribed."""
        self.report(ChildReport.STARTED)

    def report_unavailable(self) -> None:
        """Report that the child waits for a transport that is unavailable."""
        self.report(ChildReport.UNAVAILABLE)

    def is_replaced(self) -> bool:
        """Whether another child replaces this one."""
        return self.leaving is not None

    def reset_in_child(self) -> None:
        """Close the pipes in a process that was forked from this one: it is not a child of the supervisor."""
        for end in (self._life, self._reports, self._guard):
            with contextlib.suppress(OSError):
                os.close(end)
        self._life = self._reports = self._guard = -1

    def watch(self, grace: float) -> None:
        """Follow the orders on a thread. If the supervisor has died, stop, and exit after at most `grace` seconds."""
        threading.Thread(target=self._watch, args=[grace], name="unstract-wire-parent", daemon=True).start()

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Call `stop` from now on to stop this child. Before this call, the child stops by a SIGTERM to itself."""
        self._stop = stop

    def _watch(self, grace: float) -> None:
        while order := os.read(self._life, 1):
            if order == Order.TAKE_OVER.value:
                self._take_over.set()
            elif order == Order.STOP.value and self._stop is not _terminate:
                self._stop()  # a task may have replaced the handler of the SIGTERM that comes as well
        self._gone = True
        self._stop()
        time.sleep(grace)
        self.end_group_if_gone()
        os._exit(ABANDONED)

    def end_group_if_gone(self) -> None:
        """If the supervisor has died, kill this process and the programs that its tasks have started."""
        if self._gone and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
