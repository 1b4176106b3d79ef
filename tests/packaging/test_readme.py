"""README's shell lines, tasks, dispatch and test run as they are written."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import servers
from wheels import Environment

from tools.check_lock import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
USE = TEXT.partition("\n## Use\n")[2].partition("\n## ")[0]
TASKS, BACKEND, TEST = re.findall(r"```python\n(.*?)```", USE, re.DOTALL)
INSTALL, EXPORT, MIGRATE, WORKER = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", USE, flags=re.DOTALL), re.M)
URL = "postgresql://user@host/db"
DOCS = sorted((ROOT / "docs").glob("*.md"))


class Shell(NamedTuple):
    """README's shell lines: after `migrate` the worker, whose output is read."""

    process: subprocess.Popen[str]

    def read_until(self, part: str) -> None:
        read = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            read += line
            if part in line:
                return
        raise AssertionError(f"{part!r} was not printed:\n{read}")


@pytest.fixture
def url(embedded_url: str) -> Iterator[str]:
    """The URL of an empty database."""
    with servers.fresh_schema(embedded_url) as schema:
        yield f"{embedded_url}?schema={schema}"


@pytest.fixture
def shell(make_environment: Callable[..., Environment], url: str) -> Iterator[Shell]:
    """The lines in a shell with the installed packages, beside `tasks.py`; nothing is downloaded."""
    extras = re.fullmatch(r"pip install '\.\[([\w,]+)\]'", INSTALL)
    assert extras is not None
    environment = make_environment(*extras[1].split(","))
    (environment.work / "tasks.py").write_text(TASKS)
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNSTRACT"))}
    path = os.pathsep.join([str(environment.root / "bin"), os.environ["PATH"]])
    with subprocess.Popen(
        ["sh", "-ec", "\n".join([EXPORT.replace(URL, url), MIGRATE, f"exec {WORKER}"])],
        cwd=environment.work,
        env=settings | {"PATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield Shell(process)
        process.kill()


def dispatch(directory: Path, url: str, argument: str = '{"document": "d-1"}') -> dict[str, Any]:
    """Run the dispatch block, optionally with another argument; return its names."""
    assert BACKEND.count(URL) == BACKEND.count('[{"document": "d-1"}]') == 1
    script = directory / "backend.py"
    script.write_text(BACKEND.replace(URL, url).replace('{"document": "d-1"}', argument, 1))
    return runpy.run_path(str(script))


def test_readme_dispatch_is_run_with_its_callbacks(shell: Shell, url: str, tmp_path: Path) -> None:
    """The worker of README runs the dispatch, which ends in `saved`, and one that raises in `failed`."""
    shell.read_until("created pg_queue_message")
    shell.read_until("wire.worker_started")
    names = dispatch(tmp_path, url)
    dispatcher, transport = names["dispatcher"], names["dispatcher"].transport
    try:
        reply = transport.reply(names["handle"].id, timeout=60)
        assert (reply.status, reply.result) == ("completed", None)
        assert dispatcher.status(names["handle"].id) == reply
        shell.read_until("d-1 saved: 118.40")
        failing = dispatch(tmp_path, url, argument="{}")
        failing["dispatcher"].transport.close()
        shell.read_until(f"d-1 failed: {failing['handle'].id}")
        assert dispatcher.status(failing["handle"].id).error == "KeyError: 'document'"
        shell.process.send_signal(signal.SIGTERM)
        assert shell.process.wait(20) == 0
        assert not transport.dead.find()
    finally:
        transport.close()


def test_readme_test_passes(tmp_path: Path) -> None:
    """README's test passes on the memory transport beside `tasks.py`."""
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "test_tasks.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in DOCS)])
def test_relative_links_lead_to_files(document: str) -> None:
    """Every relative link of a document leads to a file."""
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).is_file()] == []


GUARANTEES = re.findall(r"\[`(test_\w+)`\]\(((?:contract_)?tests/[\w/]+\.py)\)", TEXT)


@pytest.mark.parametrize(("name", "path"), GUARANTEES, ids=[name for name, _ in GUARANTEES])
def test_guarantee_links_lead_to_their_tests(name: str, path: str) -> None:
    """The linked file has a test with the full name, so that `pytest -k` finds it."""
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_guarantee_names_a_test() -> None:
    """Each row of the table has a test."""
    rows = re.findall(r"^\| (?!guarantee|---).*$", TEXT.partition("\n## Guarantees")[2].partition("\n## ")[0], re.M)
    assert len(rows) == len(GUARANTEES) > 0
