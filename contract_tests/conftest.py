"""The fixtures for `pytest --pyargs contract_tests`, and a usage error if the plugin is not loaded."""

from __future__ import annotations

import pytest

from contract_tests.fixtures import kit, queue, scenario, subscribe, time_limited, transport

__all__ = ["kit", "queue", "scenario", "subscribe", "time_limited", "transport"]


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("contract_tests.plugin"):
        raise pytest.UsageError(
            "the conformance kit needs its plugin and a transport. Run: pytest -p contract_tests.plugin --pyargs"
            " contract_tests --transport module:factory (or: python -m contract_tests --transport module:factory)"
        )
