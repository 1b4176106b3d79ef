"""Translates every error of a PostgreSQL driver into an error of this package. No other module does this.

The text has the SQLSTATE and the server's primary message. It never has the message's detail, which can quote a
payload.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import attrs
import psycopg
from psycopg import sql

from transports.postgres.errors import DuplicateId, PlanOutdated
from transports.postgres.privileges import needed
from transports.postgres.sqlstates import INSUFFICIENT_PRIVILEGE, UNIQUE_VIOLATION, SqlstateMeaning, meaning_of
from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    Meaning,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

_DRIVERS = ("psycopg", "psycopg2", "django")
_NEVER_PASSED_ON = "query_wait_timeout"
"""PgBouncer's own message: no server connection was free for the statement."""
_ID_KEY = re.compile(r"\((msg_id|dead_id)\)=\(")
_ID_INDEXES = {"pg_queue_message_pkey": "msg_id", "pg_queue_dead_letter_pkey": "dead_id"}


@contextlib.contextmanager
def mapped(operation: str, *, committed_by_us: bool = True) -> Iterator[None]:
    """Raise every driver error inside the block as an error of this package, with the driver's error as `__cause__`.

    Args:
        operation: the purpose of the block, for the error's text.
        committed_by_us: whether this package commits, so that a lost connection leaves the fate unknown. Default True.
    """
    try:
        yield
    except ContractError:
        raise
    except Exception as exc:
        if (ours := translate(exc, operation, committed_by_us=committed_by_us)) is None:
            raise
        raise ours from exc


def translate(exc: BaseException, operation: str, *, committed_by_us: bool = True) -> ContractError | None:
    """Return this package's error for an error of psycopg 3, psycopg2 or Django; None for any other exception.

    Args:
        exc: the exception.
        operation: the purpose of the failed statement, for the error's text.
        committed_by_us: whether this package commits, so that a lost connection leaves the fate unknown. Default True.
    """
    state = _sqlstate(exc)
    if state is None:
        return _without_state(exc, operation, committed_by_us)
    row = meaning_of(state, _cause(exc, state))
    text = f"{operation}: {_primary(exc)} (SQLSTATE {state})"
    if row.meaning is Meaning.IN_DOUBT and (state == "40003" or not _was_rolled_back(exc)):
        return TransportUnavailable(text, effect=_fate(committed_by_us), fate_unknown=committed_by_us)
    return _not_applied(exc, state, row, text, operation)


def _not_applied(exc: BaseException, state: str, row: SqlstateMeaning, text: str, operation: str) -> TransportError:
    """Return the error for a statement that the server has rolled back."""
    if state == INSUFFICIENT_PRIVILEGE and (rights := needed(operation, _primary(exc))):
        row = attrs.evolve(row, advice=f"{rights}; {row.advice}")
    if row.meaning is Meaning.NOT_READY:
        return TransportNotReady(text, remedy=row.advice)
    if row.meaning is Meaning.REFUSED:
        return TransportRefused(text, remedy=row.advice)
    kind = PlanOutdated if state == "0A000" else row.kind
    ours = kind(text, effect="nothing took effect", remedy=row.advice)
    if isinstance(ours, DuplicateId):
        names = [_diagnosed(exc, "schema_name") or "", _diagnosed(exc, "table_name") or ""]
        ours.table, ours.column = sql.Identifier(*names).as_string(None), _id_column(exc)
    return ours


def _was_rolled_back(exc: BaseException) -> bool:
    """Return whether the server continued after the error. If so, it has rolled the statement back."""
    return _diagnosed(exc, "severity_nonlocalized") == "ERROR"


def _cause(exc: BaseException, state: str) -> str:
    """Return the cause that distinguishes errors of one SQLSTATE. It does not depend on the server's language."""
    if state == UNIQUE_VIOLATION:
        return "id" if _id_column(exc) else ""
    if _primary(exc) == _NEVER_PASSED_ON:
        return _NEVER_PASSED_ON
    return _diagnosed(exc, "source_file") or ""


def _id_column(exc: BaseException) -> str:
    """Return the column whose id exists, or "" if the duplicate is another key.

    The server shows the key's detail only to a role that may read it. It shows the name of the index to every role.
    """
    if key := _ID_KEY.search(_diagnosed(exc, "message_detail") or ""):
        return key[1]
    return _ID_INDEXES.get(_diagnosed(exc, "constraint_name") or "", "")


def _without_state(exc: BaseException, operation: str, committed_by_us: bool) -> ContractError | None:
    if isinstance(exc, UnicodeError):
        return TransportRefused(f"{operation}: a text cannot be encoded for PostgreSQL")
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    driver = type(exc).__module__.partition(".")[0]
    if "DatabaseError" in kinds and driver not in _DRIVERS:
        return ConfigurationError(
            f"{operation}: takes an open cursor of psycopg 3, psycopg2 or Django, not of {driver}"
        )
    if isinstance(exc, psycopg.ProgrammingError | psycopg.NotSupportedError) or "DataError" in kinds:
        return TransportRefused(f"{operation}: the driver cannot send this value ({type(exc).__name__})")
    if isinstance(exc, psycopg.Error) or "OperationalError" in kinds or "InterfaceError" in kinds:
        text = f"{operation}: the connection to PostgreSQL was lost"
        return TransportUnavailable(text, effect=_fate(committed_by_us), fate_unknown=committed_by_us)
    if "DatabaseError" in kinds:
        return TransportRefused(f"{operation}: refused by the driver ({type(exc).__name__})")
    return None


def _fate(unknown: bool) -> str:
    return "whether it took effect is unknown, so it was not tried again" if unknown else "nothing was committed"


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


def _diagnosed(exc: BaseException, field: str) -> str | None:
    link: BaseException | None = exc
    while link is not None:
        if value := getattr(getattr(link, "diag", None), field, None):
            return str(value)
        link = link.__cause__
    return None
