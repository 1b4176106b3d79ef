"""The environment of a demo: all differences between the transports are in this class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from examples.product import Queues
from examples.workers import Workers
from unstract_core.transport import QueueState

StartsWorkers: TypeAlias = Callable[[Path, Mapping[str, str]], Workers]


@attrs.frozen(kw_only=True)
class Place:
    """A transport and its surroundings.

    Attributes:
        transport: The producer's transport.
        facts: Names and texts for people.
        workers: Creates the workers, from a directory for logs and an environment.
        left: Counts the messages in the queues after the workers have stopped; a queue of unknown state is omitted.
    """

    facts: Sequence[tuple[str, str]]
    queues: Queues
    transport: Any
    workers: StartsWorkers
    left: Callable[[], Sequence[QueueState]]
