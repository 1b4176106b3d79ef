"""The processes of a supervisor: one for each slot, the spare processes, and those that are ending."""

from __future__ import annotations

import time

from unstract_core.cli.supervisor.protocol import ChildReport, Order
from unstract_core.cli.supervisor.worker_process import WorkerProcess


class WorkerPool:
    """Keeps the active process of each slot, and gives the slot to the next process when that one ends.

    A slot has at most two processes at a time.

    Attributes:
        active: The process of each slot, in the order of the slot numbers.
        leaving: The processes that have given up their slot and have not exited yet.
        stopping: Whether all processes must stop. After that no slot gets a next process.
    """

    def __init__(self, slots: int) -> None:
        self.active = [WorkerProcess(number) for number in range(1, slots + 1)]
        self.leaving: list[WorkerProcess] = []
        self.stopping = False

    def all(self) -> list[WorkerProcess]:
        """Return the active, the spare and the leaving processes."""
        spares = [child.spare for child in self.active if child.spare is not None]
        return [*self.active, *spares, *self.leaving]

    def running(self) -> list[WorkerProcess]:
        """Return those that have a process now."""
        return [child for child in self.all() if child.process is not None]

    def add_wanted_spares(self) -> None:
        """Add a spare if the active process has asked for one, unless a process of the slot is still ending."""
        for child in self.active:
            wanted = child.process is not None and child.spare_wanted and child.spare is None
            if wanted and self._leaving_from(child.number) is None:
                child.spare = WorkerProcess(child.number, start_at=child.start_at, is_spare=True)

    def hand_over(self, child: WorkerProcess) -> None:
        """Give the slot of a process that ends to its spare process, or to a new one that is started at once.

        If an earlier process of the slot is still ending, the slot gets no third process until one of the two has
        exited. Otherwise hanging tasks would add one process at each limit.
        """
        if child not in self.active or self.stopping:
            return
        if child.process is not None and self._leaving_from(child.number) is not None:
            return
        follower = child.spare or WorkerProcess(child.number, child.backoff)
        self.active[self.active.index(child)] = follower
        child.spare = None
        if follower.backoff is not child.backoff:
            child.backoff.merge(follower.backoff)
            follower.backoff = child.backoff
        follower.start_at = max(follower.start_at, child.start_at)
        if child.process is not None:
            self.leaving.append(child)
        if follower.is_spare:
            follower.is_spare = False
            follower.order(Order.TAKE_OVER)

    def stop(self) -> None:
        """Ask all processes to stop."""
        self.stopping = True
        for child in self.all():
            child.stop()

    def dismiss_spare(self, child: WorkerProcess) -> None:
        """Stop the spare of a process that works for longer than expected."""
        spare, child.spare = child.spare, None
        if spare is not None and spare.process is not None:
            spare.leave_reason, spare.leaving_since = ChildReport.SPARE_UNNEEDED, time.monotonic()
            self.leaving.append(spare)
            spare.stop()

    def remove_leaving(self, child: WorkerProcess) -> bool:
        """Remove a process that has exited from those that were ending; return whether it was one of them.

        The next process then gets the slot, if the active process was waiting for that.
        """
        if child not in self.leaving:
            return False
        self.leaving.remove(child)
        active = self.active[child.number - 1]
        if active.leave_reason is not None and active.process is not None:
            self.hand_over(active)
        return True

    def _leaving_from(self, number: int) -> WorkerProcess | None:
        return next((child for child in self.leaving if child.number == number), None)
