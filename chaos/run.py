"""One run: start the processes, strike as the schedule says, stop the producers, drain, and take stock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos.broker_faults import BrokerFaults
from chaos.environments import Place, PostgresPlace
from chaos.evidence import Evidence, Fault
from chaos.faults import Faults
from chaos.postgres_faults import PostgresFaults
from chaos.processes import PATIENCE, Fleet
from chaos.recovery import recovery
from chaos.schedule import CALLBACKS, EXECUTORS, PRODUCERS, Planned

_RECOVERED = 15.0
"""Seconds after which the next fault comes, whether or not there was a recovery: the ledger tells what is lost."""
_QUIET, _SILENCE = 1.5, 8.0
"""Seconds in which nothing has happened any more: when all is over, and when what is missing will not come."""


def run(
    place: Place, planned: Sequence[Planned], directory: Path, say: Callable[[str], None], *, plant: str | None = None
) -> Evidence:
    """Carry out a schedule, and return what is left of it. Nothing of it goes on running."""
    fleet = Fleet(directory, place.url_of, plant=plant)
    faults: list[Fault] = []
    began = time.monotonic()
    try:
        fleet.start()
        say(f"{time.monotonic() - began:6.1f} s  the processes are ready")
        striking = PostgresFaults(fleet, place) if isinstance(place, PostgresPlace) else BrokerFaults(fleet, place)
        for number, one in enumerate(planned, 1):
            if one.waits and faults:
                _await_recovery(fleet, faults[-1])
            _strike(striking, number, one, faults, lambda text: say(f"{time.monotonic() - began:6.1f} s  {text}"))
        for fault in faults:
            _await_recovery(fleet, fault)
        fleet.stop(PRODUCERS)
        say(f"{time.monotonic() - began:6.1f} s  the producers have stopped; draining")
        for workers in (EXECUTORS, CALLBACKS):  # what executors still have to tell is called back, too
            _drain(fleet, place)
            fleet.stop(workers)
        say(f"{time.monotonic() - began:6.1f} s  over")
    finally:
        fleet.close()
    fleet.read()
    return Evidence(fleet.history, faults, place.rows(), place.left(), fleet.problems)


def _strike(striking: Faults, number: int, planned: Planned, faults: list[Fault], say: Callable[[str], None]) -> None:
    striking.fleet.pause(planned.pause)
    try:
        faults.append(striking.strike(number, planned))
    except TimeoutError as exc:
        striking.fleet.problems.append(f"{planned.kind.name} (fault {number}) could not be done: {exc}")
    say(f"{number:3} {planned.kind.name}: {', '.join(planned.victims or planned.steps) or 'everybody'}")


def _await_recovery(fleet: Fleet, fault: Fault) -> None:
    seconds = max(0.0, fault.ended + _RECOVERED - time.monotonic())
    fleet.passes(lambda: recovery(fault, fleet.history) is not None, seconds)


def _drain(fleet: Fleet, place: Place) -> None:
    """Wait until everything was called back and nothing is left; the ledger tells what was not."""
    counted, since = -1, time.monotonic()

    def is_over() -> bool:
        nonlocal counted, since
        if (found := sum(map(len, fleet.history.lines.values()))) != counted:
            counted, since = found, time.monotonic()
            return False
        quiet = _SILENCE if fleet.history.open else _QUIET
        return time.monotonic() - since > quiet and place.is_idle()

    fleet.passes(is_over, PATIENCE)
