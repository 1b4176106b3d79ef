"""The wheel, built once, and environments that have it installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import wheels
from wheels import Environment, Wheel

from tools import check_lock

EnvironmentFactory = Callable[..., Environment]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The wheel of the checkout."""
    return wheels.read_wheel(wheels.build(check_lock.ROOT, tmp_path_factory.mktemp("wheel"), "wheel"))


@pytest.fixture(scope="session")
def make_environment(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> EnvironmentFactory:
    """Return a function that creates an environment with the wheel and the given extras."""
    return lambda *extras: wheels.make_environment(
        wheel, tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("work"), extras
    )


@pytest.fixture(scope="session")
def bare(make_environment: EnvironmentFactory) -> Environment:
    """The wheel without extras."""
    return make_environment()


@pytest.fixture(scope="session")
def full(make_environment: EnvironmentFactory) -> Environment:
    """The wheel with all its extras."""
    return make_environment("all")
