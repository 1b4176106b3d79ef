"""The one place where a driver's error becomes one of ours.

`ANSWERS` is the table of SQLSTATEs and what they mean; docs/errors.md has the same table. An error is a refusal only
if the same statement can never succeed. Texts carry the SQLSTATE and the server's primary message, never its detail,
which can quote a payload.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import attrs
import psycopg
from psycopg import sql

from transports.postgres.privileges import needed
from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    Meaning,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

_NO_RIGHT = "42501"
_DUPLICATE = "23505"
_DRIVERS = ("psycopg", "psycopg2", "django")
_NEVER_PASSED_ON = "query_wait_timeout"
"""PgBouncer's own: no server connection was free for the statement."""
_ID_KEY = re.compile(r"\((msg_id|dead_id)\)=\(")
_ID_INDEXES = {"pg_queue_message_pkey": "msg_id", "pg_queue_dead_letter_pkey": "dead_id"}


class PlanOutdated(TransportUnavailable):
    """A prepared statement's plan no longer fits its tables; a connection that prepares anew is not concerned."""


class PreparedStatementLost(PlanOutdated):
    """A prepared statement is not there, or another's of its name is: a pooler in transaction mode lies between."""


class ReadOnly(TransportUnavailable):
    """The server does not take writes, as after a failover: the next connection may reach another."""


class SessionTimedOut(TransportUnavailable):
    """The server ended an idle connection (`idle_session_timeout`) just before the statement arrived."""


class NotifyQueueFull(TransportUnavailable):
    """The server's queue of notifications is full, because some session listens and never reads."""


class DuplicateId(TransportUnavailable):
    """The sequence handed out an id that exists, as after a restore. The next try gets the next id.

    Attributes:
        table: the quoted name of the table, with its schema.
        column: the column of the id.
    """

    table: str = ""
    column: str = ""


@attrs.frozen
class SqlstateMeaning:
    """One row of the table.

    Attributes:
        keys: SQLSTATEs, or their classes (the first two characters). A longer key wins over a shorter one. After a
            space it names the cause that tells errors of one SQLSTATE apart: the server's source file, which is the
            same in every language, `id` for the key of a message or dead letter, or PgBouncer's own message.
        meaning: what the error means.
        cause: when the server answers this; a cell of the table in docs/errors.md.
        advice: what to do, for the error's text.
        kind: the error that is raised where it is unavailable.
    """

    keys: tuple[str, ...]
    meaning: Meaning
    cause: str
    advice: str = ""
    kind: type[TransportUnavailable] = TransportUnavailable


_UNAVAILABLE, _IN_DOUBT, _NOT_READY, _REFUSED = Meaning
_MIGRATE = "run `unstract-wire migrate`, or check the schema"
_COMPARE = "compare the tables with transports/postgres/sql/schema.sql"

