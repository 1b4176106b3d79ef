"""One run: start the processes, strike as the schedule says, stop the producers, drain, and take stock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos.broker_faults import BrokerFaultInjector
from chaos.environments import Environment, PostgresEnvironment
from chaos.evidence import Evidence, InjectedFault
from chaos.faults import FaultInjector
from chaos.postgres_faults import PostgresFaultInjector
from chaos.processes import MAX_WAIT, Processes
from chaos.recovery import recovery
from chaos.schedule import CALLBACKS, EXECUTORS, PRODUCERS, PlannedFault

_RECOVERED = 15.0
"""Seconds after which the next fault comes, whether or not there was a recovery: the ledger tells what is lost."""
_QUIET, _MAX_SILENCE = 1.5, 8.0
"""Seconds in which nothing has happened any more: when all is over, and when what is missing will not come."""


def run(
    environment: Environment,
    planned: Sequence[PlannedFault],
    directory: Path,
    say: Callable[[str], None],
    *,
    plant: str | None = None,
) -> Evidence:
    """Carry out a schedule, and return what is left of it. Nothing of it goes on running."""
    processes = Processes(directory, environment.url_of, plant=plant)
    faults: list[InjectedFault] = []
    began = time.monotonic()
    try:
        processes.start()
        say(f"{time.monotonic() - began:6.1f} s  the processes are ready")
        injector = (
            PostgresFaultInjector(processes, environment)
            if isinstance(environment, PostgresEnvironment)
            else BrokerFaultInjector(processes, environment)
        )
        for number, one in enumerate(planned, 1):
            if one.waits and faults:
                _await_recovery(processes, faults[-1])
            _inject(injector, number, one, faults, lambda text: say(f"{time.monotonic() - began:6.1f} s  {text}"))
        for fault in faults:
            _await_recovery(processes, fault)
        processes.stop(PRODUCERS)
        say(f"{time.monotonic() - began:6.1f} s  the producers have stopped; draining")
        for workers in (EXECUTORS, CALLBACKS):  # what executors still have to tell is called back, too
            _drain(processes, environment)
            processes.stop(workers)
        say(f"{time.monotonic() - began:6.1f} s  over")
    finally:
        processes.close()
    processes.read()
    return Evidence(processes.history, faults, environment.rows(), environment.remaining(), processes.problems)


def _inject(
    injector: FaultInjector, number: int, planned: PlannedFault, faults: list[InjectedFault], say: Callable[[str], None]
) -> None:
    injector.processes.pause(planned.pause)
    try:
        faults.append(injector.inject(number, planned))
    except TimeoutError as exc:
        injector.processes.problems.append(f"{planned.kind.name} (fault {number}) could not be done: {exc}")
    say(f"{number:3} {planned.kind.name}: {', '.join(planned.victims or planned.steps) or 'everybody'}")


def _await_recovery(processes: Processes, fault: InjectedFault) -> None:
    seconds = max(0.0, fault.ended + _RECOVERED - time.monotonic())
    processes.wait_for(lambda: recovery(fault, processes.history) is not None, seconds)


def _drain(processes: Processes, environment: Environment) -> None:
    """Wait until everything was called back and nothing is left; the ledger tells what was not."""
    counted, since = -1, time.monotonic()

    def is_over() -> bool:
        nonlocal counted, since
        if (found := sum(map(len, processes.history.lines.values()))) != counted:
            counted, since = found, time.monotonic()
            return False
        quiet = _MAX_SILENCE if processes.history.open else _QUIET
        return time.monotonic() - since > quiet and environment.is_idle()

    processes.wait_for(is_over, MAX_WAIT)
