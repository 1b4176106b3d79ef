"""The faults over RabbitMQ: of the broker, and of a connection at a frame."""

from __future__ import annotations

import time
from collections.abc import Callable

from chaos import breakpoints
from chaos.environments import BrokerPlace
from chaos.evidence import Fault
from chaos.faults import Faults
from chaos.processes import Fleet
from chaos.schedule import FRAMES, Planned

_PUBLISH = b"\x00\x3c\x00\x28"
_ACKNOWLEDGE = b"\x00\x3c\x00\x50"
"""How the methods basic.publish and basic.ack begin, inside of their frames."""


class BrokerFaults(Faults):
    def __init__(self, fleet: Fleet, place: BrokerPlace) -> None:
        super().__init__(fleet)
        self.place = place

    def kill_settling(self, planned: Planned) -> Fault:
        """Kill a worker between the confirm of a callback and the acknowledgement of what it follows from."""
        return self._killed_at(breakpoints.SETTLING, planned)

    def broker_restart(self, planned: Planned) -> Fault:
        began = time.monotonic()
        self.place.broker.stop()
        self.place.broker.start()
        return self.over(began)

    def connection_cut(self, planned: Planned) -> Fault:
        """Cut whichever connection comes first to each of the frames, one after the other."""
        began = time.monotonic()
        for frame, gap in zip(planned.steps, planned.gaps, strict=True):
            self.fleet.pause(gap)
            self._cuts[frame]()
            self.fleet.wait(lambda: self.place.between.has_lost, f"a connection to be cut: {frame}")
        return self.over(began)

    @property
    def _cuts(self) -> dict[str, Callable[[], None]]:
        between = self.place.between
        cuts: list[Callable[[], None]] = [
            lambda: between.lose(_PUBLISH),
            lambda: between.lose_the_answer_to(_PUBLISH),
            lambda: between.lose(_ACKNOWLEDGE),
            lambda: between.lose_the_answer_to(_ACKNOWLEDGE),
            between.cut,
        ]
        return dict(zip(FRAMES, cuts, strict=True))
