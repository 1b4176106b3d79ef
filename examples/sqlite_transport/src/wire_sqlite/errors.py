"""The translation of sqlite3's errors, which become the cause of unstract-wire's.

The error code decides. Only COMMIT commits, so a fate is unknown only if the disk fails during COMMIT.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from unstract_core import ContractError, TransportNotReady, TransportRefused, TransportUnavailable

_REMEDY = "check that the file is a database of this transport, in a directory that can be written to"
_UNAVAILABLE = {
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
    """Translate every error of sqlite3 inside the block."""
    try:
        yield
    except sqlite3.Error as exc:
        raise translated(exc, doing, committing=committing) from exc
    except (OverflowError, UnicodeEncodeError) as exc:
        raise TransportRefused(f"{doing}: SQLite cannot store this value ({type(exc).__name__})") from exc


def translated(exc: sqlite3.Error, doing: str, *, committing: bool = False) -> ContractError:
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
    text = f"{doing}: {exc} ({getattr(exc, 'sqlite_errorname', type(exc).__name__)})"
    if code in _UNAVAILABLE:
        unknown = committing and code == sqlite3.SQLITE_IOERR
        fate = "whether it took effect is unknown" if unknown else "nothing took effect"
        return TransportUnavailable(text, effect=fate, fate_unknown=unknown)
    if code in _NOT_READY:
        return TransportNotReady(text, remedy=_REMEDY)
    return TransportRefused(text)
