"""Fixtures and profiles for every test of this project."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import servers
from harness import Harness, memory_harness, postgres_harness
from hypothesis import HealthCheck, settings

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def embedded_url() -> Iterator[str]:
    """The URL of an embedded server, the newest major version there is."""
    with servers.embedded_server() as url:
        yield url


@pytest.fixture(scope="session")
def server_url() -> str:
    """The URL of the machine's own server."""
    url = servers.machine_server()
    if url is None:
        remedy = "start a PostgreSQL there, or point UNSTRACT_WIRE_TEST_POSTGRES at one"
        message = f"no PostgreSQL answers at {servers.SERVER_URL}: {remedy}"
        if servers.REQUIRE_SERVICES:
            pytest.fail(message)
        pytest.skip(message)
    return url


@pytest.fixture(scope="session", params=["memory", "postgres-embedded", "postgres-server", "postgres-polling"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """Each transport in turn, behind what the shared tests need of it."""
    if request.param == "memory":
        yield memory_harness()
        return
    url = request.getfixturevalue("server_url" if request.param == "postgres-server" else "embedded_url")
    with servers.fresh_schema(url) as schema:
        yield postgres_harness(url, schema, listen=request.param != "postgres-polling")
