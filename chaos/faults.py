"""The faults that hit one process, on either transport; those of the servers are in the files that follow this one.

A fault stops a worker in a phase first (breakpoints.py), so that its unsettled deliveries are known.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs

from chaos import breakpoints
from chaos.evidence import InjectedFault
from chaos.messages import LEASE
from chaos.processes import Process, Processes
from chaos.schedule import PlannedFault

LONGER_THAN_A_LEASE = LEASE + 1.0


class FaultInjector:
    """Each method named after a kind of schedule.py does it, and returns when its cause is over."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def inject(self, number: int, planned: PlannedFault) -> InjectedFault:
        """Do a planned fault. Raises TimeoutError when it could not be done."""
        inject: Callable[[PlannedFault], InjectedFault] = getattr(self, planned.kind.name.replace("-", "_"))
        return attrs.evolve(inject(planned), number=number, name=planned.kind.name, excuses=planned.kind.excuses)

    def kill_claimed(self, planned: PlannedFault) -> InjectedFault:
        return self._killed_at(breakpoints.CLAIMED, planned)

    def kill_running(self, planned: PlannedFault) -> InjectedFault:
        return self._killed_at(breakpoints.RUNNING, planned)

    def kill_finished(self, planned: PlannedFault) -> InjectedFault:
        return self._killed_at(breakpoints.FINISHED, planned)

    def kill_settled(self, planned: PlannedFault) -> InjectedFault:
        return self._killed_at(breakpoints.SETTLED, planned)

    def kill_callback(self, planned: PlannedFault) -> InjectedFault:
        process = self.processes.ready(planned.victims[0])
        with self.stopped_at(process, breakpoints.RUNNING) as there:
            return attrs.evolve(self._killed(process, there), again=there)

    def kill_producer(self, planned: PlannedFault) -> InjectedFault:
        return self._killed_at(breakpoints.SENT, planned)

    def sigterm(self, planned: PlannedFault) -> InjectedFault:
        process = self.processes.ready(planned.victims[0])
        began, touched, awaited = time.monotonic(), self._claimed_by(process), self._open()
        self.processes.terminate(process)
        return attrs.evolve(self.ended_for(began, began, [process], touched), awaited=touched & awaited)

    @contextmanager
    def stopped_at(self, process: Process, phase: str) -> Iterator[frozenset[str]]:
        """Let a process stop at a phase, and yield the dispatches with which it stands there; then let it go on."""
        before = len(self.processes.history.stopped)

        def there() -> frozenset[str]:
            lines = self.processes.history.stopped[before:]
            return frozenset(line.dispatch for line in lines if (line.process, line.detail) == (process.name, phase))

        breakpoints.request(self.processes.directory, process.name, phase)
        try:
            self.processes.require(lambda: bool(there()), f"{process.name} to stop when {phase}")
            yield there()
        finally:
            breakpoints.release(self.processes.directory, process.name)

    def _killed_at(self, phase: str, planned: PlannedFault) -> InjectedFault:
        process = self.processes.ready(planned.victims[0])
        with self.stopped_at(process, phase) as there:
            return self._killed(process, there)

    def _killed(self, process: Process, touched: frozenset[str] = frozenset()) -> InjectedFault:
        killed = self.processes.kill(process)
        return self.ended_for(killed, killed, [process], touched | self._claimed_by(process))

    def ended_for(
        self, began: float, since: float, victims: Sequence[Process], touched: frozenset[str]
    ) -> InjectedFault:
        """Return a fault that is over now, and that is recovered from `since`."""
        names = frozenset(victim.name for victim in victims)
        return InjectedFault(0, "", began, time.monotonic(), since, names, touched, touched & self._open())

    def ended_for_all(self, began: float) -> InjectedFault:
        """Return a fault that is over now and has hit everybody."""
        now, touched = time.monotonic(), self._open()
        return InjectedFault(0, "", began, now, now, None, touched, touched)

    def _open(self) -> frozenset[str]:
        self.processes.read()
        return frozenset(self.processes.history.open)

    def _claimed_by(self, process: Process) -> frozenset[str]:
        self.processes.read()
        return frozenset(self.processes.history.claimed_by(process.name))

    def _suspended(self, process: Process, seconds: float, until: Callable[[], bool], what: str) -> tuple[float, float]:
        """Stop a process for so many seconds, and until something has come true; return when, from and to."""
        began = time.monotonic()
        self.processes.signal(process, signal.SIGSTOP)
        try:
            self.processes.pause(seconds)
            self.processes.require(until, what)
        finally:
            self.processes.signal(process, signal.SIGCONT)
        return began, time.monotonic()
