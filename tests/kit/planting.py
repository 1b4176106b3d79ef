"""Planting faults: the memory transport with one faulty part, registered with the test that must catch it.

A fault is a subclass of the transport, its subscription, its store, its dead letters or its harness. The decorator
`fault` names it after the class, combines it with the sound parts, and adds it to FAULTS.
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
    """The memory transport with replaceable parts."""

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
    """The harness of a `Composed` transport."""

    transport_type: type[Composed] = Composed

    def __init__(self, name: str = "composed") -> None:
        self.name = name
        self.capabilities = self.transport_type.capabilities

    def transport(self) -> contextlib.closing[Any]:
        return contextlib.closing(self.transport_type())


@attrs.frozen
class PlantedFault:
    """A planted fault.

    Attributes:
        name: The class name in snake case.
        about: One sentence about the fault: the docstring of its class.
        caught_by: The name of the test that must fail.
        because: Words that the failure must contain.
        make: Returns the harness of the faulty transport.
    """

    name: str
    about: str
    caught_by: str
    because: str
    make: Callable[[str], ComposedHarness]

    @property
    def hangs(self) -> bool:
        """Whether its test must fail because a call does not return."""
        return self.because.startswith("is in ")

    def harness(self) -> ComposedHarness:
        return self.make(self.name)


FAULTS: dict[str, PlantedFault] = {}


def fault(caught_by: str, because: str, *, claims: Capabilities | None = None) -> Callable[[Part], Part]:
    """Register a class as a fault. Its docstring says what is wrong.

    Args:
        caught_by: The name of the test that must fail.
        because: Words that the failure must contain.
        claims: The capabilities of the faulty transport; None for those of the memory transport.
    """

    def register(part: Part) -> Part:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", part.__name__).lower()
        if name in FAULTS or not part.__doc__:
            raise ValueError(f"a fault has a name of its own and a docstring: {part.__name__}")
        about = " ".join(part.__doc__.split())
        FAULTS[name] = PlantedFault(name, about, caught_by, because, _around(part, claims))
        return part

    return register


def without(*names: str) -> Capabilities:
    """Return the capabilities of the memory transport without these."""
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
