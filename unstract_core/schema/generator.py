"""Generate the JSON Schema of a task from the types of payload.py and from the writer.

The keys and their types are read from the attrs classes. The other rules are found by writing samples: the keys of a
minimal payload, the longest string, the range of an integer, and the keys that exclude each other. So there is no
second list of fields or limits.

The schema describes the messages that a writer writes. A rule that JSON Schema cannot express is a `$comment`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, TypeAlias

import attrs

from unstract_core.codec import MAX_HEADERS_BYTES, MAX_NAME_BYTES, to_wire
from unstract_core.errors import ConfigurationError, PayloadError
from unstract_core.payload import HIGHEST_PRIORITY, LOWEST_PRIORITY, TaskPayload
from unstract_core.schema.document import DIALECT
from unstract_core.values.limits import ENVELOPE, FLOAT_LIMIT, INT_MAX, INT_MIN, MAX_DEPTH, MAX_SIZE

Schema: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[Any], Mapping[str, Any]]
Accepts: TypeAlias = Callable[[object], bool]

TEXT = "^[\x01-\ud7ff\ue000-\U0010ffff]*$"
"""A text without NUL and surrogates; the characters are not escaped, because regex dialects escape differently."""

_ONLY_INTEGERS = "JSON Schema accepts 7.0 as an integer; writers write 7, and readers accept 7.0"


class _Value:
    """Replaces JSONValue, which is recursive, while type hints are resolved."""


_TEXTS = dict[str, str]
_MEMBERS = {list[_Value]: ("array", ["\0"]), dict[str, _Value]: ("object", {"\0": None})}


def task_payload_schema() -> Schema:
    """Generate the schema of a message.

    Raises:
        ConfigurationError: A field has a type for which no schema is known.
    """
    return {
        "$schema": DIALECT,
        "$id": "urn:unstract-wire:task_payload:v1",
        "title": "A task as unstract-wire writes it",
        **schema_of(TaskPayload, to_wire),
    }


def schema_of(kind: type[Any], write: Write) -> Schema:
    """Generate the schema of a class as `write` encodes it.

    Args:
        kind: An attrs class.
        write: Encodes an instance as a mapping; raises PayloadError for an invalid value.

    Returns:
        The schema, with every definition that it refers to.

    Raises:
        ConfigurationError: A field has a type for which no schema is known.
    """
    definitions: dict[str, Schema] = {}
    schema = _object(kind, write, definitions)
    return {**schema, "$defs": {**definitions, **_domain()}}


def _domain() -> dict[str, Schema]:
    """Return the definitions that all messages share: names, and the values of limits.py."""
    text, value = _ref("text"), _ref("value")
    return {
        "name": {
            "$comment": f"at most {MAX_NAME_BYTES} bytes of UTF-8; a schema counts characters",
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_NAME_BYTES,
            "pattern": TEXT,
        },
        "text": {"$comment": "no NUL, no lone surrogates", "type": "string", "pattern": TEXT},
        "value": {
            "$comment": f"at most {MAX_DEPTH} levels of arrays and objects below args and kwargs; "
            f"at most {MAX_SIZE} bytes in each of args and kwargs; no -0.0",
            "anyOf": [
                {"type": "null"},
                {"type": "boolean"},
                {"type": "integer", "minimum": INT_MIN, "maximum": INT_MAX},
                {"type": "number", "exclusiveMinimum": -int(FLOAT_LIMIT), "exclusiveMaximum": int(FLOAT_LIMIT)},
                text,
                _ref("array"),
                _ref("object"),
            ],
        },
        "array": {"type": "array", "items": value},
        "object": {
            "type": "object",
            "propertyNames": text,
            "additionalProperties": value,
            "not": {"required": sorted(ENVELOPE), "maxProperties": len(ENVELOPE)},
        },
    }


def _object(kind: type[Any], write: Write, definitions: dict[str, Schema]) -> Schema:
    bare = _bare(kind)
    written = write(bare)
    properties: dict[str, Schema] = {}
    for name, hint in _hints(kind).items():

        def put(sample: Any, name: str = name) -> Any:
            return write(attrs.evolve(bare, **{name: sample}))[name]

        kept, nullable = _without_none(hint)
        schema = _property(kept, put, f"{kind.__name__}.{name}", definitions)
        properties[name] = {"anyOf": [schema, {"type": "null"}]} if nullable and name in written else schema
    schema = {
        "description": (kind.__doc__ or "").strip().partition("\n")[0],
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name in written],
        "additionalProperties": True,
    }
    apart = [{"not": {"required": list(pair)}} for pair in _never_together(kind, bare, write, written)]
    return schema | ({"allOf": apart} if apart else {})


def _property(hint: Any, put: Callable[[Any], Any], place: str, definitions: dict[str, Schema]) -> Schema:
    def accepts(sample: object) -> bool:
        try:
            put(sample)
        except PayloadError:
            return False
        return True

    if isinstance(hint, type) and attrs.has(hint):
        part = _object(hint, put, definitions)
        if definitions.setdefault(hint.__name__, part) != part:
            raise ConfigurationError(f"{place}: {hint.__name__} is written differently elsewhere; use a separate class")
        return _ref(hint.__name__)
    if typing.get_origin(hint) is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    if hint in _MEMBERS:
        name, unfit = _MEMBERS[hint]
        return {"type": name} if accepts(unfit) else _ref(name)
    if hint == _TEXTS:
        names, values = _text(lambda name: accepts({name: ""})), _text(lambda text: accepts({"x": text}))
        if names is None or values is None:
            raise _unknown(place, hint)
        comment = f"at most {MAX_HEADERS_BYTES} bytes of UTF-8, all names and values together"
        return {"$comment": comment, "type": "object", "propertyNames": names, "additionalProperties": values}
    schema = _text(accepts) if hint is str else _integer(accepts) if hint is int else None
    if schema is None:
        raise _unknown(place, hint)
    return schema


def _text(accepts: Accepts) -> Schema | None:
    longest = "x" * MAX_NAME_BYTES
    match accepts(""), accepts(longest), accepts(f"{longest}x"), accepts("\0"):
        case False, True, False, False:
            return _ref("name")
        case True, True, True, False:
            return _ref("text")
        case True, True, True, True:
            return {"type": "string"}
    return None


def _integer(accepts: Accepts) -> Schema | None:
    for low, high in ((LOWEST_PRIORITY, HIGHEST_PRIORITY), (INT_MIN, INT_MAX)):
        if [accepts(number) for number in (low - 1, low, high, high + 1)] == [False, True, True, False]:
            return {"$comment": _ONLY_INTEGERS, "type": "integer", "minimum": low, "maximum": high}
    return {"type": "integer"} if accepts(INT_MIN - 1) and accepts(INT_MAX + 1) else None


def _never_together(kind: type[Any], bare: Any, write: Write, written: Mapping[str, Any]) -> list[tuple[str, str]]:
    optional = {name: _without_none(hint)[0] for name, hint in _hints(kind).items() if name not in written}
    pairs = []
    for pair in combinations(optional, 2):
        try:
            write(attrs.evolve(bare, **{name: _sample(optional[name], name) for name in pair}))
        except PayloadError:
            pairs.append(pair)
    return pairs


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field, in order."""
    hints = typing.get_type_hints(kind, localns={"JSONValue": _Value})
    return {field.name: hints[field.name] for field in attrs.fields(kind)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    kept = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return (kept[0], True) if len(kept) == 1 else (hint, False)


def _bare(kind: type[Any]) -> Any:
    """Return an instance of `kind` with only its required fields."""
    hints = _hints(kind)
    needed = [field for field in attrs.fields(kind) if field.default is attrs.NOTHING]
    samples = {
        field.alias or field.name: _sample(hints[field.name], f"{kind.__name__}.{field.name}") for field in needed
    }
    return kind(**samples)


def _sample(hint: Any, place: str) -> Any:
    """Return a valid value of a field."""
    if isinstance(hint, type) and attrs.has(hint):
        return _bare(hint)
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    samples: dict[Any, Any] = {str: "x", int: LOWEST_PRIORITY, list[_Value]: [], dict[str, _Value]: {}, _TEXTS: {}}
    if hint not in samples:
        raise _unknown(place, hint)
    return samples[hint]


def _unknown(place: str, hint: Any) -> ConfigurationError:
    return ConfigurationError(f"{place}: no schema is known for {hint}; add it to {__name__}")


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