SQLSTATES = (
    SqlstateMeaning(
        ("08", "57", "58", "F0", "XX"), _IN_DOUBT, "broken connection, shutdown, crash, I/O error, internal error"
    ),
    SqlstateMeaning(("40003",), _IN_DOUBT, "the server does not know whether the statement completed"),
    SqlstateMeaning(
        ("08P01 query_wait_timeout",), _UNAVAILABLE, "PgBouncer had no server connection for the statement"
    ),
    SqlstateMeaning(
        ("0A000 plancache.c", "26000", "42P05"),
        _UNAVAILABLE,
        "a prepared statement is outdated, lost or another's",
        "Behind PgBouncer in transaction mode: listen=false",
        PreparedStatementLost,
    ),
    SqlstateMeaning(
        (f"{_DUPLICATE} id",),
        _UNAVAILABLE,
        "the sequence handed out an id of a message or dead letter that exists",
        "The next try takes the next id; `unstract-wire doctor` shows how far the sequence is behind",
        DuplicateId,
    ),
    SqlstateMeaning(
        ("25006",),
        _UNAVAILABLE,
        "read-only: a standby, or an old primary after a failover",
        "Is this the primary? Use target_session_attrs=read-write",
        ReadOnly,
    ),
    SqlstateMeaning(
        ("54000 async.c",),
        _UNAVAILABLE,
        "the queue of notifications is full",
        "Which session listens and is idle in transaction?",
        NotifyQueueFull,
    ),
    SqlstateMeaning(("57P05",), _UNAVAILABLE, "`idle_session_timeout` ended the session", "", SessionTimedOut),
    SqlstateMeaning(("25",), _UNAVAILABLE, "the transaction had failed, or timed out while it was idle or open"),
    SqlstateMeaning(("40",), _UNAVAILABLE, "serialisation failure, deadlock"),
    SqlstateMeaning(
        ("53",),
        _UNAVAILABLE,
        "disk full, out of memory, too many connections, a configured limit",
    ),
    SqlstateMeaning(
        ("54000", "54001"), _UNAVAILABLE, "wraparound protection; a limit of the server, a relation or the stack"
    ),
    SqlstateMeaning(("55",), _UNAVAILABLE, "lock timeout, an object in use"),
    SqlstateMeaning(("57014",), _UNAVAILABLE, "cancelled: statement timeout, or a cancel request"),
    SqlstateMeaning(("57P03",), _UNAVAILABLE, "the server is starting or stopping, and took no statement"),
    SqlstateMeaning(("72",), _UNAVAILABLE, "the snapshot is too old"),
    SqlstateMeaning(("HV",), _UNAVAILABLE, "a foreign server failed"),
    SqlstateMeaning(("42P01", "3F000"), _NOT_READY, "a table or the schema is missing", _MIGRATE),
    SqlstateMeaning(
        ("42703",),
        _NOT_READY,
        "a column is missing",
        "the table has other columns than those of transports/postgres/sql/schema.sql",
    ),
    SqlstateMeaning((_NO_RIGHT,), _NOT_READY, "a right is missing, or row-level security", "grant this role the right"),
    SqlstateMeaning(
        ("42P10", "42704", "42804", "42809", "42846", "42883", "428C9"),
        _NOT_READY,
        "a key, type or function is missing, or a column or table is of another kind",
        _COMPARE,
    ),
    SqlstateMeaning(
        ("2200H",),
        _NOT_READY,
        "a sequence has reached its maximum",
        "raise its MAXVALUE, or change the type of the id to bigint",
    ),
    SqlstateMeaning(
        ("55000",),
        _NOT_READY,
        "a table cannot be written: a view, or published without a replica identity",
        _COMPARE,
    ),
    SqlstateMeaning(
        ("0P", "28", "3D"),
        _NOT_READY,
        "the role or the database is missing, or the login is rejected",
        "check the user, password and database in the URL",
    ),
    SqlstateMeaning(
        (
            *("54000 arrayfuncs.c", "54000 arrayutils.c", "54000 array_userfuncs.c", "54000 hashinsert.c"),
            *("54000 hio.c", "54000 indextuple.c", "54000 json.c", "54000 jsonb.c", "54000 jsonb_util.c"),
            *("54000 jsonfuncs.c", "54000 mbutils.c", "54000 nbtutils.c", "54000 stringinfo.c", "54000 to_tsany.c"),
            *("54000 tsvector.c", "54000 varlena.c", "54"),
        ),
        _REFUSED,
        "a value is too large for `jsonb`, a row, an array or an index; too many columns or arguments",
        "store large values elsewhere and send a reference",
    ),
    SqlstateMeaning(("22",), _REFUSED, "a value does not fit its type or the database's encoding"),
    SqlstateMeaning(
        ("23", "27", "44"), _REFUSED, "a constraint, another unique key, or a view's check rejects the row"
    ),
    SqlstateMeaning(("P0",), _REFUSED, "a trigger raised an error"),
    SqlstateMeaning(
        ("0A", "0B", "0F", "0L", "0Z", "09", "10", "20", "21", "24", "2B", "2D", "2F", "34", "38", "39", "3B", "42"),
        _REFUSED,
        "the server does not support or understand the statement; a trigger or function failed",
    ),
    SqlstateMeaning(
        ("00", "01", "02", "03"), _REFUSED, "no error of the server's: a trigger raised it under this code"
    ),
)
"""What the errors of PostgreSQL 15 to 18, and of PgBouncer, mean for our statements. Any other code is a trigger's."""

