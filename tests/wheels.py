"""The built wheel, and virtual environments that contain it without the sources. Needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from tools import check_lock

OWN_NAME = "unstract-wire"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class Wheel(NamedTuple):
    """A built wheel: its files by name, and its metadata."""

    path: Path
    files: dict[str, bytes]
    metadata: Message

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return tuple(Requirement(text) for text in self.metadata.get_all("Requires-Dist", ()))


class Environment(NamedTuple):
    """A virtual environment, and a directory outside the checkout to work in."""

    root: Path
    work: Path

    @property
    def site_packages(self) -> Path:
        return self.root / "lib" / f"python{PYTHON_VERSION}" / "site-packages"

    def run(self, program: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, without this process's settings of Python and of the package."""
        foreign = ("PYTHON", "UNSTRACT")
        settings = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        settings["CONTRACT_TESTS_PROFILE"] = "dev"  # these tests check the content of the wheel, not the transport
        return subprocess.run(
            [str(self.root / "bin" / program), *arguments],
            cwd=self.work,
            env=settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def install(self, wheel: Wheel) -> None:
        """Install a wheel with pip, without its dependencies."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.root / "bin" / "python")]
        command = [*pip, "install", "-qq", "--no-index", "--no-deps", str(wheel.path)]
        subprocess.run(command, cwd=self.work, check=True)

    def python(self, code: str) -> str:
        """Run `code` in isolation and return its output. An error fails the test."""
        ended = self.run("python", "-I", "-c", code)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()


def build(source: Path, target: Path, kind: str) -> Path:
    """Build the "wheel" or "sdist" of `source` into the empty directory `target`."""
    command = [sys.executable, "-P", "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    (built,) = target.iterdir()
    return built


def read_wheel(path: Path) -> Wheel:
    """Read a wheel."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (metadata,) = (content for name, content in files.items() if name.endswith(".dist-info/METADATA"))
    return Wheel(path, files, Parser().parsestr(metadata.decode()))


def make_environment(wheel: Wheel, root: Path, work: Path, extras: Sequence[str] = ()) -> Environment:
    """Install `wheel` with pip into a new environment; link its dependencies from the running one."""
    environment = Environment(root, work)
    venv.create(root, symlinks=True)
    environment.install(wheel)
    for name in _required(wheel, extras):
        _link(name, environment.site_packages)
    return environment


def _required(wheel: Wheel, extras: Sequence[str]) -> set[str]:
    own = check_lock.Installed(wheel.metadata["Version"], wheel.requirements)
    wanted = check_lock.Need(Requirement(f"{OWN_NAME}[{','.join(extras)}]"), "the tests")
    needs = check_lock.closure([wanted], {**check_lock.installed_here(), OWN_NAME: own}, [PYTHON_VERSION])
    return {need.name for need in needs} - {OWN_NAME}


def _link(name: str, site_packages: Path) -> None:
    found = distribution(name)
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (site_packages / top).exists():
            (site_packages / top).symlink_to(str(found.locate_file(top)))
