"""`Statements`: the statements of sql/queries.sql by name, composed for the tables of one schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from psycopg import sql

from transports.postgres.statement import PreparedStatement, Statement, UncompiledStatement
from unstract_core.errors import ConfigurationError

LONGEST_IDENTIFIER = 63
"""Bytes of a PostgreSQL identifier. The server cuts a longer one without an error."""

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
_ARRAY = re.compile(r"(%\(\w+\))s(?=::\w+\[\])")
_TABLES = {"messages": "pg_queue_message", "results": "pg_task_result", "dead": "pg_queue_dead_letter"}
_PARTS = (
    "inserted",
    "bound",
    "costly",
    "is_ready",
    "still_ready",
    "is_claimed",
    "is_claimed_there",
    "still_claimed",
    "largest",
    "parts",
    "claimed",
    "first_ready",
    "newest",
    "newest_of_any",
    "looked_at",
    "looked_at_of_any",
    "letters",
    "is_strange",
    "unexpired",
)
"""Parts of other statements, and of each other in this order."""
_CONTENT = b"c.message::text"
"""The content of a message in the statements that claim."""
_WITHOUT_JIT = ("queue_names", "queues", "ready_estimate")
"""Statements whose plans are so expensive that the server would compile them."""
_COMPOSED_LATER = (
    "candidates",
    "candidates_frontier",
    "claim",
    "claim_frontier",
    "send_one",
    "send_within",
    "send_silently",
)


class Statements:
    """The statements for one schema.

    Arrays are sent in binary, because JSON in them would be escaped twice as text.

    Args:
        schema: the name of the schema.

    Raises:
        ConfigurationError: PostgreSQL cannot have a schema of that name.
    """

    def __init__(self, schema: str) -> None:
        self.schema = checked_schema(schema)
        # A percent sign in an identifier must not be read as a parameter.
        self._identifiers = {name: text.replace("%", "%%") for name, text in _identifiers(schema).items()}
        self._identifiers["strange_table"] = _literal(self._identifiers["messages"])
        self._raw = load_statements("queries.sql")
        self._parts: dict[str, str] = {}
        for name in _PARTS:
            self._parts[name] = self._composed(name)
        self._statements = {
            name: self._statement(name) for name in self._raw if name not in _COMPOSED_LATER and name not in _PARTS
        }
        for name in _WITHOUT_JIT:
            self._statements[name] = UncompiledStatement(self._statements[name].text)
        self._statements["claim_one_queue"], _ = self.claim([""])
        any_queue = {"first_ready": "NULL", "looked_at": self._parts["looked_at_of_any"]}
        recent = {"first_ready": "NULL", "newest": "NULL::bigint"}
        for variant, parts in {
            "requeue_expired_recent": recent,
            "requeue_expired_any_queue": {**any_queue, "newest": self._parts["newest_of_any"]},
            "requeue_expired_recent_any_queue": {**any_queue, **recent},
        }.items():
            self._statements[variant] = self._statement("requeue_expired", **parts)
        send_one = self._raw["send_one"].format(**_identifiers(schema))  # libpq's parameters
        self._statements["send_one"] = PreparedStatement(send_one.encode())

    def __getitem__(self, name: str) -> Statement:
        return self._statements[name]

    @property
    def largest(self) -> int:
        """Bytes of a message's JSON text above which it is not fetched."""
        return int(self._parts["largest"])

    def table(self, name: str) -> str:
        """Return the quoted name of a table: "messages", "results" or "dead"."""
        return _identifiers(self.schema)[name]

    def portable(self, name: str) -> str:
        """Return a statement with parameters that any DB-API driver of PostgreSQL can fill in."""
        inserted = self._raw["inserted"].format(**self._identifiers)
        return self._raw[name].format(**self._identifiers, inserted=inserted)

    def claim(self, queues: Sequence[str | None], *, bounded: bool = True) -> tuple[Statement, dict[str, str | None]]:
        """Return the claim for some queues, and the parameters that name them.

        Args:
            queues: the queues; None means no queue.
            bounded: whether the claim reads only a few more rows of a queue than it can claim. Default True.
        """
        names = _numbered(queues)
        bound = self._parts["bound"] if bounded else ""
        candidates = [self._composed("candidates", queue=f"%({name})s", bound=bound) for name in names]
        return self._statement("claim", candidates=" UNION ALL ".join(candidates)), names

    def without_content(self, claim: Statement) -> Statement:
        """Return a claim that claims the same messages and returns none of their content."""
        return Statement(claim.text.replace(_CONTENT, b"NULL::text"))

    def claim_frontier(self, queues: Sequence[str | None]) -> tuple[Statement, dict[str, str | None]]:
        """Return the claim beyond the frontier for some queues, and the parameters that name the queues.

        The other parameters are `priorities` and, for each of `queues` in their order, `frontier_0`, `frontier_1` and
        so on: the ids beyond which to claim, one for each priority.
        """
        names = _numbered(queues)
        columns = [f"frontier_{number}" for number in range(len(names))]
        candidates = [
            self._composed("candidates_frontier", queue=f"%({name})s", column=column)
            for name, column in zip(names, columns, strict=True)
        ]
        statement = self._statement(
            "claim_frontier",
            columns=", ".join(columns),
            arrays=", ".join(f"%({column})b::bigint[]" for column in columns),
            candidates=" UNION ALL ".join(candidates),
        )
        return statement, names

    def _statement(self, name: str, **parts: str) -> Statement:
        return Statement(self._composed(name, **parts).encode())

    def _composed(self, name: str, **parts: str) -> str:
        return _ARRAY.sub(r"\1b", self._raw[name]).format(**{**self._identifiers, **self._parts, **parts})


def _numbered(queues: Sequence[str | None]) -> dict[str, str | None]:
    return {f"queue_{number}": queue for number, queue in enumerate(queues)}


def definitions(schema: str) -> Mapping[str, str]:
    """Return the statements of schema.sql by the name of the table, index or schema that each creates."""
    identifiers = _identifiers(schema)
    return {name: text.format(**identifiers) for name, text in load_statements("schema.sql").items()}


def checked_schema(schema: str) -> str:
    """Return `schema` if PostgreSQL can have a schema of that name; raise ConfigurationError if not."""
    if not isinstance(schema, str) or not schema or "\0" in schema:
        raise ConfigurationError("the schema must be a non-empty name without NUL")
    try:
        size = len(schema.encode())
    except UnicodeEncodeError as exc:
        raise ConfigurationError("the schema's name is not Unicode text") from exc
    if size > LONGEST_IDENTIFIER:
        raise ConfigurationError(f"the schema's name is {size} bytes long; PostgreSQL keeps {LONGEST_IDENTIFIER}")
    return schema


def _literal(text: str) -> str:
    """Return a text as an SQL literal, without psycopg: the application may have registered its own text adapter."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"


def _identifiers(schema: str) -> dict[str, str]:
    tables = {name: sql.Identifier(schema, table).as_string(None) for name, table in _TABLES.items()}
    return {"schema": sql.Identifier(schema).as_string(None), **tables}


@cache
def load_statements(file: str) -> Mapping[str, str]:
    """Return the statements of a file in sql/ by name, without comments."""
    text = files("transports.postgres").joinpath("sql", file).read_text("utf-8")
    _, *parts = _NAME.split(text)
    bodies = (_COMMENT.sub("", part).strip().rstrip(";") for part in parts[1::2])
    return dict(zip(parts[::2], bodies, strict=True))
