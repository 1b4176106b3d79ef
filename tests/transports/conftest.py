"""The shared suite: every test here is run over each transport of the `harness` fixture, and names none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Harness

from unstract_core import Subscription


@pytest.fixture(autouse=True)
def claimed(request: pytest.FixtureRequest, harness: Harness) -> None:
    """Skip a test that needs what its transport does not claim: `@pytest.mark.needs("fencing")`."""
    for marker in request.node.iter_markers("needs"):
        for promise in marker.args:
            if (missing := harness.missing(promise)) is not None:
                pytest.skip(f"not claimed by this transport: {missing}")


@pytest.fixture
def transport(harness: Harness) -> Iterator[Any]:
    with harness.transport() as transport:
        yield transport


@pytest.fixture
def queue(harness: Harness) -> str:
    return harness.queue()


@pytest.fixture
def subscribe(transport: Any) -> Iterator[Callable[..., Subscription]]:
    """A factory of subscriptions to some queues, closed at the end."""
    made: list[Subscription] = []

    def make(*queues: str, lease: float = 60.0) -> Subscription:
        made.append(transport.subscribe(list(queues), lease=lease))
        return made[-1]

    yield make
    for subscription in made:
        subscription.close()
