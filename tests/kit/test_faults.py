"""The kit itself is tested: each planted fault makes its named test fail, for the expected reason."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from kit.faults import FAULTS
from kit.runs import run

from contract_tests.suite import TESTS

pytestmark = pytest.mark.timeout(400)
"""Seconds. The first test waits for runs of the whole kit, and the machine may be busy."""

PROCESSES = 10
"""Tests of faults mostly wait, so many runs of the kit can share a processor."""

Results: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]


def run_named(transports: Sequence[str], directory: Path) -> str:
    """Run the tests named by faults over these transports; return the output."""
    directory.mkdir()
    arguments = ["--tb=short", "-p", "kit.named_alone"]
    for transport in transports:
        arguments += ["--transport", transport if transport == "memory" else f"kit.faults:{transport}"]
    return run(arguments, directory, profile="ci", KIT_RESULTS=str(directory / "results")).text


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    """The outcomes of all tests by transport, and the whole output."""
    directory = tmp_path_factory.mktemp("faults")
    shares = [["memory"], *(list(FAULTS)[n :: PROCESSES - 1] for n in range(PROCESSES - 1))]
    places = [directory / str(n) for n in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        printed = list(pool.map(run_named, shares, places))
    results = defaultdict(list)
    for place in places:
        for line in (place / "results").read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            results[result["transport"]].append(result)
    return results, "\n".join(printed)


def test_every_fault_names_a_test_of_the_kit() -> None:
    """The test that each fault names exists."""
    assert {fault.caught_by for fault in FAULTS.values()} <= set(TESTS)


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_fails_its_named_test(ran: tuple[Results, str], name: str) -> None:
    """The named test fails over the faulty transport, and its failure contains the expected words."""
    results = ran[0][name]
    assert {one["test"] for one in results} == {FAULTS[name].caught_by}
    failed = [one for one in results if one["outcome"] == "failed"]
    assert [one["when"] for one in failed if one["when"] != "teardown"] == ["call"]
    assert FAULTS[name].because in failed[0]["text"]


def test_the_memory_transport_passes_every_named_test(ran: tuple[Results, str]) -> None:
    """The tests that fail over faulty transports pass over the sound memory transport."""
    assert [one["test"] for one in ran[0]["memory"] if one["outcome"] == "failed"] == []
    passed = {one["test"] for one in ran[0]["memory"] if one["when"] == "call" and one["outcome"] == "passed"}
    assert len(passed) > len(FAULTS) // 2


def test_no_fault_crashes_the_kit(ran: tuple[Results, str]) -> None:
    """Every fault ends in test failures and has a verdict in the summary; pytest itself does not fail."""
    assert "INTERNALERROR" not in ran[1]
    assert all(f"{name}: NOT conformant" in ran[1] for name in FAULTS)
