"""Every test and fixture of the kit, for your own test suite: `from contract_tests.suite import *`.

Your suite must define one session-scoped fixture `harness` that yields an opened Harness. The kit is indivisible:
`TESTS` has all of its tests, and the plugin reports a run with fewer tests as incomplete.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import pytest

import contract_tests
from contract_tests.fixtures import kit, queue, scenario, subscribe, time_limited, transport

TESTS: dict[str, Callable[..., Any]] = {}
"""Every test function, by name."""

_FIXTURES = {
    "time_limited": time_limited,
    "kit": kit,
    "queue": queue,
    "subscribe": subscribe,
    "scenario": scenario,
    "transport": transport,
}


def _gather() -> None:
    for module in pkgutil.iter_modules(contract_tests.__path__, "contract_tests."):
        if module.name.startswith("contract_tests.test_"):
            if module.name not in sys.modules:
                pytest.register_assert_rewrite(module.name)
            found = importlib.import_module(module.name)
            tests = {name: test for name, test in vars(found).items() if name.startswith("test_")}
            if twice := TESTS.keys() & tests.keys():
                raise RuntimeError(f"two tests of the kit are named {', '.join(sorted(twice))}; rename one")
            TESTS.update(tests)


_gather()
globals().update(TESTS)

__all__ = [*_FIXTURES, *TESTS]
