"""How a fault is planted: the memory transport with one part exchanged, registered with the test that must catch it.

A fault is a class, a child of the part in which it sits: the transport, its subscription, its store, its dead letters,
or its harness. The decorator `fault` names it after the class, wraps the sound rest around it, and keeps it in FAULTS.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import attrs

from transports.memory.harness import MemoryHarness
from transports.memory.store import Store
from transports.memory.subscription import MemorySubscription
from transports.memory.transport import MemoryDeadLetters, MemoryTransport
from unstract_core.transport import Capabilities, check_subscription

Part = TypeVar("Part", bound=type[Any])


class Composed(MemoryTransport):
    """The memory transport, of parts that can be exchanged."""

    store_type: ClassVar[type[Store]] = Store
    subscription_type: ClassVar[type[MemorySubscription]] = MemorySubscription
    letters_type: ClassVar[type[MemoryDeadLetters]] = MemoryDeadLetters

    def __init__(self) -> None:
        super().__init__()
        self._store = self.store_type(time.monotonic)
        self.dead = self.letters_type(self._store)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        names = check_subscription(queues, lease)
        with self._store.using():
            return self.subscription_type(self._store, names, lease)


class ComposedHarness(MemoryHarness):
    """The harness of a `Composed`."""

    transport_type: type[Composed] = Composed

    def __init__(self, name: str = "composed") -> None:
        self.name = name
        self.capabilities = self.transport_type.capabilities

    def transport(self) -> contextlib.closing[Any]:
        return contextlib.closing(self.transport_type())


@attrs.frozen
class PlantedFault:
    """A planted fault: what is wrong in one sentence, the test that must catch it, and words of that test's failure."""

    name: str
    about: str
    caught_by: str
    because: str
    make: Callable[[str], ComposedHarness]

    @property
    def hangs(self) -> bool:
        """Whether it is told by a call that does not end."""
        return self.because.startswith("is in ")

    def harness(self) -> ComposedHarness:
        return self.make(self.name)


FAULTS: dict[str, PlantedFault] = {}


def fault(caught_by: str, because: str, *, claims: Capabilities | None = None) -> Callable[[Part], Part]:
    """Register a class as a fault. Its docstring is what is wrong; `claims` what such a transport claims instead."""

    def register(part: Part) -> Part:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", part.__name__).lower()
        if name in FAULTS or not part.__doc__:
            raise ValueError(f"a fault has a name of its own and a docstring: {part.__name__}")
        about = " ".join(part.__doc__.split())
        FAULTS[name] = PlantedFault(name, about, caught_by, because, _around(part, claims))
        return part

    return register


def without(*names: str) -> Capabilities:
    """Return the claims of the memory transport but for these."""
    return attrs.evolve(MemoryTransport.capabilities, **dict.fromkeys(names, False))


def _around(part: type[Any], claims: Capabilities | None) -> type[ComposedHarness]:
    if issubclass(part, ComposedHarness):
        return part
    kinds = {Store: "store_type", MemorySubscription: "subscription_type", MemoryDeadLetters: "letters_type"}
    members: dict[str, Any] = {kinds[kind]: part for kind in kinds if issubclass(part, kind)}
    if claims is not None:
        members["capabilities"] = claims
    whole = type(part.__name__, (Composed if members.keys() & kinds.values() else part,), members)
    return type(part.__name__, (ComposedHarness,), {"transport_type": whole})
