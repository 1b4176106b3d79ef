"""Fixtures and profiles for every test of this project."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import servers
from hypothesis import HealthCheck, settings

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs like this
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        servers.miss(f"no PostgreSQL answers at {servers.SERVER_URL}: {remedy}")
    return url


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    """The URL of the machine's own RabbitMQ."""
    url = servers.machine_broker()
    if url is None:
        remedy = "start a RabbitMQ there (rabbitmq-server -detached), or point UNSTRACT_WIRE_TEST_RABBITMQ at one"
        servers.miss(f"no RabbitMQ answers at {servers.BROKER_URL}: {remedy}")
    return url


@pytest.fixture(scope="session")
def redis_url() -> str:
    """The URL of a database of the machine's own Redis."""
    url = servers.machine_redis()
    if url is None:
        remedy = "start a Redis there (redis-server --daemonize yes), or point UNSTRACT_WIRE_TEST_REDIS at one"
        servers.miss(f"no Redis answers at {servers.REDIS_URL}: {remedy}")
    return url
