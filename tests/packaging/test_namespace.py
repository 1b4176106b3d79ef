"""Our namespace beside other packages called `transports`: PyPI has one with an __init__.py.

A directory without __init__.py is only a portion of a namespace, and Python prefers a package from any entry of
sys.path. In one site-packages, where pip installs both, the two work side by side. On different entries of sys.path, in
any order, the foreign package hides our transports: the core works, and loading a transport raises an error that names
the missing module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from wheels import Environment

FOREIGN = "whose = 'foreign'\n"


def _foreign_package(directory: Path) -> None:
    (directory / "transports").mkdir(exist_ok=True)
    (directory / "transports" / "__init__.py").write_text(FOREIGN)
    (directory / "transports" / "serial.py").write_text(FOREIGN)


def test_foreign_package_in_same_site_packages_works(
    make_environment: Callable[..., Environment],
) -> None:
    """The foreign __init__.py runs, and our sub-packages are found beside its modules."""
    environment = make_environment()
    _foreign_package(environment.site_packages)
    code = (
        "import transports, transports.serial, transports.memory\n"
        "from unstract_core import load_transport\n"
        "print(transports.whose, transports.serial.whose, type(load_transport('memory://')).__name__)"
    )
    assert environment.python(code) == "foreign foreign MemoryTransport"


def test_foreign_namespace_elsewhere_works(bare: Environment, tmp_path: Path) -> None:
    """Another distribution without __init__.py may provide transports/<name>/ from anywhere."""
    (tmp_path / "transports" / "pigeon").mkdir(parents=True)
    (tmp_path / "transports" / "pigeon" / "__init__.py").write_text(FOREIGN)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import transports.pigeon, transports.memory\n"
        "print(transports.pigeon.whose, transports.memory.MemoryTransport.__name__)"
    )
    assert bare.python(code) == "foreign MemoryTransport"


@pytest.mark.parametrize("place", ["0", "len(sys.path)"], ids=["earlier", "later"])
def test_foreign_package_elsewhere_hides_our_transports(bare: Environment, tmp_path: Path, place: str) -> None:
    """The core works, and loading a transport names the module that was not found."""
    _foreign_package(tmp_path)
    code = (
        f"import sys; sys.path.insert({place}, {str(tmp_path)!r})\n"
        "from unstract_core import ConfigurationError, load_transport\n"
        "try: print(load_transport('memory://'))\n"
        "except ConfigurationError as exc: print(exc)"
    )
    assert "No module named 'transports.memory'" in bare.python(code)
