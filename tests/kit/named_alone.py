"""A pytest plugin: of the kit only the tests that faults are named for, and what became of them, as lines of JSON.

A faulty transport is given the test that is named for its fault alone; the memory transport, which is sound, all of
those. A fault that was caught is not tried again with other parameters, and nothing is shrunk: what counts is that it
was caught, and by which words. KIT_RESULTS names the file that the lines are written to.
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
"""Seconds after which a test is ended: of a fault that is told by a call without an end, and of any other."""

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
