"""`@requires("fencing")`: a test for those who claim it. Over others it is skipped; the reason names the capability.

A function's attribute and no pytest marker: in an author's own suite nobody has registered one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import attrs
import pytest

from contract_tests.harness import Harness
from unstract_core import Capabilities

Test = TypeVar("Test", bound=Callable[..., Any])

NOT_CLAIMED = "not claimed: "
"""How the reason of such a skip begins."""

CLAIMED = "does not apply: "
"""How the reason of a skip begins that is for those who do not claim something."""

_NAMES = {field.name for field in attrs.fields(Capabilities)}


def requires(*capabilities: str) -> Callable[[Test], Test]:
    """Mark a test as one for transports that claim all of these capabilities."""
    if unknown := set(capabilities) - _NAMES:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")

    def mark(test: Test) -> Test:
        vars(test)["requires"] = (*vars(test).get("requires", ()), *capabilities)
        return test

    return mark


def skip_unclaimed(test: Callable[..., Any], harness: Harness) -> None:
    """Skip the running test when the harness does not claim what it needs."""
    for name in vars(test).get("requires", ()):
        if not getattr(harness.capabilities, name):
            skip_not_claimed(name)


def skip_claimed(harness: Harness, capability: str) -> None:
    """Skip the running test, of how a lack is told, where there is none: other tests are for those who claim it."""
    if getattr(harness.capabilities, capability):
        pytest.skip(f"{CLAIMED}{capability} is claimed")


def skip_not_claimed(what: str) -> NoReturn:
    """Skip the running test, saying what is not claimed."""
    pytest.skip(NOT_CLAIMED + what)
