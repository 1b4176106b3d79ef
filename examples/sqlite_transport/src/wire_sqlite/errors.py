"""The one place where an error of sqlite3 becomes one of unstract-wire's, with sqlite3's own as its cause.

The code of the error decides. Nothing is committed but by COMMIT, so only there, and only when the disk fails, is it
unknown what became of a request.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from unstract_core import ContractError, TransportNotReady, TransportRefused, TransportUnavailable

_REMEDY = "check that the file is a database of this transport, in a directory that can be written to"
_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,
}
_NOT_READY = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
}


@contextlib.contextmanager
def mapped(doing: str, *, committing: bool = False) -> Iterator[None]:
    """Turn every error of sqlite3 inside the block into ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise translated(exc, doing, committing=committing) from exc
    except (OverflowError, UnicodeEncodeError) as exc:
        raise TransportRefused(f"{doing}: SQLite cannot store this value ({type(exc).__name__})") from exc


def translated(exc: sqlite3.Error, doing: str, *, committing: bool = False) -> ContractError:
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
    text = f"{doing}: {exc} ({getattr(exc, 'sqlite_errorname', type(exc).__name__)})"
    if code in _AWAY:
        unknown = committing and code == sqlite3.SQLITE_IOERR
        fate = "whether it took effect is unknown" if unknown else "nothing took effect"
        return TransportUnavailable(text, effect=fate, fate_unknown=unknown)
    if code in _NOT_READY:
        return TransportNotReady(text, remedy=_REMEDY)
    return TransportRefused(text)
