"""Faults over RabbitMQ: of the broker, and of connections at a certain frame."""

from __future__ import annotations

import time
from collections.abc import Callable

from chaos import breakpoints
from chaos.environments import BrokerEnvironment
from chaos.evidence import InjectedFault
from chaos.faults import FaultInjector
from chaos.processes import Processes
from chaos.schedule import FRAMES, PlannedFault

_PUBLISH = b"\x00\x3c\x00\x28"
_ACKNOWLEDGE = b"\x00\x3c\x00\x50"
"""The first bytes of the methods basic.publish and basic.ack inside their frames."""


class BrokerFaultInjector(FaultInjector):
    def __init__(self, processes: Processes, environment: BrokerEnvironment) -> None:
        super().__init__(processes)
        self.environment = environment

    def kill_settling(self, planned: PlannedFault) -> InjectedFault:
        """Kill a worker between the confirm of a callback and the acknowledgement of its task's message."""
        return self._killed_at(breakpoints.SETTLING, planned)

    def broker_restart(self, planned: PlannedFault) -> InjectedFault:
        began = time.monotonic()
        self.environment.broker.stop()
        self.environment.broker.start()
        return self.ended_for_all(began)

    def connection_cut(self, planned: PlannedFault) -> InjectedFault:
        """For each frame in turn, cut the first connection that sends it."""
        began = time.monotonic()
        for frame, gap in zip(planned.steps, planned.gaps, strict=True):
            self.processes.pause(gap)
            self._cuts[frame]()
            self.processes.require(lambda: self.environment.proxy.has_lost, f"a connection to be cut: {frame}")
        return self.ended_for_all(began)

    @property
    def _cuts(self) -> dict[str, Callable[[], None]]:
        between = self.environment.proxy
        cuts: list[Callable[[], None]] = [
            lambda: between.lose(_PUBLISH),
            lambda: between.lose_the_answer_to(_PUBLISH),
            lambda: between.lose(_ACKNOWLEDGE),
            lambda: between.lose_the_answer_to(_ACKNOWLEDGE),
            between.cut,
        ]
        return dict(zip(FRAMES, cuts, strict=True))
