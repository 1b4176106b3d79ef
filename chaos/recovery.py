"""How long it took to recover from a fault. Pure.

The clock starts when a process was killed or stopped, and when an outage is over. It stops when the last of the
dispatches that were open then, and that the fault had touched, was called back; what a callback worker had called when
it was killed has to be called again. Where there was no such dispatch it stops with the first callback of one that was
sent after the clock was started (by the producer that was killed, if it was one).
"""

from __future__ import annotations

from chaos.evidence import InjectedFault
from chaos.history import History


def recovery(fault: InjectedFault, history: History) -> float | None:
    """Return the seconds, None while it has not been recovered from."""
    if not fault.awaited | fault.again:
        called = history.first_callback_after(fault.recovers_from, _sender(fault))
        return None if called is None else called - fault.recovers_from
    last = fault.recovers_from
    for dispatch in fault.awaited | fault.again:
        calls = [call.at for call in history.of(dispatch, "called")]
        later = [at for at in calls if at >= fault.recovers_from]
        if not calls or (not later and dispatch in fault.again):
            return None
        last = max(last, min(later, default=last))
    return last - fault.recovers_from


def _sender(fault: InjectedFault) -> str:
    """The slot of the producer that was hit, if it was one: another process takes it, and sends under its name."""
    (victim, *_) = sorted(fault.victims or ("",))
    return victim.partition(".")[0] + "." if victim.startswith("producer") else ""
