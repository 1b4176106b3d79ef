"""Faults that hit one process, over either transport. Faults of servers are in postgres_faults and broker_faults.

A fault first stops a worker at a phase (breakpoints.py), so that its unsettled deliveries are known.
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
    """Injects faults. Each method is named after a kind of schedule.py and returns when the cause is over."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def inject(self, number: int, planned: PlannedFault) -> InjectedFault:
        """Inject a planned fault.

        Raises:
            TimeoutError: The fault could not be injected.
        """
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
        """Stop a process at a phase, yield the dispatches that it had there, and then let it continue."""
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
        """Return a fault of some victims that has ended now, and whose recovery time starts at `since`."""
        names = frozenset(victim.name for victim in victims)
        return InjectedFault(0, "", began, time.monotonic(), since, names, touched, touched & self._open())

    def ended_for_all(self, began: float) -> InjectedFault:
        """Return a fault of all processes that has ended now."""
        now, touched = time.monotonic(), self._open()
        return InjectedFault(0, "", began, now, now, None, touched, touched)

    def _open(self) -> frozenset[str]:
        self.processes.read()
        return frozenset(self.processes.history.open)

    def _claimed_by(self, process: Process) -> frozenset[str]:
        self.processes.read()
        return frozenset(self.processes.history.claimed_by(process.name))

    def _suspended(self, process: Process, seconds: float, until: Callable[[], bool], what: str) -> tuple[float, float]:
        """Suspend a process for some seconds and until a condition holds; return when it began and ended."""
        began = time.monotonic()
        self.processes.signal(process, signal.SIGSTOP)
        try:
            self.processes.pause(seconds)
            self.processes.require(until, what)
        finally:
            self.processes.signal(process, signal.SIGCONT)
        return began, time.monotonic()
