"""Somebody else's module or factory: imported from where the user stands, its failures told with their place."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unstract_core import discovery
from unstract_core.errors import ConfigurationError, ContractError
from unstract_core.forking import Stopped
from unstract_core.observability.observer import Observer
from unstract_core.values import error_text

_HERE = f"{Path(__file__).parent}{os.sep}"
_IMPORT_SYSTEM = ("<frozen importlib", str(importlib.__file__), str(discovery.__file__), _HERE)


class Terminated(Stopped):
    """SIGTERM came while nothing was held yet, or any more."""


def make_here_importable() -> None:
    with contextlib.suppress(FileNotFoundError):
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)


@contextlib.contextmanager
def as_configuration_error(what: str) -> Iterator[None]:
    """Raise whatever somebody's module or factory raises as a ConfigurationError that says where it happened."""
    try:
        yield
    except Terminated:
        raise
    except ConfigurationError as exc:
        if not isinstance(exc.__cause__, ImportError) or "://" in what:
            raise
        place = raised_at(exc.__cause__, without=_IMPORT_SYSTEM)
        place = place or "; modules are looked for in the current directory and on PYTHONPATH"
        raise ConfigurationError(f"{exc}{place}") from exc.__cause__
    except ContractError:
        raise
    except (Exception, SystemExit) as exc:
        place = raised_at(exc, without=_IMPORT_SYSTEM)
        raise ConfigurationError(f"{what} cannot be loaded: {error_text(exc)}{place}") from exc


def raised_at(exc: BaseException, *, without: tuple[str, ...] = ()) -> str:
    """Return " (file:line)" of where it was raised, the files `without` aside."""
    without = (*without, "<frozen ")
    frames = [entry for entry in traceback.extract_tb(exc.__traceback__) if not entry.filename.startswith(without)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def load_tasks(app: str) -> Mapping[str, Callable[..., Any]]:
    module, _, name = app.partition(":")
    if not module or not name:
        raise ConfigurationError(f"--app takes module:name, such as myproject.tasks:tasks, not {app!r}")
    make_here_importable()
    with as_configuration_error(f"--app {app}"):
        found = discovery.import_object(app, "--app")
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"--app {app} is a {type(found).__name__}; it must be a Tasks(), or a mapping of task names to functions"
        )
    if odd := [name for name in found if not isinstance(name, str) or not name]:
        raise ConfigurationError(f"--app {app} has a task whose name is not a string: {odd[0]!r}")
    return found


def load_observer(spec: str) -> Observer:
    what = f"--observer {spec}"
    make_here_importable()
    with as_configuration_error(what):
        factory = discovery.import_object(spec, "--observer")
        if not callable(factory):
            raise ConfigurationError(
                f"{what} is a {type(factory).__name__}; name a class or a function that returns one"
            )
        made = factory()
    if not isinstance(made, Observer):
        raise ConfigurationError(f"{what} made a {type(made).__name__}, which is no unstract_core.Observer")
    return made
