"""`@requires("fencing")` skips a test if the transport does not claim that capability.

The decorator sets an attribute of the function. A pytest marker would have to be registered in each author's suite.
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
"""Start of the skip reason of a test that needs an unclaimed capability."""

CLAIMED = "does not apply: "
"""Start of the skip reason of a test that applies only without a capability."""

_NAMES = {field.name for field in attrs.fields(Capabilities)}


def requires(*capabilities: str) -> Callable[[Test], Test]:
    """Mark a test for transports that claim all of these capabilities.

    Raises:
        ValueError: A name is not a capability.
    """
    if unknown := set(capabilities) - _NAMES:
        raise ValueError(f"no such capability: {', '.join(sorted(unknown))}")

    def mark(test: Test) -> Test:
        vars(test)["requires"] = (*vars(test).get("requires", ()), *capabilities)
        return test

    return mark


def skip_unclaimed(test: Callable[..., Any], harness: Harness) -> None:
    """Skip the running test if the harness does not claim a capability that the test requires."""
    for name in vars(test).get("requires", ()):
        if not getattr(harness.capabilities, name):
            skip_not_claimed(name)


def skip_claimed(harness: Harness, capability: str) -> None:
    """Skip the running test, which checks a refusal, if the harness claims the capability."""
    if getattr(harness.capabilities, capability):
        pytest.skip(f"{CLAIMED}{capability} is claimed")


def skip_not_claimed(what: str) -> NoReturn:
    """Skip the running test with the unclaimed capability, or another missing precondition, as the reason."""
    pytest.skip(NOT_CLAIMED + what)
