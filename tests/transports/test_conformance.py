"""The conformance kit over every transport of this package, on every kind of server: one import and one fixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pgbouncer import PooledHarness, private_pgbouncer

from contract_tests.harness import Harness, load_harness
from contract_tests.suite import *  # noqa: F403 - the suite is imported as a whole


def variant(harness: str, otherwise: str) -> Any:
    """Return the parameter of a harness over which the kit runs in `make test-all` only."""
    marker = pytest.mark.slow(
        variant=f"tests/transports/test_conformance.py, harness {harness}",
        reason=f"The whole kit takes about a minute for each harness; in `make test` {otherwise}.",
    )
    return pytest.param(harness, marks=marker)


PRIORITIES, QUORUM = "?x-max-priority=10", "?x-queue-type=quorum"
"""Arguments of RabbitMQ's queues. tests/celery_wire tests queues without arguments."""


@pytest.fixture(
    scope="session",
    params=[
        "memory",
        "postgres-embedded",
        variant("postgres-server", "it runs over the embedded server, a newer major version"),
        variant("postgres-polling", "it runs with LISTEN; tests/postgres/test_wake_up.py polls"),
        variant("pgbouncer-polling", "tests/postgres/test_pgbouncer.py runs through PgBouncer"),
        variant("pgbouncer-detected", "tests/postgres/test_pgbouncer.py runs through PgBouncer"),
        "celery-priority",
        variant("celery-quorum", "it runs over RabbitMQ's classic queues, with priorities"),
        variant("celery-memory", "it runs over RabbitMQ, the broker that is used in production"),
        variant("celery-redis", "it runs over RabbitMQ; tests/celery_wire/test_redis.py runs over Redis"),
    ],
)
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """The harness of each transport in turn."""
    if request.param.startswith("pgbouncer-"):
        with (
            private_pgbouncer(request.getfixturevalue("server_url")) as pgbouncer,
            PooledHarness(pgbouncer, polling=request.param == "pgbouncer-polling") as pooled,
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
