"""What a consumer holds: a delivery on its way from being received to being settled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import attrs

from unstract_core.transport import Delivery, Settlement, Verdict

Key: TypeAlias = int
"""Of one delivery and no other: ids and attempts come again after a restore, while the old delivery is in flight."""


@attrs.define(eq=False)
class Held:
    """A delivery of ours. It is waiting until a thread takes it, and finished when it has a `settlement`.

    `finished` is when its outcome was known, on the monotonic clock.
    `until` is when its lease ends, on the monotonic clock and with a margin: after that it is not started any more.
    The other fields say how settling it went: `doubtful` if it may have taken effect; `failures` of it alone, since
    `failing_since`, while the transport answered others; `retry_at` the earliest moment of the next try; `original`
    what was to be settled, and `fallbacks` what else there is to try; `settled_before` how many statements had settled
    others when it first failed; `no_room` if it waits for a queue that is full.
    """

    delivery: Delivery
    until: float = math.inf
    lost: bool = False
    finished: float = 0.0
    settlement: Settlement | None = None
    doubtful: bool = False
    failures: int = 0
    failing_since: float = math.inf
    answers: int = -1
    settled_before: int | None = None
    retry_at: float = 0.0
    no_room: bool = False
    original: Settlement | None = None
    fallbacks: Iterator[Settlement] | None = None

    @property
    def key(self) -> Key:
        return id(self.delivery)

    @property
    def suspect(self) -> bool:
        """Whether settling it has failed when it was tried alone."""
        return self.retry_at > 0

    def give_back(self, why: str) -> None:
        """Let another worker have it: its task was never started, so the attempt does not count."""
        self.settlement = Settlement(self.delivery, Verdict.RETRY, reason=f"given back: {why}", counted=False)
