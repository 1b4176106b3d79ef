"""Where a demo plays. Whatever differs from one transport to another is in here, and nothing else asks which it is."""

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
    """`transport` is the producer's own, and `facts` are for people: each a name and a text.

    `workers` makes the workers, which log to a directory and find an environment. `left` counts what stands in the
    queues when they have gone; a queue whose state cannot be told is left out.
    """

    facts: Sequence[tuple[str, str]]
    queues: Queues
    transport: Any
    workers: StartsWorkers
    left: Callable[[], Sequence[QueueState]]
