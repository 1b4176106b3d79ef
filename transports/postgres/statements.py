"""The statements of sql/*.sql, by name, with one schema's identifiers composed in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from psycopg import sql

from unstract_core.errors import ConfigurationError

LONGEST_IDENTIFIER = 63
"""Bytes of a PostgreSQL identifier; the server would cut a longer one without a word."""

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
"""What others are composed of, and of each other in this order."""
_CONTENT = b"c.message::text"
"""The content of a message in the statements that claim."""
_NEED_MORE = (
    "candidates",
    "candidates_frontier",
    "claim",
    "claim_frontier",
    "send_one",
    "send_within",
    "send_silently",
)


class Statements:
    """The production statements for one schema, as the bytes that psycopg keeps what it knows of them by.

    Arrays travel in binary: as text, JSON in them is escaped twice.
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
        self._texts = {
            name: self._composed(name).encode() for name in self._raw if name not in _NEED_MORE and name not in _PARTS
        }
        self._texts["claim_one_queue"], _ = self.claim([""])
        of_any = {"first_ready": "NULL", "looked_at": self._parts["looked_at_of_any"]}
        lately = {"first_ready": "NULL", "newest": "NULL::bigint"}
        for variant, parts in {
            "requeue_expired_recent": lately,
            "requeue_expired_any_queue": {**of_any, "newest": self._parts["newest_of_any"]},
            "requeue_expired_recent_any_queue": {**of_any, **lately},
        }.items():
            self._texts[variant] = self._composed("requeue_expired", **parts).encode()
        self._texts["send_one"] = self._raw["send_one"].format(**_identifiers(schema)).encode()  # libpq's parameters

    def __getitem__(self, name: str) -> bytes:
        return self._texts[name]

    @property
    def largest(self) -> int:
        """Bytes of a message's JSON text above which it is not fetched."""
        return int(self._parts["largest"])

    def table(self, name: str) -> str:
        """Return the quoted name of a table: "messages", "results" or "dead"."""
        return _identifiers(self.schema)[name]

    def portable(self, name: str) -> str:
        """Return a statement whose parameters any DB-API driver of PostgreSQL can fill in."""
        inserted = self._raw["inserted"].format(**self._identifiers)
        return self._raw[name].format(**self._identifiers, inserted=inserted)

    def claim(self, queues: Sequence[str | None], *, bounded: bool = True) -> tuple[bytes, dict[str, str | None]]:
        """Return the claim for these queues, and the parameters that name them; None stands for no queue.

        It looks at little more rows of a queue than it could take, unless `bounded` is False.
        """
        names = _numbered(queues)
        bound = self._parts["bound"] if bounded else ""
        candidates = [self._composed("candidates", queue=f"%({name})s", bound=bound) for name in names]
        return self._composed("claim", candidates=" UNION ALL ".join(candidates)).encode(), names

    def without_content(self, claim: bytes) -> bytes:
        """Return a claim that claims the same messages and returns none of their content."""
        return claim.replace(_CONTENT, b"NULL::text")

    def claim_frontier(self, queues: Sequence[str | None]) -> tuple[bytes, dict[str, str | None]]:
        """Return the claim for these queues beyond some ids, and the parameters that name the queues.

        The ids are arrays `frontier_0`, `frontier_1` and so on in the order of `queues`, beside the array `priorities`.
        """
        names = _numbered(queues)
        columns = [f"frontier_{number}" for number in range(len(names))]
        candidates = [
            self._composed("candidates_frontier", queue=f"%({name})s", column=column)
            for name, column in zip(names, columns, strict=True)
        ]
        statement = self._composed(
            "claim_frontier",
            columns=", ".join(columns),
            arrays=", ".join(f"%({column})b::bigint[]" for column in columns),
            candidates=" UNION ALL ".join(candidates),
        )
        return statement.encode(), names

    def _composed(self, name: str, **parts: str) -> str:
        return _ARRAY.sub(r"\1b", self._raw[name]).format(**{**self._identifiers, **self._parts, **parts})


def _numbered(queues: Sequence[str | None]) -> dict[str, str | None]:
    return {f"queue_{number}": queue for number, queue in enumerate(queues)}


def definitions(schema: str) -> Mapping[str, str]:
    """Return the statements that create what is missing, by the name of what they create; they take no parameters."""
    identifiers = _identifiers(schema)
    return {name: text.format(**identifiers) for name, text in load_statements("schema.sql").items()}


def checked_schema(schema: str) -> str:
    """Return `schema` if PostgreSQL can have one of that name; raise ConfigurationError if not."""
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
    """Write a text as SQL by hand: an application may have registered an adapter of its own for texts."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"


def _identifiers(schema: str) -> dict[str, str]:
    tables = {name: sql.Identifier(schema, table).as_string(None) for name, table in _TABLES.items()}
    return {"schema": sql.Identifier(schema).as_string(None), **tables}


@cache
def load_statements(file: str) -> Mapping[str, str]:
    text = files("transports.postgres").joinpath("sql", file).read_text("utf-8")
    _, *parts = _NAME.split(text)
    bodies = (_COMMENT.sub("", part).strip().rstrip(";") for part in parts[1::2])
    return dict(zip(parts[::2], bodies, strict=True))
