"""Transports with few capabilities pass the kit, which reports the reason of each skipped test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
from kit.runs import FinishedRun, run

from unstract_core import Capabilities

pytestmark = pytest.mark.timeout(400)
"""Seconds. The first test waits for runs of the whole kit, and the machine may be busy."""

CLAIMS = {field.name for field in attrs.fields(Capabilities)}

TRANSPORTS = {"bare": "kit.honest:bare", "brokerlike": "kit.brokerlike:broker"}
SECOND = pytest.mark.slow(
    variant="tests/kit/test_honest.py, transport brokerlike",
    reason="The whole kit takes half a minute; in `make test` it runs over the transport that claims nothing.",
)
NAMES = ["bare", pytest.param("brokerlike", marks=SECOND)]
HAS = {"bare": set[str](), "brokerlike": {"priority", "replies"}}
"""The capabilities of each transport."""


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, FinishedRun]:
    """Runs of the whole kit over each transport, in parallel, each on two workers of pytest-xdist."""

    def over(name: str) -> FinishedRun:
        return run(["--tb=short", "-n", "2", "--transport", TRANSPORTS[name]], tmp_path_factory.mktemp(name))

    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = sorted({item.callspec.params["name"] for item in ours})
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(over, wanted), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_transport_with_few_capabilities_is_conformant(ran: Mapping[str, FinishedRun], name: str) -> None:
    """Each test passes or is skipped, and the verdict is the same as with all capabilities."""
    assert ran[name].code == 0, ran[name].text[-4000:]
    assert re.search(rf"^{name}: conformant with wire v1, kit 1\.0: \d+ passed, \d+ not claimed$", ran[name].text, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_names_capabilities_of_skipped_tests(ran: Mapping[str, FinishedRun], name: str) -> None:
    """Each unclaimed capability is listed with the number of its skipped tests, and no claimed one."""
    listed = set(re.findall(r"^  not run, +\d+: (\w+) is not claimed$", ran[name].text, re.MULTILINE))
    missing = CLAIMS - HAS[name] - {"order_across_queues"}
    assert listed >= missing - {"atomic_settle", "inspection", "status", "priority"}
    assert listed <= CLAIMS - HAS[name]
    assert f"{name} claims: {', '.join(sorted(HAS[name])) or 'nothing'}" in ran[name].text
