"""A pytest plugin that runs only the tests named by faults, and writes their outcomes as lines of JSON.

A faulty transport runs only the test named by its fault; the sound memory transport runs all of these tests. After a
fault was caught, its test is not run with other parameters, and hypothesis does not shrink the example. KIT_RESULTS is
the path of the output file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from kit.faults import FAULTS

from contract_tests.harness import Harness

HASTE, TIME_ENOUGH = "8", "60"
"""Time limits in seconds: for a fault whose test must hang, and for any other."""

settings.register_profile("caught is enough", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("caught is enough")

_named = {fault.caught_by for fault in FAULTS.values()}
_caught: set[str] = set()


def transport_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    harness = item.callspec.params["harness"]
    assert isinstance(harness, Harness)
    return harness.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        assert isinstance(item, pytest.Function)
        fault = FAULTS.get(transport_of(item))
        wanted = {fault.caught_by} if fault else _named
        (kept if item.function.__name__ in wanted else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    name = transport_of(item)
    if name in _caught:
        pytest.skip("caught already")
    os.environ["CONTRACT_TESTS_TIME_LIMIT"] = HASTE if name in FAULTS and FAULTS[name].hangs else TIME_ENOUGH


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    assert isinstance(item, pytest.Function)
    name = transport_of(item)
    if report.failed:
        _caught.add(name)
    line = {
        "transport": name,
        "test": item.function.__name__,
        "when": report.when,
        "outcome": report.outcome,
        "seconds": report.duration,
        "text": report.longreprtext,
    }
    with Path(os.environ["KIT_RESULTS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return report
