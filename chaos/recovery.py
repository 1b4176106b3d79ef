"""The recovery time of a fault.

It starts when a process was killed or suspended, or when an outage is over. It ends with the last callback of the open
dispatches that the fault affected. A callback that ran when its worker was killed must run again. Without affected
dispatches it ends with the first callback of a later dispatch. If a producer was killed, that dispatch must come from
its slot.
"""

from __future__ import annotations

from chaos.evidence import InjectedFault
from chaos.history import History


def recovery(fault: InjectedFault, history: History) -> float | None:
    """Return the recovery time in seconds; None before the recovery."""
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
    """Return the slot of a producer that was hit, for its successor; "" if the victim is no producer."""
    (victim, *_) = sorted(fault.victims or ("",))
    return victim.partition(".")[0] + "." if victim.startswith("producer") else ""
