"""Fixtures, hypothesis profiles and the selection of tests for the whole project.

A test that is marked `slow` runs in `make test-all` only. A run without the slow tests prints their number and their
reasons at its end. tests/scheduling.py says which tests share a worker of pytest-xdist.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import servers
from hypothesis import HealthCheck, settings
from scheduling import ByGroup, longest_first

settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("all", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

WORKERS_PER_CORE = 3
"""Most tests wait for a server or a process, so a core serves more than one pytest-xdist worker."""

_LEFT_OUT = pytest.StashKey[Counter[str]]()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs like this
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too; make test-all does")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers that `-n auto` starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return WORKERS_PER_CORE * cores


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """Return the scheduler for `--dist loadfile`."""
    return ByGroup(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.slow:
        slow = [item for item in items if item.get_closest_marker("slow") is not None]
        config.stash[_LEFT_OUT].update(reason_of(item) for item in slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]
    if hasattr(config, "workerinput"):
        items[:] = longest_first(items)


def reason_of(item: pytest.Item) -> str:
    """Return why a test is marked slow."""
    marker = item.get_closest_marker("slow")
    assert marker is not None
    return str(marker.kwargs["reason"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # on a worker of pytest-xdist, whose controller prints the summary
        left_out = session.config.stash[_LEFT_OUT]
        session.config.workeroutput["left_out"] = {reason: left_out[reason] for reason in left_out}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker has left out: each of them collects the same tests."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[_LEFT_OUT] = Counter(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[_LEFT_OUT]
    if left_out:
        terminalreporter.section(f"{left_out.total()} slow tests left out; make test-all runs them")
        for reason, count in sorted(left_out.items()):
            terminalreporter.write_line(f"{count:5}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_of_inner_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each pytest that a test starts a temporary directory of its own.

    A pytest that starts closes the directory of all runs to other users, also to the one as which an embedded
    PostgreSQL runs where the tests run as root.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DEBUG_TEMPROOT", str(tmp_path_factory.mktemp("inner")))
        yield


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
