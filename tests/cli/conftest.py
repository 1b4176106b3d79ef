"""Fixtures that run the command: in this process, as a process of its own, and on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli import shared
from cli.outcomes import Ended
from click.testing import CliRunner, Result

from unstract_core import cli

ROOT = Path(__file__).parents[2]
PROGRAM = ("-m", "unstract_core")
ENTRY_POINTS = """[unstract_core.transports]
memory = transports.memory:from_url
postgresql = transports.postgres:from_url
echo = cli.shared:echoing
crash = cli.shared:crashing
"""

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a distribution that provides the URL schemes of the tests and of this package."""
    directory = tmp_path_factory.mktemp("registered")
    info = directory / "schemes_of_the_tests-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: schemes-of-the-tests\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return directory


@pytest.fixture(autouse=True)
def _isolated(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate the command from environment variables and the import path outside the tests."""
    for name in ("UNSTRACT_WIRE_URL", "UNSTRACT_WIRE_DEBUG", "COLUMNS", "FORCE_COLOR", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(registered), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (registered, ROOT, ROOT / "tests"))))


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> shared.Lasting:
    """The transport that `run` uses by default."""
    monkeypatch.setattr(shared, "current", shared.Lasting())
    return shared.current


@pytest.fixture
def run(transport: shared.Lasting) -> Run:
    """Run the command in this process, over `transport` by default."""

    def invoke(*arguments: str, url: str | None = "cli.shared:transport", **options: Any) -> Result:
        env = {} if url is None else {"UNSTRACT_WIRE_URL": url}
        return CliRunner().invoke(cli.main, list(arguments), env=env, **options)

    return invoke


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command as a process with pipes. Processes that still run after the test are killed."""
    started: list[subprocess.Popen[str]] = []

    def make(*arguments: str, program: Sequence[str] = PROGRAM, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, *program, *arguments]
        started.append(subprocess.Popen(command, text=True, **(pipes | options)))
        return started[-1]

    yield make
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def on_terminal() -> Callable[..., Ended]:
    """Run the command on a terminal of `width` columns and type `typed`; `out` is its output without styles."""

    def make(*arguments: str, typed: str = "", width: int = 80, program: Sequence[str] = PROGRAM) -> Ended:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, width))
        command = [sys.executable, *program, *arguments]
        env = os.environ | {"TERM": "xterm"}
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, env=env
        ) as child:
            os.close(theirs)
            os.write(ours, typed.encode())
            screen = b""
            with contextlib.suppress(OSError):  # a terminal ends with an error when its last user is gone
                while block := os.read(ours, 65536):
                    screen += block
            os.close(ours)
            err = child.stderr.read() if child.stderr else ""
        return Ended(child.returncode, re.sub(r"\x1b\[\d*m", "", screen.decode()).replace("\r\n", "\n"), err)

    return make
