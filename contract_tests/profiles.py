"""How many examples hypothesis tries: a few while developing, the same ones each time in CI, or half of them, many at
night.

A profile is chosen by `--kit-profile`, by CONTRACT_TESTS_PROFILE, or else is `ci` where CI is set and `dev` elsewhere.
It is the kit's own: whatever profile an author's suite loads for its other tests stays as it is. Its time limit can be
another one: `--kit-time-limit`, or CONTRACT_TESTS_TIME_LIMIT.
"""

from __future__ import annotations

import math
import os

import attrs
from hypothesis import HealthCheck, settings


@attrs.frozen
class Profile:
    """`scale` multiplies the examples of each test; `limit` is each test's time in seconds."""

    scale: float
    limit: float
    derandomize: bool = False


PROFILES = {
    "dev": Profile(scale=0.5, limit=60.0),
    "brief": Profile(scale=0.5, limit=60.0, derandomize=True),
    "ci": Profile(scale=1.0, limit=60.0, derandomize=True),
    "nightly": Profile(scale=50.0, limit=3600.0),
}


def chosen() -> Profile:
    """Return the profile of this run. Raises KeyError for a name that is none."""
    return PROFILES[os.environ.get("CONTRACT_TESTS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")]


def limit(otherwise: float | None = None) -> float:
    """Return the seconds that a test of this run has; `otherwise` where it is not the profile that says so.

    Raises ValueError for a limit of the environment that is none.
    """
    if not (given := os.environ.get("CONTRACT_TESTS_TIME_LIMIT")):
        return chosen().limit if otherwise is None else otherwise
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"a time limit is a number of seconds, more than 0, and not {given!r}")
    return seconds


def examples(count: int, **options: int) -> settings:
    """Return the settings of a test that tries `count` examples in CI.

    Derandomised runs neither read nor write hypothesis' database; the others keep there what has failed.
    """
    profile = chosen()
    return settings(
        max_examples=max(1, round(count * profile.scale)),
        deadline=None,
        derandomize=profile.derandomize,
        suppress_health_check=[HealthCheck.too_slow],
        **options,  # type: ignore[arg-type]  # stateful_step_count is the only other one
    )
