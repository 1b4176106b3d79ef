"""One run: start the processes, inject the planned faults, stop the producers, drain, and return the evidence."""

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
"""Seconds after which the next fault follows, even without a recovery. The ledger reports lost dispatches."""
_QUIET, _MAX_SILENCE = 1.5, 8.0
"""Seconds without events after which a drain ends: if all callbacks ran, and if some are missing."""


def run(
    environment: Environment,
    planned: Sequence[PlannedFault],
    directory: Path,
    say: Callable[[str], None],
    *,
    plant: str | None = None,
) -> Evidence:
    """Run a schedule and return its evidence. All processes have ended afterwards.

    Args:
        environment: The private server.
        planned: The faults, in order.
        directory: Where the processes write their journals and logs.
        say: Prints a line.
        plant: The name of a planted bug; None for none.
    """
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
        for workers in (EXECUTORS, CALLBACKS):  # the executors may still send callbacks
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
        injector.processes.problems.append(f"{planned.kind.name} (fault {number}) could not be injected: {exc}")
    say(f"{number:3} {planned.kind.name}: {', '.join(planned.victims or planned.steps) or 'all processes'}")


def _await_recovery(processes: Processes, fault: InjectedFault) -> None:
    seconds = max(0.0, fault.ended + _RECOVERED - time.monotonic())
    processes.wait_for(lambda: recovery(fault, processes.history) is not None, seconds)


def _drain(processes: Processes, environment: Environment) -> None:
    """Wait until all callbacks ran and the queues are empty, or until nothing happens any more."""
    counted, since = -1, time.monotonic()

    def is_over() -> bool:
        nonlocal counted, since
        if (found := sum(map(len, processes.history.lines.values()))) != counted:
            counted, since = found, time.monotonic()
            return False
        quiet = _MAX_SILENCE if processes.history.open else _QUIET
        return time.monotonic() - since > quiet and environment.is_idle()

    processes.wait_for(is_over, MAX_WAIT)