_BY_KEY: Mapping[str, SqlstateMeaning] = {key: row for row in SQLSTATES for key in row.keys}
_ANY_OTHER = SqlstateMeaning(("any other",), Meaning.REFUSED, "a code that only your own triggers and functions raise")


@contextlib.contextmanager
def mapped(operation: str, *, committed_by_us: bool = True) -> Iterator[None]:
    """Turn every error of a PostgreSQL driver inside the block into ours, with the driver's as its cause."""
    try:
        yield
    except ContractError:
        raise
    except Exception as exc:
        if (ours := translate(exc, operation, committed_by_us=committed_by_us)) is None:
            raise
        raise ours from exc


def meaning_of(state: str, cause: str = "") -> SqlstateMeaning:
    """Return the row of the table for a SQLSTATE and, where it has several causes, the cause."""
    for key in (f"{state} {cause}", state, state[:2]):
        if key in _BY_KEY:
            return _BY_KEY[key]
    return _ANY_OTHER


def translate(exc: BaseException, operation: str, *, committed_by_us: bool = True) -> ContractError | None:
    """Return our error for a driver's (psycopg 3, psycopg2, or Django's wrapping of either); None for any other."""
    state = _sqlstate(exc)
    if state is None:
        return _without_state(exc, operation, committed_by_us)
    row = meaning_of(state, _cause(exc, state))
    text = f"{operation}: {_primary(exc)} (SQLSTATE {state})"
    if row.meaning is Meaning.IN_DOUBT and (state == "40003" or not _was_rolled_back(exc)):
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
    return _not_applied(exc, state, row, text, operation)


def _not_applied(exc: BaseException, state: str, row: SqlstateMeaning, text: str, operation: str) -> TransportError:
    """Return our error for an answer after which the server has kept nothing of the statement."""
    if state == _NO_RIGHT and (takes := needed(operation, _primary(exc))):
        text = f"{text}; {takes}"
    if row.meaning is Meaning.NOT_READY:
        return TransportNotReady(f"{text}; {row.advice}")
    if row.meaning is Meaning.REFUSED:
        return TransportRefused(f"{text}; {row.advice}" if row.advice else text)
    kind = PlanOutdated if state == "0A000" else row.kind
    ours = kind(f"{text}; nothing took effect" + (f". {row.advice}" if row.advice else ""))
    if isinstance(ours, DuplicateId):
        names = [_diagnosed(exc, "schema_name") or "", _diagnosed(exc, "table_name") or ""]
        ours.table, ours.column = sql.Identifier(*names).as_string(None), _id_column(exc)
    return ours


def _was_rolled_back(exc: BaseException) -> bool:
    """Return whether the server says that it goes on after the error: then it has rolled the statement back."""
    return _diagnosed(exc, "severity_nonlocalized") == "ERROR"


def _cause(exc: BaseException, state: str) -> str:
    """Return what tells errors of one SQLSTATE apart, in words that are the same in every language of the server."""
    if state == _DUPLICATE:
        return "id" if _id_column(exc) else ""
    if _primary(exc) == _NEVER_PASSED_ON:
        return _NEVER_PASSED_ON
    return _diagnosed(exc, "source_file") or ""


def _id_column(exc: BaseException) -> str:
    """Return the column whose id exists, or "" where another key does.

    The server shows the key's detail only to a role that may read it; the name of the index it shows to all.
    """
    if found := _ID_KEY.search(_diagnosed(exc, "message_detail") or ""):
        return found[1]
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
        return TransportUnavailable(_fate(text, committed_by_us), fate_unknown=committed_by_us)
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
