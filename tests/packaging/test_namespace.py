"""What becomes of us beside other packages called `transports`: PyPI has one, with an __init__.py.

A directory without __init__.py is only ever a portion of a namespace, and a package found anywhere on sys.path wins
over it. So the two live side by side where they share one site-packages, which is what pip makes; where they lie on
different entries of sys.path, in whatever order, the foreign one hides our transports. The core goes on working, and
whoever loads a transport is told what is missing.
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


def test_a_foreign_package_in_the_same_site_packages_and_ours_both_live(
    make_environment: Callable[..., Environment],
) -> None:
    """pip lays both into one directory; its __init__.py runs, and our sub-packages are found beside its modules."""
    environment = make_environment()
    _foreign_package(environment.site_packages)
    code = (
        "import transports, transports.serial, transports.memory\n"
        "from unstract_core import load_transport\n"
        "print(transports.whose, transports.serial.whose, type(load_transport('memory://')).__name__)"
    )
    assert environment.python(code) == "foreign foreign MemoryTransport"


def test_a_foreign_namespace_elsewhere_on_the_path_and_ours_both_live(bare: Environment, tmp_path: Path) -> None:
    """Another distribution may bring its own transports/<name>/ from anywhere, if it brings no __init__.py."""
    (tmp_path / "transports" / "pigeon").mkdir(parents=True)
    (tmp_path / "transports" / "pigeon" / "__init__.py").write_text(FOREIGN)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import transports.pigeon, transports.memory\n"
        "print(transports.pigeon.whose, transports.memory.MemoryTransport.__name__)"
    )
    assert bare.python(code) == "foreign MemoryTransport"


@pytest.mark.parametrize("place", ["0", "len(sys.path)"], ids=["earlier", "later"])
def test_a_foreign_package_elsewhere_on_the_path_hides_our_transports(
    bare: Environment, tmp_path: Path, place: str
) -> None:
    """Earlier or later on sys.path: the core works, and loading a transport says which module cannot be found."""
    _foreign_package(tmp_path)
    code = (
        f"import sys; sys.path.insert({place}, {str(tmp_path)!r})\n"
        "from unstract_core import ConfigurationError, load_transport\n"
        "try: print(load_transport('memory://'))\n"
        "except ConfigurationError as exc: print(exc)"
    )
    assert "No module named 'transports.memory'" in bare.python(code)
