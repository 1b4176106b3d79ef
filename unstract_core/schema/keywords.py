"""Compare the keywords that limit one value: type, enum, ranges, lengths and pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import attrs

from unstract_core.schema.document import COUNTS, LIMITS, TYPES, text

Keywords: TypeAlias = Mapping[str, Any]

LIMITING = ("type", "enum", "const", "pattern", *LIMITS, *COUNTS)

_LONGEST = 60
_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


@attrs.frozen
class LimitChange:
    """A change of one limit."""

    #: The change.
    what: str
    #: Whether a value that was allowed no longer is.
    less: bool
    #: Whether a value that was not allowed now is.
    more: bool


def limit_changes(old: Keywords, new: Keywords) -> Iterator[LimitChange]:
    """Yield every limit that changed."""
    if _differ(old, new, "type"):
        before, now = types_of(old), types_of(new)
        yield LimitChange(f"it was {named(old)}, is {named(new)}", bool(before - now), bool(now - before))
    if _differ(old, new, "enum", "const"):
        yield _choices(_choice(old), _choice(new))
    if _differ(old, new, *_LOW):
        yield _bounds(_low(old), _low(new), _written(old, new, _LOW))
    if _differ(old, new, *_HIGH):
        yield _bounds(_high(new), _high(old), _written(old, new, _HIGH))
    for keyword in COUNTS:
        if _differ(old, new, keyword):
            lowest = keyword.startswith("min")
            before, now = (schema.get(keyword, 0 if lowest else math.inf) for schema in (old, new))
            raised, lowered = now > before, now < before
            less, more = (raised, lowered) if lowest else (lowered, raised)
            yield LimitChange(_written(old, new, (keyword,)), less, more)
    if _differ(old, new, "pattern"):
        yield LimitChange(_written(old, new, ("pattern",)), less="pattern" in new, more="pattern" in old)


def types_of(schema: Keywords) -> frozenset[str]:
    """Return the types that a schema allows; "number" includes "integer"."""
    if "type" in schema:
        listed = schema["type"]
        types = {listed} if isinstance(listed, str) else set(listed)
    elif (choice := _choice(schema)) is not None:
        types = {_type_of(value) for value in choice.values()}
    else:
        types = set(TYPES)
    return frozenset(types | ({"integer"} if "number" in types else set()))


def named(schema: Keywords) -> str:
    """Return the allowed types in words."""
    types = types_of(schema)
    if types == set(TYPES):
        return "of any type"
    return " or ".join(name for name in TYPES if name in types and not (name == "integer" and "number" in types))


def value_text(schema: Keywords, keyword: str) -> str:
    """Return the text of a keyword's value, or "absent"."""
    return short_text(schema[keyword]) if keyword in schema else "absent"


def short_text(value: Any) -> str:
    """Return a JSON value as text, shortened to one line."""
    written = text(value)
    return written if len(written) <= _LONGEST else f"{written[:_LONGEST]}..."


def _differ(old: Keywords, new: Keywords, *keywords: str) -> bool:
    return any(
        (keyword in old) != (keyword in new) or text(old.get(keyword)) != text(new.get(keyword)) for keyword in keywords
    )


def _written(old: Keywords, new: Keywords, keywords: tuple[str, ...]) -> str:
    changed = [keyword for keyword in keywords if _differ(old, new, keyword)]
    return " and ".join(
        f"{keyword} was {value_text(old, keyword)}, is {value_text(new, keyword)}" for keyword in changed
    )


def _choice(schema: Keywords) -> dict[str, Any] | None:
    """Return the listed values by their JSON text; None if any value is allowed."""
    lists = [schema[keyword] for keyword in ("enum",) if keyword in schema]
    lists += [[schema[keyword]] for keyword in ("const",) if keyword in schema]
    if not lists:
        return None
    first, *others = ({text(value): value for value in values} for values in lists)
    return {key: value for key, value in first.items() if all(key in other for other in others)}


def _choices(old: dict[str, Any] | None, new: dict[str, Any] | None) -> LimitChange:
    if old is None or new is None:
        listed = ", ".join((new if old is None else old) or {})
        what = f"only {listed} is possible now" if old is None else f"not only {listed} is possible any more"
        return LimitChange(what, less=old is None, more=new is None)
    gone, come = [key for key in old if key not in new], [key for key in new if key not in old]
    parts = [f"{', '.join(gone)} is no longer possible"] if gone else []
    parts += [f"{', '.join(come)} is possible now"] if come else []
    return LimitChange(", and ".join(parts) or "the same values in another order", bool(gone), bool(come))


def _bounds(stricter_if_less: tuple[float, int], than: tuple[float, int], what: str) -> LimitChange:
    return LimitChange(what, less=stricter_if_less < than, more=stricter_if_less > than)


def _low(schema: Keywords) -> tuple[float, int]:
    return max((schema.get("minimum", -math.inf), 0), (schema.get("exclusiveMinimum", -math.inf), 1))


def _high(schema: Keywords) -> tuple[float, int]:
    return min((schema.get("maximum", math.inf), 0), (schema.get("exclusiveMaximum", math.inf), -1))


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
