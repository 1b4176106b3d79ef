"""The pytest plugin: `-p contract_tests.plugin --pyargs contract_tests --transport ...`.

The plugin must be loaded by name. If pytest loaded it automatically in every project, its options would collide with
those of projects whose conftest defines the same ones.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest

from contract_tests import profiles, time_limits
from contract_tests.checking import CallMonitor
from contract_tests.harness import Harness, load_harness
from contract_tests.report import ConformanceReport, transport_of
from unstract_core.errors import ConfigurationError

_HARNESSES = pytest.StashKey[list[Harness]]()
_REPORT = pytest.StashKey[ConformanceReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contract_tests", "conformance kit of unstract-wire")
    group.addoption(
        "--transport",
        action="append",
        default=[],
        metavar="TRANSPORT",
        dest="kit_transports",
        help="the transport to test: module:factory of its harness, an entry point's name, or a URL; may be repeated",
    )
    group.addoption(
        "--kit-profile",
        choices=sorted(profiles.PROFILES),
        dest="kit_profile",
        help="number of examples: dev (fast), brief (same examples each time), ci (twice as many), nightly (hours)",
    )
    group.addoption(
        "--kit-time-limit",
        metavar="SECONDS",
        dest="kit_time_limit",
        help="time limit in seconds for each test, and for opening and closing a harness"
        " (default: CONTRACT_TESTS_TIME_LIMIT, else 60, or 3600 for a nightly test)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.kit_profile:
        os.environ["CONTRACT_TESTS_PROFILE"] = config.option.kit_profile
    if config.option.kit_time_limit:
        os.environ["CONTRACT_TESTS_TIME_LIMIT"] = config.option.kit_time_limit
    try:
        profiles.chosen()
        profiles.limit()
    except ValueError as exc:
        raise pytest.UsageError(f"--kit-time-limit: {exc}") from None
    except KeyError as exc:
        raise pytest.UsageError(
            f"CONTRACT_TESTS_PROFILE must be one of {', '.join(profiles.PROFILES)}, not {exc}"
        ) from None
    harnesses = [_load(spec) for spec in config.option.kit_transports]
    names = [harness.name for harness in harnesses]
    if twice := {name for name in names if names.count(name) > 1}:
        raise pytest.UsageError(
            f"--transport: two harnesses are named {', '.join(twice)}; give each one a name of its own"
        )
    time_limits.report_abort = lambda words: _write_to_terminal(config, words)
    config.stash[_HARNESSES] = harnesses
    report = ConformanceReport(harnesses)
    config.stash[_REPORT] = report
    config.pluginmanager.register(report, "contract_tests.report")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _is_ours(metafunc.module.__name__) and "harness" in metafunc.fixturenames:
        harnesses = metafunc.config.stash[_HARNESSES]
        metafunc.parametrize(
            "harness", harnesses, ids=[harness.name for harness in harnesses], indirect=True, scope="session"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = any(isinstance(item, pytest.Function) and _is_ours(item.module.__name__) for item in items)
    if ours and not config.stash[_HARNESSES]:
        raise pytest.UsageError(
            "the conformance kit needs a transport: give --transport module:factory (or an entry point's name, or a"
            " URL)"
        )


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_REPORT].deselected(items)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run if no test of a transport passed or failed."""
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: its controller reports
        session.config.workeroutput["contract_tests"] = session.config.stash[_REPORT].selection()
    elif (
        exitstatus == pytest.ExitCode.OK
        and session.config.stash[_REPORT].empty
        and not session.config.option.collectonly
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[_REPORT].collected(session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has collected: its controller collects nothing."""
    node.config.stash[_REPORT].collected_elsewhere(getattr(node, "workeroutput", {}).get("contract_tests", {}))


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """Each harness of `--transport`, opened for the session."""
    found: Harness = request.param
    with _limited(found, "__enter__()"):
        opened = found.__enter__()
    yield opened
    with _limited(found, "__exit__()"):
        found.__exit__(None, None, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    report.kit_transport = transport_of(item)  # type: ignore[attr-defined]  # pytest-xdist sends it to its controller
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[_REPORT].lines():
        terminalreporter.write_line(line)


@contextlib.contextmanager
def _limited(harness: Harness, what: str) -> Iterator[None]:
    """Limit the time of a call of the harness, and name the harness and the call in every failure."""
    with (
        time_limits.as_failure(),
        CallMonitor(harness.name).call(f"the harness's {what}"),
        time_limits.limited(profiles.limit(60.0), lambda: f" in {what} of the harness {harness.name!r}"),
    ):
        yield


def _write_to_terminal(config: pytest.Config, words: str) -> None:
    """Write to the terminal although pytest captures output."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if terminal is not None and capture is not None:
        capture.suspend_global_capture(in_=True)
        terminal.ensure_newline()
        terminal.write_line(words)
        terminal.flush()
    elif capture is not None:  # a worker of pytest-xdist has no terminal
        capture.suspend_global_capture(in_=True)
        sys.stderr.write(f"{words}\n")
        sys.stderr.flush()


def _load(spec: str) -> Harness:
    try:
        return load_harness(spec)
    except ConfigurationError as exc:
        text = str(exc)
    except (Exception, SystemExit) as exc:  # the author's module may do anything when it is imported
        text = f"{spec} could not be loaded: {type(exc).__name__}: {exc}"
    with contextlib.suppress(ValueError):
        if password := urlsplit(spec).password:
            text = text.replace(password, "***")
    raise pytest.UsageError(f"--transport: {text}")


def _is_ours(module: str) -> bool:
    return module.startswith("contract_tests.")
