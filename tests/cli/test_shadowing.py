"""Project modules with the names of other modules: the command and its children import the same ones."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from supervised import ROOT, worker

SCRIPT = str(Path(sys.executable).parent / "unstract-wire")


@pytest.mark.parametrize("name", ["queue", "attrs"])
def test_children_import_the_same_modules_as_the_command(tmp_path: Path, name: str) -> None:
    """A project module that hides a standard or required module does not stop children from starting."""
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is the module of the project')\n")
    (tmp_path / "project.py").write_text("import helpers\ntasks = {'t': print}\n")
    (tmp_path / "helpers.py").write_text("")
    with worker(
        "--processes", "1", url="memory://", app="project:tasks", directory=tmp_path, path=ROOT, start=[SCRIPT]
    ) as command:
        command.children()
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


@pytest.mark.parametrize(
    "start", [[SCRIPT], [sys.executable, "-m", "unstract_core"], [sys.executable, "-P", "-O", "-m", "unstract_core"]]
)
def test_children_have_the_commands_import_path_and_options(tmp_path: Path, start: list[str]) -> None:
    """Children have the same `sys.path` and interpreter options, for every way to start the command."""
    (tmp_path / "project.py").write_text(
        "import sys\n"
        "with open('seen', 'a') as file:\n"
        "    print(sys.path, sys.flags.optimize, file=file)\n"
        "tasks = {'t': print}\n"
    )
    for options in ([], ["--processes", "1"]):
        with worker(
            *options, url="memory://", app="project:tasks", directory=tmp_path, path=ROOT, start=start
        ) as command:
            command.event("worker_started")
            command.signal(signal.SIGTERM)
            assert command.ends() == 0
    alone, child = (tmp_path / "seen").read_text().splitlines()
    assert child == alone
