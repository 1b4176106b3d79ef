"""The table of SQLSTATEs and their meanings; docs/errors.md has the same table.

An error is a refusal only if the same statement can never succeed.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from transports.postgres.errors import DuplicateId, NotifyQueueFull, PreparedStatementLost, ReadOnly, SessionTimedOut
from unstract_core.errors import Meaning, TransportUnavailable

INSUFFICIENT_PRIVILEGE = "42501"
UNIQUE_VIOLATION = "23505"


@attrs.frozen
class SqlstateMeaning:
    """One row of the table.

    Attributes:
        keys: SQLSTATEs, or their classes (the first two characters). If two keys match, the longer one applies. A key
            can have a cause after a space, which distinguishes errors of one SQLSTATE. The cause is the server's source
            file, `id` for the key of a message or dead letter, or PgBouncer's own message.
        meaning: the meaning of the error.
        cause: the situation in which the server returns it; a cell of the table in docs/errors.md.
        advice: the remedy, for the error's text.
        kind: the error to raise if the meaning is unavailable.
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
        "a prepared statement is outdated or missing, or its name is in use",
        "Behind PgBouncer in transaction mode: listen=false",
        PreparedStatementLost,
    ),
    SqlstateMeaning(
        (f"{UNIQUE_VIOLATION} id",),
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
    SqlstateMeaning(
        (INSUFFICIENT_PRIVILEGE,), _NOT_READY, "a right is missing, or row-level security", "grant this role the right"
    ),
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
        ("00", "01", "02", "03"), _REFUSED, "not an error of the server: a trigger raised it under this code"
    ),
)
"""The meanings of the errors of PostgreSQL 15 to 18 and of PgBouncer. Any other code comes from a trigger."""

_BY_KEY: Mapping[str, SqlstateMeaning] = {key: row for row in SQLSTATES for key in row.keys}
_ANY_OTHER = SqlstateMeaning(("any other",), Meaning.REFUSED, "a code that only your own triggers and functions raise")


def meaning_of(state: str, cause: str = "") -> SqlstateMeaning:
    """Return the row of the table for a SQLSTATE.

    Args:
        state: the SQLSTATE.
        cause: the cause, if the SQLSTATE has several; see `SqlstateMeaning.keys`. Default "".
    """
    for key in (f"{state} {cause}", state, state[:2]):
        if key in _BY_KEY:
            return _BY_KEY[key]
    return _ANY_OTHER
