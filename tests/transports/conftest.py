"""A longer time limit for the kit's tests, because other tests run beside them, and a selection for polling transports.

Polling works the same with `listen=false`, behind a detected pooler, and without a pooler. If PgBouncer is installed,
only the transport with `listen=false` behind it runs the whole kit. The others run only the tests in which connections
matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pgbouncer import program

OTHER_POLLING = ("pgbouncer-detected", "postgres-polling")
WHERE_CONNECTIONS_MATTER = {f"contract_tests.test_{name}" for name in ("outages", "replies", "threads", "waking")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _is_left_out(item)])
    items[:] = [item for item in items if not _is_left_out(item)]


@pytest.fixture(scope="module", autouse=True)
def longer_time_limit() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTRACT_TESTS_TIME_LIMIT", "200")
        yield


def _is_left_out(item: pytest.Item) -> bool:
    return (
        isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("harness") in OTHER_POLLING[: 1 if program() is None else None]
        and item.function.__module__ not in WHERE_CONNECTIONS_MATTER
    )
