"""What make says to somebody whose machine is not ready."""

from __future__ import annotations

import os
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


def _make(directory: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "demo", f"PYTHON={python}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of an outer make
    return subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True, timeout=120, check=False)


def test_a_python_that_is_too_old_is_named_with_the_remedy(directory: Path) -> None:
    """Its version, the version that is needed, and how to name another one; no environment is begun."""
    old = directory / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    ended = _make(directory, str(old))
    assert ended.returncode != 0
    assert f"needs Python 3.11 or newer; '{old}' is Python 3.9.2" in ended.stderr
    assert "make PYTHON=" in ended.stderr
    assert not (directory / ".venv").exists()


def test_a_python_that_is_not_there_is_named_with_the_remedy(directory: Path) -> None:
    """The same for an interpreter that cannot be found."""
    ended = _make(directory, "python3-of-another-machine")
    assert ended.returncode != 0
    assert "needs Python 3.11 or newer; 'python3-of-another-machine' is" in ended.stderr
    assert not (directory / ".venv").exists()
