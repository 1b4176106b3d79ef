"""The conformance kit over every transport of this package, on every kind of server: one import and one fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pgbouncer import PooledHarness, private_pgbouncer

from contract_tests.harness import Harness, load_harness
from contract_tests.suite import *  # noqa: F403 - the suite is had whole, or not at all

PRIORITIES, QUORUM = "?x-max-priority=10", "?x-queue-type=quorum"
"""RabbitMQ's queues without arguments are those of tests/celery_wire."""


@pytest.fixture(
    scope="session",
    params=[
        "memory",
        "postgres-embedded",
        "postgres-server",
        "postgres-polling",
        "pgbouncer-told",
        "pgbouncer-found",
        "celery-priority",
        "celery-quorum",
        "celery-memory",
        "celery-redis",
    ],
)
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """Each transport in turn."""
    if request.param.startswith("pgbouncer-"):
        with (
            private_pgbouncer(request.getfixturevalue("server_url")) as pgbouncer,
            PooledHarness(pgbouncer, told=request.param == "pgbouncer-told") as pooled,
        ):
            yield pooled
        return
    match request.param:
        case "memory":
            spec = "memory"
        case "postgres-embedded":
            spec = request.getfixturevalue("embedded_url")
        case "postgres-server":
            spec = request.getfixturevalue("server_url")
        case "postgres-polling":
            spec = request.getfixturevalue("embedded_url") + "?listen=false"
        case "celery-priority":
            spec = request.getfixturevalue("rabbitmq_url") + PRIORITIES
        case "celery-quorum":
            spec = request.getfixturevalue("rabbitmq_url") + QUORUM
        case "celery-memory":
            spec = "celery+memory://kit"
        case redis:
            spec = request.getfixturevalue(redis.replace("celery-", "") + "_url")
    with load_harness(spec) as harness:
        yield harness
