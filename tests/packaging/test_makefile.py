"""The targets of make, and its messages on a machine that is not ready."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.check_lock import LOCK, ROOT


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with what make reads, and no environment."""
    for name in ("Makefile", "pyproject.toml", LOCK):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of an outer make
    command = ["make", *arguments]
    return subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True, timeout=120, check=False)


def test_an_old_python_is_an_error_with_remedy(directory: Path) -> None:
    """Its version, the version that is needed, and how to name another one; no environment is begun."""
    old = directory / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    ended = _make(directory, "demo", f"PYTHON={old}")
    assert ended.returncode != 0
    assert f"needs Python 3.11 or newer; '{old}' is Python 3.9.2" in ended.stderr
    assert "make PYTHON=" in ended.stderr
    assert not (directory / ".venv").exists()


def test_a_missing_python_is_an_error_with_remedy(directory: Path) -> None:
    """The same for an interpreter that cannot be found."""
    ended = _make(directory, "demo", "PYTHON=python3-of-another-machine")
    assert ended.returncode != 0
    assert "needs Python 3.11 or newer; 'python3-of-another-machine' is" in ended.stderr
    assert not (directory / ".venv").exists()


def test_help_lists_each_target() -> None:
    """`make help` has a line for each target of .PHONY, but for `help` itself and the parts of `check`."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.findall(r"^make ([\w-]+) ", _make(ROOT, "help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted({name for name in phony.split() if not name.startswith("check-")} - {"help"})


@pytest.mark.parametrize(("target", "slow"), [("test", False), ("test-fast", False), ("test-all", True)])
def test_each_test_target_runs_several_processes(target: str, slow: bool) -> None:
    """pytest-xdist chooses their number; the slow tests are those of `make test-all` alone."""
    (command,) = [line for line in _make(ROOT, "-n", target).stdout.splitlines() if " -m pytest " in line]
    assert " -n auto --dist loadfile " in command
    assert (" --slow" in command) == slow


def test_matrix_fails_without_an_interpreter(directory: Path) -> None:
    """It is no success when no test was run."""
    ended = _make(directory, "matrix", "VERSIONS=2.99")
    assert ended.returncode != 0
    assert "none of Python 2.99 was found" in ended.stderr
