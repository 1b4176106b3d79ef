"""The whole conformance kit of unstract-wire over this transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract_tests.suite import *

from wire_sqlite.harness import SqliteHarness


@pytest.fixture(scope="session")
def harness() -> Iterator[SqliteHarness]:
    with SqliteHarness() as harness:
        yield harness
