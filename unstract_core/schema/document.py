"""A schema as a document: its validity, its references, and the equality of two parts.

Every keyword that the comparison reads is checked first, so that it has the right type and each reference exists. A
reference to another document is rejected, because that document could change unnoticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from unstract_core.errors import ConfigurationError
from unstract_core.values.limits import json_path

Part: TypeAlias = "dict[str, Any] | bool"
"""A schema inside a schema; `true` allows every value, `false` none."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ONE_SCHEMA = ("additionalProperties", "items", "propertyNames", "not")
SCHEMAS_BY_NAME = ("properties", "$defs")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf")
LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
TEXTS = ("$id", "title", "description", "$comment", "pattern")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def checked(document: Any) -> dict[str, Any]:
    """Return the document if it is a JSON Schema of draft 2020-12.

    Raises:
        ConfigurationError: It is not valid; the text has the JSON path of the invalid part.
    """
    if not isinstance(document, dict):
        raise ConfigurationError("$: expected a schema, which is a JSON object")
    if document.get("$schema") != DIALECT:
        raise ConfigurationError(f"$: expected a schema with $schema: {DIALECT}")
    _check(document, document, [])
    return document


def _check(part: Any, document: dict[str, Any], keys: list[str | int]) -> None:
    if isinstance(part, bool):
        return
    _demand(isinstance(part, dict), keys, "a schema, which is an object, true or false")
    for keyword, value in part.items():
        here = [*keys, keyword]
        if keyword in _SHAPES:
            fits, expected = _SHAPES[keyword]
            _demand(fits(value), here, expected)
        if keyword == "$ref":
            _demand(
                _resolves_to_a_schema(value, document), here, "a reference to a schema of this document (#/$defs/name)"
            )
        elif keyword == "$id":
            _demand(not keys, here, "no $id except that of the whole document")
        for inner, keys_of_inner in _inner(keyword, value):
            _check(inner, document, [*here, *keys_of_inner])


def _inner(keyword: str, value: Any) -> Iterator[tuple[Any, list[str | int]]]:
    if keyword in ONE_SCHEMA:
        yield value, []
    elif keyword in SCHEMAS_BY_NAME:
        for name, part in value.items():
            yield part, [name]
    elif keyword in LISTS_OF_SCHEMAS:
        for index, part in enumerate(value):
            yield part, [index]


def _demand(fits: bool, keys: list[str | int], expected: str) -> None:
    if not fits:
        raise ConfigurationError(f"{json_path('$', keys)}: expected {expected}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_types(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else _is_names(value) and bool(value) and set(value) <= set(TYPES)


def _is_array(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_types, f"one or more of {', '.join(TYPES)}"),
    "required": (_is_names, "an array of names"),
    "enum": (_is_array, "an array"),
    **dict.fromkeys(TEXTS, (_is_text, "a string")),
    **dict.fromkeys(LIMITS, (_is_number, "a number")),
    **dict.fromkeys(COUNTS, (_is_count, "an integer of 0 or more")),
    **dict.fromkeys(SCHEMAS_BY_NAME, (_is_object, "an object of schemas")),
    **dict.fromkeys(LISTS_OF_SCHEMAS, (lambda value: _is_array(value) and bool(value), "an array of schemas")),
}


def _resolves_to_a_schema(ref: Any, document: dict[str, Any]) -> bool:
    visited: set[str] = set()
    while isinstance(ref, str) and ref not in visited:
        visited.add(ref)
        definition = _target(ref, document)
        if not isinstance(definition, dict):
            return isinstance(definition, bool)
        if "$ref" not in definition:
            return True
        ref = definition["$ref"]
    return False


def _target(ref: str, document: dict[str, Any]) -> Any:
    """Return the definition of `#/$defs/name`; None if it does not exist or the reference has another form."""
    place, _, name = ref.rpartition("/")
    definitions = document.get("$defs")
    if place != "#/$defs" or not isinstance(definitions, dict):
        return None
    return definitions.get(name.replace("~1", "/").replace("~0", "~"))


def follow(ref: str, document: dict[str, Any]) -> Part:
    """Return the schema that a reference of a checked document names."""
    definition: Part = _target(ref, document)
    return definition


def text(part: Any) -> str:
    """Return the same text for equal JSON values; `true` and 1 differ."""
    return json.dumps(part, sort_keys=True)


def in_any_order(part: Any) -> Any:
    """Return a schema with every list sorted whose order has no meaning."""
    if isinstance(part, list):
        return [in_any_order(item) for item in part]
    if not isinstance(part, dict):
        return part
    unordered = ("required", "type", "enum", *LISTS_OF_SCHEMAS)
    return {
        key: sorted(map(in_any_order, value), key=text)
        if key in unordered and isinstance(value, list)
        else in_any_order(value)
        for key, value in part.items()
    }


def reached(part: Any, document: dict[str, Any]) -> dict[str, str]:
    """Return every definition that `part` refers to, directly or not, by its reference."""
    definitions: dict[str, str] = {}
    waiting = [part]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            ref = item.get("$ref")
            if isinstance(ref, str) and ref not in definitions and (target := _target(ref, document)) is not None:
                definitions[ref] = text(target)
                waiting.append(target)
            waiting += [value for key, value in item.items() if key != "$defs"]
        elif isinstance(item, list):
            waiting += item
    return definitions
