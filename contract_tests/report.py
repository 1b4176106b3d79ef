"""The summary of a run for each transport: its claims, the skipped tests with their reasons, and the verdict.

A verdict needs the whole kit: a selection of tests (`-k`, a single file) proves nothing about conformance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict, cast

import attrs
import pytest

from contract_tests import KIT_VERSION, WIRE_VERSION
from contract_tests.harness import Harness
from contract_tests.requires import CLAIMED, NOT_CLAIMED
from unstract_core import Capabilities


@attrs.define
class Tally:
    """The outcomes of the tests of one transport."""

    tests: set[str] = attrs.field(factory=set)
    nodeids: set[str] = attrs.field(factory=set)
    ended: set[str] = attrs.field(factory=set)
    deselected: int = 0
    passed: int = 0
    failed: set[str] = attrs.field(factory=set)
    unclaimed: Counter[str] = attrs.field(factory=Counter)
    skipped: Counter[str] = attrs.field(factory=Counter)

    @property
    def open(self) -> set[str]:
        """The ids of the tests that were collected and have not ended."""
        return self.nodeids - self.ended


class Selection(TypedDict):
    """The tests of one transport that were collected: their names, their ids, and how many were deselected."""

    tests: list[str]
    nodeids: list[str]
    deselected: int


class ConformanceReport:
    def __init__(self, harnesses: Sequence[Harness]) -> None:
        self._harnesses = list(harnesses)
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def collected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if (name := transport_of(item)) is not None:
                self._tallies[name].tests.add(cast(pytest.Function, item).function.__name__)
                self._tallies[name].nodeids.add(item.nodeid)

    def deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if (name := transport_of(item)) is not None:
                self._tallies[name].deselected += 1

    def selection(self) -> dict[str, Selection]:
        """Return what was collected, as a worker of pytest-xdist sends it to its controller."""
        return {
            name: {"tests": sorted(tally.tests), "nodeids": sorted(tally.nodeids), "deselected": tally.deselected}
            for name, tally in self._tallies.items()
        }

    def collected_elsewhere(self, selection: Mapping[str, Selection]) -> None:
        """Take over what a worker of pytest-xdist has collected; each of them collects the same."""
        for name, found in selection.items():
            tally = self._tallies[name]
            tally.tests.update(found["tests"])
            tally.nodeids.update(found["nodeids"])
            tally.deselected = found["deselected"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of a test; under pytest-xdist the controller is given those of each worker."""
        if (name := getattr(report, "kit_transport", None)) is None:
            return
        tally = self._tallies[name]
        if report.when == "teardown":
            tally.ended.add(report.nodeid)
        if report.failed:
            tally.failed.add(report.nodeid)
        elif report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if reason.startswith(CLAIMED):
                return
            if reason.startswith(NOT_CLAIMED):
                tally.unclaimed[reason.removeprefix(NOT_CLAIMED)] += 1
            else:
                tally.skipped[reason] += 1
        elif report.when == "call":
            tally.passed += 1

    @property
    def empty(self) -> bool:
        """Whether some transport has collected tests, but none of them passed or failed."""
        return any(tally.tests and not tally.passed and not tally.failed for tally in self._tallies.values())

    def lines(self) -> Iterator[str]:
        from contract_tests.suite import (
            TESTS,
        )  # imported late: the tests need the profile that pytest_configure chooses

        for harness in self._harnesses:
            tally = self._tallies[harness.name]
            yield ""
            claims = [name for name, claimed in attrs.asdict(harness.capabilities).items() if claimed]
            yield f"{harness.name} claims: {', '.join(claims) or 'nothing'}"
            for what, count in sorted(tally.unclaimed.items()):
                yield f"  not run, {count:3}: {_reason(what)}"
            for what, count in sorted(tally.skipped.items()):
                yield f"  SKIPPED, {count:3}: {what}"
            yield f"{harness.name}: {verdict(tally, set(TESTS))}"


def verdict(tally: Tally, whole: set[str]) -> str:
    counts = f"{tally.passed} passed, {tally.unclaimed.total()} not claimed"
    kit = f"wire v{WIRE_VERSION}, kit {KIT_VERSION}"
    if tally.failed:
        return f"NOT conformant with {kit}: {len(tally.failed)} failed, {counts}"
    if missing := max(len(whole - tally.tests), tally.deselected) + len(tally.open):
        return f"no verdict on conformance with {kit}, because {missing} of its tests were left out: {counts}"
    if tally.skipped:
        return f"no verdict on conformance with {kit}, because {tally.skipped.total()} tests were skipped: {counts}"
    if not tally.passed:
        return f"no verdict on conformance with {kit}: no test was run"
    return f"conformant with {kit}: {counts}"


def _reason(what: str) -> str:
    known = {field.name for field in attrs.fields(Capabilities)}
    return f"{what} is not claimed" if what in known else what


def transport_of(item: pytest.Item) -> str | None:
    """Return the name of the transport that a test of the kit uses; None for any other test."""
    if not isinstance(item, pytest.Function) or not item.module.__name__.startswith("contract_tests."):
        return None
    harness = item.callspec.params.get("harness") if hasattr(item, "callspec") else None
    return getattr(harness, "name", None)
