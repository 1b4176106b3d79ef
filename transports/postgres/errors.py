"""The one place where a driver's error becomes one of ours.

What the server said about the request decides: a broken connection leaves its fate unknown, a statement that the
server has rolled back did not happen, and data that it refuses is refused for good. Texts carry the SQLSTATE and the
server's primary message, never its detail, which can quote a payload.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg

from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

_NOT_READY = {"42P01", "3F000", "42703", "42501"}
_ROLLED_BACK = ("25", "40", "53", "55", "57014")
_DRIVERS = ("psycopg", "psycopg2", "django")
_FATE_UNKNOWN = ("08", "57", "58", "XX")


@contextlib.contextmanager
def mapped(doing: str, *, committed_by_us: bool = True) -> Iterator[None]:
    """Turn every error of a PostgreSQL driver inside the block into ours, with the driver's as its cause."""
    try:
        yield
    except ContractError:
        raise
    except Exception as exc:
        if (ours := translate(exc, doing, committed_by_us=committed_by_us)) is None:
            raise
        raise ours from exc


def translate(exc: BaseException, doing: str, *, committed_by_us: bool = True) -> ContractError | None:
    """Return our error for a driver's (psycopg 3, psycopg2, or Django's wrapping of either); None for any other."""
    state = _sqlstate(exc)
    if state is None:
        return _without_state(exc, doing, committed_by_us)
    text = f"{doing}: {_primary(exc)} (SQLSTATE {state})"
    if state in _NOT_READY:
        return TransportNotReady(f"{text}; run `unstract-wire migrate`, or check the schema and this role's rights")
    if state.startswith(_ROLLED_BACK) or _plan_is_stale(exc, state):
        return TransportUnavailable(f"{text}; nothing took effect")
    if state.startswith(_FATE_UNKNOWN):
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
    return TransportRefused(text)


def _without_state(exc: BaseException, doing: str, committed_by_us: bool) -> ContractError | None:
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    driver = type(exc).__module__.partition(".")[0]
    if "DatabaseError" in kinds and driver not in _DRIVERS:
        return ConfigurationError(f"{doing}: takes an open cursor of psycopg 3, psycopg2 or Django, not of {driver}")
    if isinstance(exc, psycopg.DataError) or "DataError" in kinds:
        return TransportRefused(f"{doing}: the driver cannot send this value ({type(exc).__name__})")
    if isinstance(exc, psycopg.Error) or "OperationalError" in kinds or "InterfaceError" in kinds:
        text = f"{doing}: the connection to PostgreSQL was lost"
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
    return None


def _plan_is_stale(exc: BaseException, state: str) -> bool:
    """Tell "cached plan must not change result type": somebody altered a table under a prepared statement."""
    return state == "0A000" and "cached plan" in _primary(exc)


def _fate(text: str, unknown: bool) -> str:
    if unknown:
        return f"{text}; whether it took effect is unknown, so it was not tried again"
    return f"{text}; nothing was committed"


def _sqlstate(exc: BaseException) -> str | None:
    link: BaseException | None = exc
    while link is not None:
        state = getattr(link, "sqlstate", None) or getattr(link, "pgcode", None)
        if isinstance(state, str):
            return state
        link = link.__cause__
    return None


def _primary(exc: BaseException) -> str:
    link: BaseException | None = exc
    while link is not None:
        if primary := getattr(getattr(link, "diag", None), "message_primary", None):
            return str(primary)
        link = link.__cause__
    return type(exc).__name__
