"""Loading of transports by URL and by module:factory, from real distributions and modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import unstract_core
from unstract_core import ConfigurationError, load_transport

MODULE = """
class Fake:
    capabilities = None
    def __init__(self, url=None): self.url = url
    def send(self, messages, *, within=None): return []
    def reply(self, key, *, timeout=0, consume=False): return None
    def subscribe(self, queues, *, lease): raise NotImplementedError
    def close(self): pass

class Half:
    capabilities = None
    def send(self, messages, *, within=None): return []

class Namespace:
    factory = Fake

def from_url(url): return Fake(url)
def half(url=None): return Half()
def nothing(url=None): return None
def needs_an_argument(one, two): return Fake()
def refuses(url=None):
    from unstract_core import ConfigurationError
    raise ConfigurationError("no such host in the URL")
NOT_CALLABLE = 7
"""

ENTRY_POINTS = """
[unstract_core.transports]
fake = wire_fake:from_url
half = wire_fake:half
nothing = wire_fake:nothing
refusing = wire_fake:refuses
gone = wire_gone:from_url
without = wire_fake:no_such_name
number = wire_fake:NOT_CALLABLE
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a module of transports and a distribution that provides it under some schemes."""
    (tmp_path / "wire_fake.py").write_text(MODULE)
    (tmp_path / "wire_broken.py").write_text("raise RuntimeError('broken')")
    information = tmp_path / "wire_fake-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wire-fake\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wire_fake", raising=False)
    return tmp_path


def refusal(spec: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_transport(spec)  # type: ignore[arg-type]  # also called with what is no str
    return str(caught.value)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("url", ["fake://", "fake://user:pw@host:1/db?x=y#z", "FAKE://host", "fake://[::1]:5/db"])
def test_url_is_passed_to_its_entry_point(url: str) -> None:
    """Any package can provide a scheme; its factory gets the unchanged URL."""
    transport = load_transport(url)
    assert type(transport).__name__ == "Fake"
    assert transport.url == url  # type: ignore[attr-defined]  # the fake's own


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("spec", ["wire_fake:Fake", "wire_fake:from_url_free", "wire_fake:Namespace.factory"])
def test_factory_is_called_without_arguments(spec: str, installed: Path) -> None:
    """ "module:factory" imports the module and calls the named object; the name may contain dots."""
    (installed / "wire_fake.py").write_text(MODULE + "\nfrom_url_free = Fake\n")
    assert type(load_transport(spec)).__name__ == "Fake"


@pytest.mark.usefixtures("installed")
def test_unknown_scheme_error_lists_known_schemes() -> None:
    """The error lists the installed schemes, and never shows the URL's password."""
    text = refusal("nosuch://user:secret@host/db")
    assert "nosuch" in text
    assert "fake" in text
    assert "secret" not in text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "no transport given"),
        (None, "no transport given"),
        (7, "no transport given"),
        ("wire_fake", "module:name"),
        (":factory", "module:name"),
        ("wire_fake:", "module:name"),
        ("://host", "no transport for"),
        ("gone://host", "wire_gone"),
        ("without://host", "no_such_name"),
        ("wire_gone:factory", "wire_gone"),
        ("wire_fake.sub:factory", "wire_fake"),
        ("wire fake:factory", "module:name"),
        (".relative:factory", "relative"),
        ("..:factory", ".."),
        ("wire_fake:no_such_name", "no_such_name"),
        ("wire_fake:Namespace.missing", "missing"),
        ("half://host", "reply, subscribe, close"),
        ("wire_fake:half", "reply, subscribe, close"),
        ("nothing://host", "NoneType"),
        ("wire_fake:nothing", "NoneType"),
        ("wire_fake:NOT_CALLABLE", "NOT_CALLABLE"),
        ("number://host", "number"),
        ("wire_fake:needs_an_argument", "needs_an_argument"),
        ("refusing://host", "no such host"),
        ("wire_fake:refuses", "no such host"),
    ],
    ids=str,
)
def test_invalid_transport_raises_configuration_error_at_start(spec: object, said: str) -> None:
    """Each invalid set-up raises a ConfigurationError that names its wrong part."""
    assert said in refusal(spec)


@given(st.text() | st.text(".:/[]@?#%", min_size=1, max_size=8) | st.text(".:/[]x", max_size=6).map("x://{}".format))
@example(".:x")
@example("\x00:x")
@example("x.\ud800:x")
@example("x://[")
def test_any_invalid_spec_raises_configuration_error(spec: str) -> None:
    """No spec raises an error other than ConfigurationError."""
    refusal(spec)


def test_error_inside_a_transport_module_is_raised(installed: Path) -> None:
    """An error that a module raises during its import reaches the user unchanged."""
    assert (installed / "wire_broken.py").exists()
    with pytest.raises(RuntimeError, match="broken"):
        load_transport("wire_broken:factory")


BLOCKED = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
import unstract_core
try:
    unstract_core.load_transport({spec!r})
except unstract_core.ConfigurationError as exc:
    print(json.dumps([str(exc), type(exc.__cause__).__name__]))
"""


def _refused_without(package: str, spec: str, where: Path) -> tuple[str, str]:
    """Load a transport in a process without `package`; return the error's text and its cause."""
    found = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked={package}, spec=spec)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(where), str(Path(unstract_core.__file__).parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout, found.stderr
    text, cause = json.loads(found.stdout)
    return text, cause


@pytest.mark.parametrize(("package", "extra"), [("psycopg", "postgres"), ("orjson", "postgres"), ("kombu", "celery")])
@pytest.mark.parametrize("spec", ["lacking://user:secret@host/db", "wire_lacking:Transport", "wire_late:Transport"])
def test_missing_driver_error_names_the_extra(package: str, extra: str, spec: str, tmp_path: Path) -> None:
    """The error names the command that installs the driver, whether the module or the factory imports it."""
    (tmp_path / "wire_lacking.py").write_text(f"import {package}.errors\ndef Transport(url=None): pass\n")
    (tmp_path / "wire_late.py").write_text(
        textwrap.dedent(f"""
            def Transport(url=None):
                import {package}.errors
        """)
    )
    information = tmp_path / "wire_lacking-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wire-lacking\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[unstract_core.transports]\nlacking = wire_lacking:Transport\n")
    text, cause = _refused_without(package, spec, tmp_path)
    assert f"pip install 'unstract-wire[{extra}]'" in text
    assert package in text
    assert "secret" not in text
    assert cause == "ModuleNotFoundError"


def test_postgres_without_driver_names_its_extra(tmp_path: Path) -> None:
    """The PostgreSQL transport names its extra if psycopg is missing."""
    text, _ = _refused_without("psycopg", "transports.postgres:PostgresTransport", tmp_path)
    assert "pip install 'unstract-wire[postgres]'" in text


def test_memory_transport_needs_no_driver(tmp_path: Path) -> None:
    """The memory transport loads by module:factory where no driver is installed."""
    script = BLOCKED.format(blocked={"psycopg", "psycopg_pool", "kombu"}, spec="transports.memory:MemoryTransport")
    found = subprocess.run(
        [sys.executable, "-c", script + "\nelse:\n    print('loaded')\n"],
        env={**os.environ, "PYTHONPATH": str(Path(unstract_core.__file__).parents[1])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert found.stdout == "loaded\n"
