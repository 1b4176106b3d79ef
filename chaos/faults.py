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
from chaos.evidence import Fault
from chaos.messages import LEASE
from chaos.processes import Fleet, Process
from chaos.schedule import Planned

BEYOND_A_LEASE = LEASE + 1.0


class Faults:
    """Each method named after a kind of schedule.py does it, and returns when its cause is over."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def strike(self, number: int, planned: Planned) -> Fault:
        """Do a planned fault. Raises TimeoutError when it could not be done."""
        strike: Callable[[Planned], Fault] = getattr(self, planned.kind.name.replace("-", "_"))
        return attrs.evolve(strike(planned), number=number, name=planned.kind.name, excuses=planned.kind.excuses)

    def kill_claimed(self, planned: Planned) -> Fault:
        return self._killed_at(breakpoints.CLAIMED, planned)

    def kill_running(self, planned: Planned) -> Fault:
        return self._killed_at(breakpoints.RUNNING, planned)

    def kill_finished(self, planned: Planned) -> Fault:
        return self._killed_at(breakpoints.FINISHED, planned)

    def kill_settled(self, planned: Planned) -> Fault:
        return self._killed_at(breakpoints.SETTLED, planned)

    def kill_callback(self, planned: Planned) -> Fault:
        process = self.fleet.ready(planned.victims[0])
        with self.halted(process, breakpoints.RUNNING) as there:
            return attrs.evolve(self._killed(process, there), again=there)

    def kill_producer(self, planned: Planned) -> Fault:
        return self._killed_at(breakpoints.SENT, planned)

    def sigterm(self, planned: Planned) -> Fault:
        process = self.fleet.ready(planned.victims[0])
        began, touched, awaited = time.monotonic(), self._in_hand(process), self._open()
        self.fleet.terminate(process)
        return attrs.evolve(self.hit(began, began, [process], touched), awaited=touched & awaited)

    @contextmanager
    def halted(self, process: Process, phase: str) -> Iterator[frozenset[str]]:
        """Let a process stop at a phase, and yield the dispatches with which it stands there; then let it go on."""
        before = len(self.fleet.history.halted)

        def there() -> frozenset[str]:
            lines = self.fleet.history.halted[before:]
            return frozenset(line.dispatch for line in lines if (line.process, line.detail) == (process.name, phase))

        breakpoints.ask(self.fleet.directory, process.name, phase)
        try:
            self.fleet.wait(lambda: bool(there()), f"{process.name} to stop when {phase}")
            yield there()
        finally:
            breakpoints.release(self.fleet.directory, process.name)

    def _killed_at(self, phase: str, planned: Planned) -> Fault:
        process = self.fleet.ready(planned.victims[0])
        with self.halted(process, phase) as there:
            return self._killed(process, there)

    def _killed(self, process: Process, touched: frozenset[str] = frozenset()) -> Fault:
        killed = self.fleet.kill(process)
        return self.hit(killed, killed, [process], touched | self._in_hand(process))

    def hit(self, began: float, since: float, victims: Sequence[Process], touched: frozenset[str]) -> Fault:
        """Return a fault that is over now, and that is recovered from `since`."""
        names = frozenset(victim.name for victim in victims)
        return Fault(0, "", began, time.monotonic(), since, names, touched, touched & self._open())

    def over(self, began: float) -> Fault:
        """Return a fault that is over now and has hit everybody."""
        now, touched = time.monotonic(), self._open()
        return Fault(0, "", began, now, now, None, touched, touched)

    def _open(self) -> frozenset[str]:
        self.fleet.read()
        return frozenset(self.fleet.history.open)

    def _in_hand(self, process: Process) -> frozenset[str]:
        self.fleet.read()
        return frozenset(self.fleet.history.held_by(process.name))

    def _stopped(self, process: Process, seconds: float, until: Callable[[], bool], what: str) -> tuple[float, float]:
        """Stop a process for so many seconds, and until something has come true; return when, from and to."""
        began = time.monotonic()
        self.fleet.signal(process, signal.SIGSTOP)
        try:
            self.fleet.pause(seconds)
            self.fleet.wait(until, what)
        finally:
            self.fleet.signal(process, signal.SIGCONT)
        return began, time.monotonic()
