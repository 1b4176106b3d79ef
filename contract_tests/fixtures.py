"""The fixtures of the kit's tests. They all depend on `harness`, which the author of the transport provides."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from contract_tests import profiles, time_limits
from contract_tests.checking import CheckedSubscription, CheckedTransport
from contract_tests.harness import Harness
from contract_tests.kit import Kit
from contract_tests.requires import skip_unclaimed
from contract_tests.scenario import Scenario

Subscribe: TypeAlias = Callable[..., CheckedSubscription]

MAX_HANGING = 3
"""The number of tests of a transport that may exceed their time limit; the remaining ones are not run."""

_hanging: defaultdict[str, set[str]] = defaultdict(set)


@pytest.fixture(scope="session")
def kit(harness: Harness) -> Kit:
    return Kit(harness)


@pytest.fixture(autouse=True)
def time_limited(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip a test that needs an unclaimed capability, and end a test at its time limit."""
    if not str(getattr(request.function, "__module__", "")).startswith("contract_tests."):
        yield  # an author's own test, beside the imported ones
        return
    kit: Kit = request.getfixturevalue("kit")
    skip_unclaimed(request.function, kit.harness)
    name = kit.harness.name
    if len(_hanging[name]) >= MAX_HANGING:
        pytest.fail(
            f"not run: {MAX_HANGING} earlier tests of {name} exceeded their time limit; fix those first", pytrace=False
        )

    def doing() -> str:
        _hanging[name].add(request.node.nodeid)
        return f"{kit.calls}"

    kit.calls.violations.clear()
    with time_limits.limited(profiles.limit(), doing):
        yield
        with time_limits.as_failure():
            kit.clean()
    kit.calls.running.clear()
    if hasattr(sys, "last_value"):  # the test has failed already
        kit.calls.violations.clear()
    kit.calls.raise_violation()


@pytest.fixture
def transport(time_limited: None, kit: Kit) -> Iterator[CheckedTransport]:
    with time_limits.as_failure(), kit.open() as transport:
        yield transport


@pytest.fixture
def queue(kit: Kit) -> str:
    return kit.queue()


@pytest.fixture
def subscribe(transport: CheckedTransport) -> Iterator[Subscribe]:
    """A function that subscribes to queues. The subscriptions are closed after the test."""
    made: list[CheckedSubscription] = []

    def make(*queues: str, lease: float = 60.0) -> CheckedSubscription:
        made.append(transport.subscribe(list(queues), lease=lease))
        return made[-1]

    yield make
    with time_limits.as_failure():
        for subscription in made:
            subscription.close()


@pytest.fixture
def scenario(transport: CheckedTransport, kit: Kit) -> Scenario:
    """Two queues and a consumer whose tasks behave as their message says."""
    return Scenario(kit, transport, kit.queue(), kit.queue())
