"""The kit's own limit of a minute for each test is meant for a run of it alone; here much else runs beside it.

And what is left out: a transport that polls does the same whether it was told to, has found a pooler, or has none
before it. Where PgBouncer is installed the whole kit is run by the one that was told, through it; the others run the
tests alone in which connections listen, prepare, wait and are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pgbouncer import program

POLLING_TOO = ("pgbouncer-found", "postgres-polling")
WHERE_CONNECTIONS_MATTER = {f"contract_tests.test_{name}" for name in ("outages", "replies", "threads", "waking")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _is_left_out(item)])
    items[:] = [item for item in items if not _is_left_out(item)]


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTRACT_TESTS_TIME_LIMIT", "200")
        yield


def _is_left_out(item: pytest.Item) -> bool:
    return (
        isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("harness") in POLLING_TOO[: 1 if program() is None else None]
        and item.function.__module__ not in WHERE_CONNECTIONS_MATTER
    )
