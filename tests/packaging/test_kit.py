"""The conformance kit as an author of a transport uses it: the wheel with the extra [testing], without sources."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import wheels
from wheels import Environment, Wheel

from contract_tests.suite import TESTS
from tools.check_lock import ROOT

KIT = ("-m", "contract_tests")
PYTEST = ("-m", "pytest", "-p", "contract_tests.plugin", "--pyargs", "contract_tests")
CONFORMANT = r"^(\S+): conformant with wire v1, kit 1\.0: (\d+) passed, (\d+) not claimed$"


@pytest.fixture(scope="module")
def author(request: pytest.FixtureRequest) -> Environment:
    """An environment with the wheel and the kit's requirements, without any driver."""
    environment: Environment = request.getfixturevalue("make_environment")("testing")
    return environment


@pytest.fixture(scope="module")
def example(author: Environment, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The example transport, built and installed beside the wheel, in a copy of its directory."""
    root = tmp_path_factory.mktemp("author")
    shutil.copytree(ROOT / "docs", root / "docs")  # the tutorial, whose code is the example's
    directory = root / "examples" / "sqlite_transport"
    shutil.copytree(ROOT / "examples" / "sqlite_transport", directory, ignore=shutil.ignore_patterns("__pycache__"))
    built: Wheel = wheels.read_wheel(wheels.build(directory, tmp_path_factory.mktemp("built"), "wheel"))
    author.install(built)
    return author._replace(work=directory)


def verdicts(output: str) -> dict[str, tuple[int, int]]:
    """Return the numbers of passed and of not claimed tests for each conformant transport."""
    found = re.findall(CONFORMANT, output, flags=re.MULTILINE)
    return {name: (int(passed), int(unclaimed)) for name, passed, unclaimed in found}


@pytest.mark.slow(reason="It runs the whole kit; `make test` runs the kit over memory and one file of it here.")
@pytest.mark.timeout(300)
def test_kit_runs_from_the_wheel(author: Environment) -> None:
    """`python -m contract_tests` runs the whole kit, names the transport, and ends with the verdict."""
    ended = author.run("python", "-I", *KIT, "--transport", "memory", "-v", timeout=200)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "test_fencing.py::test_a_late_renewal_changes_nothing[memory] PASSED" in ended.stdout
    passed, unclaimed = verdicts(ended.stdout)["memory"]
    assert passed >= len(TESTS) - unclaimed
    assert "transactional_send is not claimed" in ended.stdout


def test_kit_runs_under_pytest_by_package_name(author: Environment) -> None:
    """`-p contract_tests.plugin --pyargs contract_tests` runs with any selection of pytest."""
    ended = author.run("python", "-I", *PYTEST, "--transport", "memory", "-k", "test_wake", "-v")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "test_waking.py::test_wake_ends_a_wait[memory-1] PASSED" in ended.stdout
    assert "memory: no verdict on conformance" in ended.stdout


@pytest.mark.parametrize("command", [KIT, PYTEST], ids=["python -m contract_tests", "pytest"])
def test_kit_without_a_transport_is_a_usage_error(author: Environment, command: tuple[str, ...]) -> None:
    """The exit code is 4, and the error names the missing option."""
    ended = author.run("python", "-I", *command)
    assert ended.returncode == 4
    assert "--transport" in ended.stderr


def test_kit_without_its_extra_names_the_extra(bare: Environment) -> None:
    """The kit prints one line, and the exit code is 2."""
    ended = bare.run("python", "-I", *KIT, "--transport", "memory")
    assert ended.returncode == 2
    assert "pip install 'unstract-wire[testing]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_plugin_is_not_registered(author: Environment) -> None:
    """The installed kit does not affect a project with an option of the same name."""
    work = author.work / "project"
    work.mkdir()
    (work / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--transport')\n")
    (work / "test_it.py").write_text("def test_it(request):\n    assert request.config.option.transport == 'mine'\n")
    ended = author._replace(work=work).run("python", "-m", "pytest", "--transport", "mine")
    assert ended.returncode == 0, ended.stdout


def test_suite_needs_one_import_and_one_fixture(author: Environment, tmp_path: Path) -> None:
    """The suite runs beside an author's own tests in strict pytest."""
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n"
        "from contract_tests.suite import *\n"
        "from transports.memory.harness import MemoryHarness\n\n"
        "@pytest.fixture(scope='session')\n"
        "def harness():\n"
        "    with MemoryHarness() as harness:\n"
        "        yield harness\n\n"
        "def test_of_my_own():\n"
        "    pass\n"
    )
    arguments = ("--strict-markers", "--strict-config", "-k", "own or claim or replies", "test_mine.py")
    ended = author._replace(work=tmp_path).run("python", "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"(\d+) passed", ended.stdout)
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) > 10  # type: ignore[index]


def test_example_is_found_by_its_entry_point(example: Environment) -> None:
    """`--transport sqlite` runs the transport of docs/writing-a-transport.md against the wheel."""
    ended = example.run("python", "-I", *KIT, "--transport", "sqlite", "-k", "test_wake", "-v")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "test_waking.py::test_wake_ends_a_wait[sqlite-1] PASSED" in ended.stdout


@pytest.mark.slow(reason="It runs the whole kit; `make test` runs the kit over memory and one file of it here.")
@pytest.mark.timeout(300)
def test_suite_of_the_example_passes(example: Environment) -> None:
    """The example's own tests and the whole kit pass from its directory."""
    ended = example.run("python", "-m", "pytest", "-q", timeout=280)
    assert ended.returncode == 0, ended.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed", ended.stdout)
    (unclaimed,) = re.findall(r"(\d+) skipped", ended.stdout) or ["0"]
    assert int(passed) > len(TESTS) - int(unclaimed) > 0


def test_example_is_a_transport_by_its_url(example: Environment, tmp_path: Path) -> None:
    """load_transport accepts `sqlite:///...`, and one process runs a task of another."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    example.python(
        f"from unstract_core import *\nDispatcher(load_transport({url!r})).send('greet', args=['you'], queue='q')"
    )
    code = (
        "from unstract_core import *\n"
        f"Consumer(load_transport({url!r}), {{'greet': lambda name: print('hello', name)}}, ['q']).drain(timeout=10)"
    )
    assert example.python(code) == "hello you"
