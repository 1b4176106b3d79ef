"""Imports of the application: its tasks, observers and transports, with errors that name the file and line."""

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
    """The process received SIGTERM while the consumer does not run, so nothing is in flight."""


def make_here_importable() -> None:
    """Put the current directory first on the import path, if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)


@contextlib.contextmanager
def as_configuration_error(subject: str) -> Iterator[None]:
    """Raise any error of the block as a ConfigurationError that names the file and line where it was raised.

    Args:
        subject: The option or URL that is loaded; it starts the error text.
    """
    try:
        yield
    except Terminated:
        raise
    except ConfigurationError as exc:
        if not isinstance(exc.__cause__, ImportError) or "://" in subject:
            raise
        place = raised_at(exc.__cause__, without=_IMPORT_SYSTEM)
        place = place or "; modules are looked for in the current directory and on PYTHONPATH"
        raise ConfigurationError(f"{exc}{place}") from exc.__cause__
    except ContractError:
        raise
    except (Exception, SystemExit) as exc:
        place = raised_at(exc, without=_IMPORT_SYSTEM)
        raise ConfigurationError(f"{subject} cannot be loaded: {error_text(exc)}{place}") from exc


def raised_at(exc: BaseException, *, without: tuple[str, ...] = ()) -> str:
    """Return " (file:line)" of the last frame that is in none of the files `without`; "" if there is none."""
    without = (*without, "<frozen ")
    frames = [entry for entry in traceback.extract_tb(exc.__traceback__) if not entry.filename.startswith(without)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def load_tasks(app: str) -> Mapping[str, Callable[..., Any]]:
    """Import the tasks that --app names. Raises ConfigurationError unless they map names to functions."""
    module, _, name = app.partition(":")
    if not module or not name:
        raise ConfigurationError(f"--app takes module:name, such as myproject.tasks:tasks, not {app!r}")
    make_here_importable()
    with as_configuration_error(f"--app {app}"):
        tasks = discovery.import_object(app, "--app")
    if not isinstance(tasks, Mapping):
        raise ConfigurationError(
            f"--app {app} is a {type(tasks).__name__}; it must be a Tasks(), or a mapping of task names to functions"
        )
    if bad_names := [name for name in tasks if not isinstance(name, str) or not name]:
        raise ConfigurationError(f"--app {app} has a task whose name is not a string: {bad_names[0]!r}")
    return tasks


def load_observer(spec: str) -> Observer:
    """Make the observer that --observer names. Raises ConfigurationError if it cannot be made."""
    option = f"--observer {spec}"
    make_here_importable()
    with as_configuration_error(option):
        factory = discovery.import_object(spec, "--observer")
        if not callable(factory):
            raise ConfigurationError(
                f"{option} is a {type(factory).__name__}; name a class or a function that returns one"
            )
        observer = factory()
    if not isinstance(observer, Observer):
        raise ConfigurationError(f"{option} made a {type(observer).__name__}, which is not an unstract_core.Observer")
    return observer
