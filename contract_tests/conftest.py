"""For `pytest --pyargs contract_tests`: the fixtures, and a refusal to run without the plugin."""

from __future__ import annotations

import pytest

from contract_tests.fixtures import kit, queue, scenario, subscribe, time_limited, transport

__all__ = ["kit", "queue", "scenario", "subscribe", "time_limited", "transport"]


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("contract_tests.plugin"):
        raise pytest.UsageError(
            "the conformance kit needs a transport: pytest -p contract_tests.plugin --pyargs contract_tests"
            " --transport module:factory (or python -m contract_tests --transport module:factory)"
        )
