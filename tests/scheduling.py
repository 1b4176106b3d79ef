"""Which tests run on the same worker of pytest-xdist, and which groups of tests begin.

The tests of one file share a worker, and so the fixtures of their module. There are two exceptions: the tests of a
file over another server are a group of their own, and the files that start a private RabbitMQ share one. It is a
scheduler of our own because the marker `xdist_group` of pytest-xdist 3.8 has no effect with pytest 9.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadFileScheduling

SERVERS = (
    *("memory", "postgres-embedded", "postgres-server", "postgres-polling", "pgbouncer-polling", "pgbouncer-detected"),
    *("celery-priority", "celery-quorum", "celery-memory", "celery-redis", "embedded", "server"),
    *("postgres", "rabbitmq", "inside"),
)
"""The parameters that stand for a server."""

PRIVATE_BROKER = tuple(f"tests/celery_wire/test_{name}.py" for name in ("backpressure", "outages", "publishing"))
"""A RabbitMQ takes seconds of processor time to start."""

FIRST = (
    *("tests/kit/test_faults.py", "tests/celery_wire/test_ab.py", "private RabbitMQ"),
    *("tests/postgres/test_crash_consistency.py embedded", "tests/cli/test_supervisor.py"),
    *("tests/kit/test_honest.py", "tests/transports/test_conformance.py postgres-embedded"),
    *("tests/transports/test_conformance.py celery-priority", "tests/transports/test_conformance.py memory"),
    *("tests/cli/test_payloads.py", "tests/examples/test_demo.py", "tests/postgres/test_connections.py embedded"),
    *("tests/examples/test_flip_the_flag.py", "tests/packaging/test_kit.py", "tests/kit/test_bad_harness.py"),
    *("tests/postgres/test_plans.py", "tests/postgres/test_pgbouncer.py"),
    *("tests/postgres/test_worker_processes.py embedded", "tests/chaos/test_run.py"),
)
"""The groups that take longest, so that none of them is alone at the end of a run."""

_SERVER = re.compile(rf"\[(?:[^\]]*-)?({'|'.join(SERVERS)})(?:-[^\]]*)?\]$")


def group_of(nodeid: str) -> str:
    """Return the name of the tests that run on the same worker as this one."""
    file = nodeid.partition("::")[0]
    if file in PRIVATE_BROKER:
        return "private RabbitMQ"
    found = _SERVER.search(nodeid)
    return f"{file} {found[1]}" if found else file


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in the order in which their groups are handed out."""
    place = {group: number for number, group in enumerate(FIRST)}
    return sorted(items, key=lambda item: place.get(group_of(item.nodeid), len(FIRST)))


class ByGroup(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """Hands out one group after another, in the order in which their tests were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
