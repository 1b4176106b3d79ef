"""Single fields of a message that any program may have written."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, TypeAlias

import kombu

from unstract_core.codec import check_name
from unstract_core.errors import PayloadError

MessageKey: TypeAlias = tuple[str | None, int]
"""The id and retries of a message, which only its redeliveries share; the id is None if it has none."""

_MAX_RETRIES = 2**31


class MessageProblem(Exception):
    """The reason why a message cannot be run."""


def name_of(value: Any) -> str | None:
    """Return a valid name or id; None for any other value."""
    try:
        check_name(value, "$")
    except PayloadError:
        return None
    return str(value)


def retries_of(headers: Mapping[str, Any]) -> int:
    """Return the number of attempts of a message; 0 if its header is not a valid number."""
    retries = headers.get("retries")
    return retries if type(retries) is int and 0 <= retries < _MAX_RETRIES else 0


def message_key(message: kombu.Message) -> MessageKey:
    """Return the key of a message, from its header 'id' or else its correlation id."""
    name = name_of(message.headers.get("id")) or name_of(message.properties.get("correlation_id"))
    return name, retries_of(message.headers)


def moment_of(headers: Mapping[str, Any], name: str) -> datetime.datetime | None:
    """Return the time in a header, in UTC if it has no time zone; None if the header is absent or null.

    Raises:
        MessageProblem: The header is not a time.
    """
    value = headers.get(name)
    if value is None:
        return None
    try:
        moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(value)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError) as exc:
        raise MessageProblem(f"the header {name!r} is no ISO 8601 moment") from exc


def json_type(value: object) -> str:
    """Return the name of a value's type for the text of an error."""
    return "null" if value is None else type(value).__name__
