"""The planted faults. Each one is a harness for the kit, such as `--transport kit.faults:loses_the_follow_up`."""

from __future__ import annotations

import importlib

from kit.planting import FAULTS, ComposedHarness, PlantedFault

__all__ = ["FAULTS", "PlantedFault"]

PARTS = ("sending", "claiming", "waiting", "settling", "fencing", "replies", "claims")

for part in PARTS:
    importlib.import_module(f"kit.faults_in_{part}")


def __getattr__(name: str) -> ComposedHarness:
    """Return the harness of the fault of this name."""
    if name not in FAULTS:
        raise AttributeError(f"there is no fault {name!r}")
    return FAULTS[name].harness()
