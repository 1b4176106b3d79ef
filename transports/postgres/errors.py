"""The one place where a driver's error becomes one of ours.

What the server said about the request decides: a broken connection leaves its fate unknown, a statement that the
server has rolled back did not happen, and data that it refuses is refused for good. Texts carry the SQLSTATE and the
server's primary message, never its detail, which can quote a payload.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg

from transports.postgres.rights import needed
from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

_NO_RIGHT = "42501"
_NOT_READY = {
    "42P01": "run `unstract-wire migrate`, or check the schema",
    "3F000": "run `unstract-wire migrate`, or check the schema",
    "42703": "the table has other columns than those of transports/postgres/sql/schema.sql",
    _NO_RIGHT: "grant this role the right",
}
_PREPARED_LOST = {"26000", "42P05"}
_ROLLED_BACK = ("25", "40", "53", "55", "57014")
_DRIVERS = ("psycopg", "psycopg2", "django")
_NEVER_PASSED_ON = "query_wait_timeout"
"""PgBouncer's own: no server connection was free for the statement."""
_FATE_UNKNOWN = ("08", "57", "58", "XX")


class PlanOutdated(TransportUnavailable):
    """A prepared statement's plan no longer fits its tables; a connection that prepares anew is not concerned."""


class PreparedStatementLost(PlanOutdated):
    """A prepared statement is not there, or another's of its name is: a pooler in transaction mode lies between."""


class ReadOnly(TransportUnavailable):
    """The server does not take writes, as after a failover: the next connection may reach another."""


class NotifyQueueFull(TransportUnavailable):
    """The server's queue of notifications is full, because some session listens and never reads."""


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
    if state == _NO_RIGHT and (takes := needed(doing, _primary(exc))):
        text = f"{text}; {takes}"
    if state in _NOT_READY:
        return TransportNotReady(f"{text}; {_NOT_READY[state]}")
    if state in _PREPARED_LOST:
        return PreparedStatementLost(f"{text}; nothing took effect. Behind PgBouncer in transaction mode: listen=false")
    if state == "0A000" and _raised_in(exc) == "plancache.c":
        return PlanOutdated(f"{text}; nothing took effect")
    if state == "54000" and _raised_in(exc) == "async.c":
        return NotifyQueueFull(f"{text}; nothing took effect. Which session listens and is idle in transaction?")
    if state == "25006":
        return ReadOnly(f"{text}; nothing took effect")
    if state.startswith(_ROLLED_BACK) and state != "40003":
        return TransportUnavailable(f"{text}; nothing took effect")
    if _primary(exc) == _NEVER_PASSED_ON:
        return TransportUnavailable(f"{text}; nothing took effect")
    if state.startswith((*_FATE_UNKNOWN, "40003")):
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
    return TransportRefused(text)


def _without_state(exc: BaseException, doing: str, committed_by_us: bool) -> ContractError | None:
    if isinstance(exc, UnicodeError):
        return TransportRefused(f"{doing}: a text cannot be encoded for PostgreSQL")
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    driver = type(exc).__module__.partition(".")[0]
    if "DatabaseError" in kinds and driver not in _DRIVERS:
        return ConfigurationError(f"{doing}: takes an open cursor of psycopg 3, psycopg2 or Django, not of {driver}")
    if isinstance(exc, psycopg.DataError) or "DataError" in kinds:
        return TransportRefused(f"{doing}: the driver cannot send this value ({type(exc).__name__})")
    if isinstance(exc, psycopg.Error) or "OperationalError" in kinds or "InterfaceError" in kinds:
        text = f"{doing}: the connection to PostgreSQL was lost"
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
    if "DatabaseError" in kinds:
        return TransportRefused(f"{doing}: refused by the driver ({type(exc).__name__})")
    return None


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
    return _diagnosed(exc, "message_primary") or type(exc).__name__


def _raised_in(exc: BaseException) -> str | None:
    """Return the server's source file, which is the same in every language that its messages may be in."""
    return _diagnosed(exc, "source_file")


def _diagnosed(exc: BaseException, field: str) -> str | None:
    link: BaseException | None = exc
    while link is not None:
        if value := getattr(getattr(link, "diag", None), field, None):
            return str(value)
        link = link.__cause__
    return None
