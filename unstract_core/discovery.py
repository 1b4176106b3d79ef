"""Load a transport by its URL or by `module:factory`.

The scheme of a URL is the name of an entry point of the group `unstract_core.transports`, so that any package can
provide a transport. The entry point is a callable that takes the URL and returns a Transport.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from unstract_core.errors import ConfigurationError, ContractError
from unstract_core.transport import Transport

GROUP = "unstract_core.transports"

_EXTRAS = {"psycopg": "postgres", "orjson": "postgres", "kombu": "celery"}


def load_transport(spec: str) -> Transport:
    """Load a transport.

    Args:
        spec: A URL such as `postgresql://user@host/db` or `memory://`, or "module:factory" with a factory that takes no
            arguments.

    Returns:
        The transport. A transport connects when it is first used.

    Raises:
        ConfigurationError: The scheme is unknown, a module or driver is missing, or the factory rejects the URL. The
            text names the installed schemes, or the extra to install.
    """
    if not isinstance(spec, str) or not spec:
        raise ConfigurationError("no transport given: pass a URL such as postgresql://user@host/db, or module:factory")
    if "://" in spec:
        return _from_url(spec)
    if ":" not in spec:
        raise ConfigurationError(f"transport {spec!r} is neither a URL nor of the form module:name")
    return _built(import_object(spec, "transport"), (), spec)


def import_object(spec: str, kind: str) -> Any:
    """Import the object `module:name`; the name may contain dots.

    Args:
        spec: The module and the name.
        kind: The kind of the object, for the error, such as "transport".

    Raises:
        ConfigurationError: `spec` has another form, or the module or the name does not exist.
    """
    module_name, _, name = spec.partition(":")
    if not name or not all(map(str.isidentifier, module_name.split("."))):
        raise ConfigurationError(f"{kind} {spec!r} is not of the form module:name")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as exc:
        raise _missing(exc, f"{kind} {spec}") from exc
    for part in name.split("."):
        if not hasattr(target, part):
            raise ConfigurationError(f"{kind} {spec!r}: module {module_name!r} has no {name!r}")
        target = getattr(target, part)
    return target


def _from_url(url: str) -> Transport:
    scheme = url.partition("://")[0].lower()
    schemes = {entry.name: entry for entry in entry_points(group=GROUP)}
    if scheme not in schemes:
        raise ConfigurationError(
            f"no transport for {scheme}:// URLs; installed: {', '.join(sorted(schemes)) or 'none'}"
        )
    try:
        factory = schemes[scheme].load()
    except (ImportError, AttributeError) as exc:
        raise _missing(exc, f"{scheme}://") from exc
    return _built(factory, (url,), f"{scheme}://")


def _built(factory: Any, arguments: tuple[str, ...], spec: str) -> Transport:
    if not callable(factory):
        raise ConfigurationError(f"{spec} is a {type(factory).__name__}, not a callable that returns a transport")
    try:
        transport = factory(*arguments)
    except ContractError:
        raise
    except (ImportError, TypeError) as exc:
        raise _missing(exc, spec) from exc
    return _checked(transport, spec)


def _missing(exc: Exception, spec: str) -> ConfigurationError:
    package = (getattr(exc, "name", None) or "").partition(".")[0]
    if package in _EXTRAS:
        remedy = f"pip install 'unstract-wire[{_EXTRAS[package]}]'"
        return ConfigurationError(f"{spec} needs {package}, which is not installed: {remedy}")
    return ConfigurationError(f"{spec} cannot be loaded: {type(exc).__name__}: {exc}")


def _checked(transport: Any, spec: str) -> Transport:
    missing = [name for name in ("capabilities", "send", "reply", "subscribe", "close") if not hasattr(transport, name)]
    if missing:
        raise ConfigurationError(f"{spec} returned a {type(transport).__name__}, which has no {', '.join(missing)}")
    return transport  # type: ignore[no-any-return]  # a Protocol is proven by its conformance tests, not here
