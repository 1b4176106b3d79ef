"""The schedule of a run: the faults with their order, times and victims. It depends only on the seed.

Each round has every fault once, in random order. In the first round each fault waits for the recovery from the one
before. In later rounds about half of the faults do not wait.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

import attrs

TransportName: TypeAlias = Literal["postgresql", "amqp"]

EXECUTORS = ("executor-1", "executor-2", "executor-3")
CALLBACKS = ("callback-1", "callback-2")
PRODUCERS = ("producer-1", "producer-2")
SLOTS = (*EXECUTORS, *CALLBACKS, *PRODUCERS)

FRAMES = ("publish lost", "confirm lost", "acknowledgement lost", "acknowledgement passed on", "everything cut")
"""The frames at which a connection to the broker is cut."""

_PAUSES = (0.2, 1.0)
_GAPS = (0.05, 0.4)
_CUTS = 4


@attrs.frozen
class FaultKind:
    """A kind of fault.

    Attributes:
        name: The name for `--only` and the report.
        transports: The transports that it applies to.
        seconds: Roughly how long it takes, with its recovery.
        victims: The slots that it may hit; empty for all processes.
        excuses: Whether a task or callback may run again because of it.
    """

    name: str
    transports: tuple[TransportName, ...]
    seconds: float
    victims: tuple[str, ...] = ()
    excuses: bool = True


_POSTGRES: tuple[TransportName, ...] = ("postgresql",)
_AMQP: tuple[TransportName, ...] = ("amqp",)
_BOTH: tuple[TransportName, ...] = ("postgresql", "amqp")

FAULT_KINDS = (
    FaultKind("kill-claimed", _BOTH, 4, EXECUTORS),
    FaultKind("kill-running", _BOTH, 4, EXECUTORS),
    FaultKind("kill-finished", _BOTH, 4, EXECUTORS),
    FaultKind("kill-settling", _BOTH, 4, EXECUTORS),
    FaultKind("kill-settled", _BOTH, 4, EXECUTORS),
    FaultKind("kill-callback", _BOTH, 4, CALLBACKS),
    FaultKind("kill-producer", _BOTH, 2, PRODUCERS, excuses=False),
    FaultKind("sigterm", _BOTH, 2, EXECUTORS + CALLBACKS, excuses=False),
    FaultKind("sigstop", _POSTGRES, 6, EXECUTORS),
    FaultKind("backend-killed", _POSTGRES, 3, SLOTS, excuses=False),
    FaultKind("server-restart", _POSTGRES, 4),
    FaultKind("server-crash", _POSTGRES, 4),
    FaultKind("server-away", _POSTGRES, 24),
    FaultKind("pool-exhausted", _POSTGRES, 6, EXECUTORS + CALLBACKS),
    FaultKind("idle-in-transaction", _POSTGRES, 5),
    FaultKind("outage-while-settling", _POSTGRES, 8, EXECUTORS),
    FaultKind("broker-restart", _AMQP, 15),
    FaultKind("connection-cut", _AMQP, 3),
)


@attrs.frozen
class PlannedFault:
    """A fault of the schedule.

    Attributes:
        kind: The kind of fault.
        pause: Seconds before it.
        victims: The slots that it hits; empty for all processes.
        steps: The steps of a fault that has several.
        gaps: Seconds before each victim or step.
        waits: Whether it waits for the recovery from the previous fault.
    """

    kind: FaultKind
    pause: float
    victims: tuple[str, ...]
    steps: tuple[str, ...]
    gaps: tuple[float, ...]
    waits: bool

    def __str__(self) -> str:
        targets = ", ".join(self.victims or self.steps) or "all processes"
        return (
            f"{self.kind.name:<22} {self.pause:4.2f} s after {'recovery' if self.waits else 'the last one'}: {targets}"
        )


def schedule(
    seed: int, transport: TransportName, *, seconds: float = 0.0, only: Collection[str] = ()
) -> Sequence[PlannedFault]:
    """Return a schedule of whole rounds.

    Args:
        seed: The seed; the same seed gives the same schedule.
        transport: The transport of the run.
        seconds: The least duration of all rounds together; there is at least one round.
        only: The names of the kinds to include; empty for all.
    """
    chance = random.Random(f"{seed}/{transport}")
    kinds = [kind for kind in FAULT_KINDS if transport in kind.transports and (not only or kind.name in only)]
    planned: list[PlannedFault] = []
    while kinds and (not planned or sum(one.kind.seconds for one in planned) < seconds):
        first = not planned
        order = chance.sample(kinds, len(kinds))
        planned.extend(_planned(chance, kind, waits=first or chance.random() < 0.5) for kind in order)
    return planned


def _planned(chance: random.Random, kind: FaultKind, *, waits: bool) -> PlannedFault:
    steps: tuple[str, ...] = ()
    count = {"backend-killed": _CUTS, "pool-exhausted": 2}.get(kind.name, 1)
    victims = tuple(chance.sample(kind.victims, min(count, len(kind.victims))))
    if kind.name == "connection-cut":
        steps = tuple(chance.sample(FRAMES, len(FRAMES)))
    gaps = tuple(round(chance.uniform(*_GAPS), 3) for _ in victims + steps)
    return PlannedFault(kind, round(chance.uniform(*_PAUSES), 2), victims, steps, gaps, waits)
