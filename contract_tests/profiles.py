"""Profiles: the number of examples that hypothesis tries, and the time limit of each test.

The profile is chosen by `--kit-profile`, else by CONTRACT_TESTS_PROFILE, else it is `ci` if CI is set and `dev`
otherwise. It applies to the kit only: the hypothesis profile of the author's other tests does not change. The time
limit can be changed by `--kit-time-limit` or CONTRACT_TESTS_TIME_LIMIT.
"""

from __future__ import annotations

import math
import os

import attrs
from hypothesis import HealthCheck, settings


@attrs.frozen
class Profile:
    """How thoroughly the kit tests."""

    scale: float
    """Factor for the number of examples of each test."""
    limit: float
    """Time limit of each test, in seconds."""
    derandomize: bool = False
    """Whether each run tries the same examples."""


PROFILES = {
    "dev": Profile(scale=0.5, limit=60.0),
    "brief": Profile(scale=0.5, limit=60.0, derandomize=True),
    "ci": Profile(scale=1.0, limit=60.0, derandomize=True),
    "nightly": Profile(scale=50.0, limit=3600.0),
}


def chosen() -> Profile:
    """Return the profile of this run.

    Raises:
        KeyError: CONTRACT_TESTS_PROFILE is not the name of a profile.
    """
    return PROFILES[os.environ.get("CONTRACT_TESTS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")]


def limit(otherwise: float | None = None) -> float:
    """Return the time limit of a test, in seconds.

    Args:
        otherwise: The limit in seconds if the environment sets none; None for the limit of the profile.

    Raises:
        ValueError: CONTRACT_TESTS_TIME_LIMIT is not a positive number.
    """
    if not (given := os.environ.get("CONTRACT_TESTS_TIME_LIMIT")):
        return chosen().limit if otherwise is None else otherwise
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"a time limit is a number of seconds above 0, not {given!r}")
    return seconds


def examples(count: int, **options: int) -> settings:
    """Return the hypothesis settings of a test that tries `count` examples with the profile `ci`.

    Only runs with random examples use hypothesis' database of failed examples.
    """
    profile = chosen()
    return settings(
        max_examples=max(1, round(count * profile.scale)),
        deadline=None,
        derandomize=profile.derandomize,
        suppress_health_check=[HealthCheck.too_slow],
        **options,  # type: ignore[arg-type]  # stateful_step_count is the only other one
    )
