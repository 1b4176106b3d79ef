"""The readers that a schema change breaks: each kind of change, in each direction, without omissions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from core.wire_schema import Wire, mutated
from hypothesis import assume, given
from hypothesis import strategies as st

from unstract_core import ConfigurationError
from unstract_core.schema import committed_schema
from unstract_core.schema.changes import (
    KEEP_READING,
    NEW_READERS,
    OLD_READERS,
    ONLY_WHAT_WAS,
    OPTIONAL,
    STILL_READ,
    STILL_WRITE,
    UNDECIDED,
    Change,
)
from unstract_core.schema.compare import compare
from unstract_core.schema.document import DIALECT

SCHEMA = committed_schema()
FINE: tuple[str, ...] = ()
OLD, NEW, BOTH = (OLD_READERS,), (NEW_READERS,), (OLD_READERS, NEW_READERS)

Broken = dict[str, set[tuple[str, ...]]]


def document(**keywords: Any) -> dict[str, Any]:
    return {"$schema": DIALECT, **keywords}


def message(**keywords: Any) -> dict[str, Any]:
    return document(type="object", **keywords)


def at_key(part: Any, **keywords: Any) -> dict[str, Any]:
    """Return a message with one key, `x`."""
    return message(properties={"x": part}, **keywords)


def sides_of(old: Any, new: Any) -> Broken:
    """Return the sides that each change breaks, by its path."""
    found: Broken = {}
    for change in compare(old, new):
        found.setdefault(change.path, set()).add(change.breaks)
    return found


def broken(old: Any, new: Any, path: str = "$") -> set[tuple[str, ...]]:
    """Return the sides that are broken at a place or inside it."""
    return {sides for at, found in sides_of(old, new).items() if at.startswith(path) for sides in found} - {FINE}


def remedies(old: Any, new: Any) -> dict[str, str]:
    """Return the remedy of each breaking change, by its path."""
    return {change.path: change.remedy for change in compare(old, new) if change.breaks}


def test_each_kind_of_change_has_its_remedy() -> None:
    """A narrower limit, a wider one, a removed key and a changed requirement each have their own remedy."""
    limited = message(properties={"x": {"type": "string", "maxLength": 64}, "y": {}}, required=["x"])
    wider = message(properties={"x": {"type": "string", "maxLength": 255}, "y": {}}, required=["x"])
    assert remedies(wider, limited) == {"$.x": STILL_READ}
    assert remedies(limited, wider) == {"$.x": ONLY_WHAT_WAS}
    assert remedies(wider, message(properties={"x": wider["properties"]["x"]}, required=["x"])) == {"$.y": KEEP_READING}
    assert remedies(wider, {**wider, "required": []}) == {"$.x": STILL_WRITE}
    assert remedies(wider, {**wider, "required": ["x", "y"]}) == {"$.y": OPTIONAL}
    assert len({STILL_READ, ONLY_WHAT_WAS, KEEP_READING, STILL_WRITE, OPTIONAL, UNDECIDED}) == 6
    assert STILL_READ.startswith("keep reading every value that was written before")


STRING, NUMBER, INTEGER, NULL = ({"type": name} for name in ("string", "number", "integer", "null"))
WIDER: dict[str, tuple[Any, Any]] = {
    "a type more": (STRING, {"type": ["string", "null"]}),
    "an integer that may be any number": (INTEGER, NUMBER),
    "no type any more": (STRING, {}),
    "anything instead of nothing": (False, True),
    "anything instead of something": (STRING, True),
    "something instead of nothing": (False, STRING),
    "a value of an enum more": ({"enum": ["a"]}, {"enum": ["a", "b"]}),
    "no enum any more": ({"type": "string", "enum": ["a"]}, STRING),
    "an enum instead of a constant": ({"const": "a"}, {"enum": ["b", "a"]}),
    "no constant any more": ({"const": 1}, {}),
    "true beside 1": ({"enum": [1]}, {"enum": [1, True]}),
    "a lower minimum": ({"minimum": 2}, {"minimum": 1}),
    "no minimum any more": ({"minimum": 2}, {}),
    "a minimum that is included": ({"exclusiveMinimum": 2}, {"minimum": 2}),
    "a lower exclusive minimum": ({"exclusiveMinimum": 2}, {"exclusiveMinimum": 1.5}),
    "a higher maximum": ({"maximum": 2}, {"maximum": 2.5}),
    "no maximum any more": ({"maximum": 2}, {}),
    "a maximum that is included": ({"exclusiveMaximum": 2}, {"maximum": 2}),
    "a higher exclusive maximum": ({"exclusiveMaximum": 2}, {"exclusiveMaximum": 10**400}),
    "a shorter string": ({"minLength": 2}, {"minLength": 1}),
    "a longer string": ({"maxLength": 2}, {"maxLength": 3}),
    "a string of any length": ({"maxLength": 2}, {}),
    "fewer items": ({"minItems": 2}, {"minItems": 1}),
    "more items": ({"maxItems": 2}, {"maxItems": 3}),
    "fewer members": ({"minProperties": 1}, {"minProperties": 0}),
    "more members": ({"maxProperties": 1}, {"maxProperties": 2}),
    "no pattern any more": ({"pattern": "^a"}, {}),
    "a choice more": ({"anyOf": [STRING]}, {"anyOf": [STRING, NULL]}),
    "a choice where there was none": (STRING, {"anyOf": [STRING, NULL]}),
    "no choice any more": ({"type": "string", "anyOf": [{"minLength": 1}]}, STRING),
    "an exclusive choice more": ({"oneOf": [STRING]}, {"oneOf": [STRING, NULL]}),
    "a condition less": ({"allOf": [{"minLength": 1}, {"maxLength": 2}]}, {"allOf": [{"minLength": 1}]}),
    "a condition that asks for less": ({"allOf": [{"minLength": 2}]}, {"allOf": [{"minLength": 1}]}),
    "no conditions any more": ({"allOf": [{"minLength": 1}]}, {}),
    "nothing forbidden any more": ({"not": {"const": 1}}, {}),
    "less forbidden": ({"not": {"enum": ["a", "b"]}}, {"not": {"enum": ["a"]}}),
    "forbidden with more keys only": ({"not": {"required": ["a"]}}, {"not": {"required": ["a", "b"]}}),
    "forbidden where a key is narrower": (
        {"not": {"properties": {"a": True}}},
        {"not": {"properties": {"a": {"minLength": 1}}}},
    ),
    "forbidden where a key more is looked at": (
        {"type": "object", "not": {"properties": {"a": STRING}}},
        {"type": "object", "not": {"properties": {"a": STRING, "b": STRING}}},
    ),
    "doubly forbidden": ({"not": {"not": {"maxLength": 1}}}, {"not": {"not": {"maxLength": 2}}}),
}
INSIDE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "": (at_key, "$.x"),
    "in items": (lambda part: at_key({"type": "array", "items": part}), "$.x[*]"),
    "in the values of a map": (lambda part: at_key({"additionalProperties": part}), "$.x.*"),
    "in the keys of a map": (lambda part: at_key({"propertyNames": part}), "$.x (its keys)"),
    "in an object": (lambda part: at_key({"properties": {"odd key": part}}), '$.x["odd key"]'),
    "behind a reference": (lambda part: at_key({"$ref": "#/$defs/d"}, **{"$defs": {"d": part}}), "$.x"),
    "behind two references": (
        lambda part: at_key({"$ref": "#/$defs/c"}, **{"$defs": {"c": {"$ref": "#/$defs/a~1b"}, "a/b": part}}),
        "$.x",
    ),
    "in a condition": (lambda part: at_key({"allOf": [part]}), "$.x"),
    "for keys that are not named": (lambda part: document(additionalProperties=part), "$.*"),
}


@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("kind", WIDER)
def test_wider_breaks_old_and_narrower_new_readers(kind: str, place: str) -> None:
    """A wider type, range, length, pattern or choice breaks old readers, and a narrower one new readers."""
    (narrow, wide), (put, path) = WIDER[kind], INSIDE[place]
    assert broken(put(narrow), put(wide), path) == broken(put(narrow), put(wide)) == {OLD}
    assert broken(put(wide), put(narrow), path) == broken(put(wide), put(narrow)) == {NEW}


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "another type": (STRING, INTEGER),
    "a number instead of null": ({"anyOf": [STRING, NULL]}, {"anyOf": [STRING, NUMBER]}),
    "another constant": ({"const": 1}, {"const": 2}),
    "other values of an enum": ({"enum": ["a", "b"]}, {"enum": ["b", "c"]}),
    "another range": ({"minimum": 1, "maximum": 5}, {"minimum": 2, "maximum": 6}),
    "another pattern": ({"pattern": "^a"}, {"pattern": "^a$"}),
    "exclusive choices that may overlap": ({"oneOf": [{}, STRING]}, {"oneOf": [{}, NULL]}),
    "exclusive choices of which one grows": (
        {"oneOf": [{"minimum": 5, "type": "number"}, INTEGER]},
        {"oneOf": [{"minimum": 4, "type": "number"}, INTEGER]},
    ),
    "an exclusive choice instead of a choice": ({"anyOf": [STRING, NULL]}, {"oneOf": [STRING, NULL]}),
    "other conditions": (
        {"allOf": [{"minLength": 1}, {"maxLength": 2}]},
        {"allOf": [{"minLength": 2}, {"maxLength": 3}]},
    ),
    "a keyword that is not known": ({}, {"dependentRequired": {"a": ["b"]}}),
    "one that says something else": ({"multipleOf": 2}, {"multipleOf": 4}),
    "a reference that says more": ({"$ref": "#/$defs/d", "minLength": 1}, {"$ref": "#/$defs/e", "minLength": 1}),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_undecidable_change_breaks_both_sides(kind: str) -> None:
    """A change to another type, or one that cannot be judged, breaks both sides in each direction."""
    for old, new in (DIFFERENT[kind], DIFFERENT[kind][::-1]):
        definitions = {"d": STRING, "e": STRING}
        found = broken(at_key(old, **{"$defs": definitions}), at_key(new, **{"$defs": definitions}))
        assert {side for sides in found for side in sides} == set(BOTH)


KEYS: dict[str, tuple[Any, Any, set[tuple[str, ...]], set[tuple[str, ...]]]] = {
    "an optional key": (message(), at_key(STRING), set(), {NEW}),
    "a required key": (message(), at_key(STRING, required=["x"]), {NEW}, {OLD, NEW}),
    "a required key of any type": (message(), message(required=["x"]), {NEW}, {OLD, NEW}),
    "an optional key that becomes required": (at_key(STRING), at_key(STRING, required=["x"]), {NEW}, {OLD}),
    "an optional key where others are forbidden": (
        message(additionalProperties=False),
        at_key(STRING, additionalProperties=False),
        {OLD},
        {NEW},
    ),
    "a required key where others are forbidden": (
        message(additionalProperties=False),
        at_key(STRING, additionalProperties=False, required=["x"]),
        {OLD, NEW},
        {OLD, NEW},
    ),
    "a key of what others had to be": (
        message(additionalProperties=STRING),
        at_key(INTEGER, additionalProperties=STRING),
        {BOTH},
        {BOTH},
    ),
    "a required key with a narrower type": (
        message(required=["x"]),
        at_key(STRING, required=["x"]),
        {NEW},
        {OLD},
    ),
    "a key beside a pattern of keys": (
        message(patternProperties={"^x": INTEGER}),
        at_key(STRING, patternProperties={"^x": INTEGER}),
        {BOTH},
        {BOTH, NEW},
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_new_or_removed_key_breaks_the_right_side(kind: str) -> None:
    """A new optional key breaks no reader, and a removed key breaks new readers of old rows."""
    without, with_, comes, goes = KEYS[kind]
    assert broken(without, with_) == comes
    assert broken(with_, without) == goes
    assert compare(without, with_)
    assert compare(with_, without)


EQUAL: dict[str, tuple[Any, Any]] = {
    "another title": ({"title": "a"}, {"title": "b"}),
    "a description": ({}, {"description": "b"}),
    "a comment and nothing else": (True, {"$comment": "any"}),
    "a list of one type": (STRING, {"type": ["string"]}),
    "a number, spelt out": (NUMBER, {"type": ["integer", "number"]}),
    "an enum in another order": ({"enum": ["a", "b"]}, {"enum": ["b", "a"]}),
    "a constant as an enum": ({"const": "a"}, {"enum": ["a"]}),
    "an enum with its type": ({"enum": ["a"]}, {"enum": ["a"], "type": "string"}),
    "a limit that says nothing": ({"minLength": 0}, {}),
    "a limit that another one hides": ({"minimum": 5}, {"minimum": 5, "exclusiveMinimum": 4}),
    "choices in another order": ({"anyOf": [STRING, NULL]}, {"anyOf": [NULL, STRING]}),
    "required in another order": ({"required": ["a", "b"]}, {"required": ["b", "a"]}),
    "a reference to the same": ({"$ref": "#/$defs/d"}, {"$ref": "#/$defs/e"}),
    "written out": ({"$ref": "#/$defs/d"}, STRING),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_equivalent_change_is_reported_as_fine(kind: str) -> None:
    """An equivalent change is reported and breaks no reader."""
    for old, new in (EQUAL[kind], EQUAL[kind][::-1]):
        definitions = {"d": STRING, "e": STRING}
        changes = compare(at_key(old, **{"$defs": definitions}), at_key(new, **{"$defs": definitions}))
        assert changes
        assert not [change for change in changes if change.breaks]


def test_unused_definition_is_reported_as_fine() -> None:
    """A new, changed or removed definition without references breaks no reader."""
    for old, new in (({}, {"d": STRING}), ({"d": STRING}, {}), ({"d": STRING}, {"d": NULL})):
        assert sides_of(document(**{"$defs": old}), document(**{"$defs": new})) == {'$["$defs"].d': {FINE}}


def test_change_behind_an_unknown_keyword_is_reported() -> None:
    """A change of a definition that an unknown keyword refers to is reported."""
    one, other = (at_key({"if": {"$ref": "#/$defs/d"}}, **{"$defs": {"d": part}}) for part in (STRING, NULL))
    assert sides_of(one, other) == {"$.x": {BOTH}}


@pytest.mark.parametrize("keyword", ["unevaluatedProperties", "$dynamicRef"])
def test_change_beside_unevaluated_keywords_breaks_both(keyword: str) -> None:
    """The meaning of such a keyword depends on other parts, so even a new optional key breaks both sides."""
    one, other = message(**{keyword: "#x"}), at_key(STRING, **{keyword: "#x"})
    assert sides_of(one, other)["$"] == sides_of(other, one)["$"] == {BOTH}


def test_another_id_breaks_both_sides() -> None:
    """A schema with another $id is another contract."""
    assert sides_of(document(**{"$id": "urn:v1"}), document(**{"$id": "urn:v2"})) == {"$": {BOTH}}
    assert sides_of(document(**{"$id": "urn:v1"}), document(title="", **{"$id": "urn:v2"})) == {"$": {FINE, BOTH}}


def test_changed_definition_is_reported_at_each_reference() -> None:
    """A change of a shared definition is reported for both continuations by their paths."""
    new = copy.deepcopy(SCHEMA)
    del new["$defs"]["ContinuationSpec"]["required"][1]
    assert sides_of(SCHEMA, new) == {"$.on_success.kwargs": {OLD}, "$.on_error.kwargs": {OLD}}


def test_comparison_of_recursive_definitions_ends() -> None:
    """The comparison of values that contain values ends."""
    new = copy.deepcopy(SCHEMA)
    new["$defs"]["value"]["anyOf"][2]["maximum"] += 1
    places = ("$.args[*]", "$.kwargs.*", "$.on_success.kwargs.*", "$.on_error.kwargs.*")
    assert sides_of(SCHEMA, new) == {path: {OLD} for path in places}


def test_change_has_place_broken_side_and_remedy() -> None:
    """A change is one line with its path, the readers that it breaks, and the remedy."""
    (line,) = map(str, compare(at_key(STRING, required=["x"]), at_key(STRING)))
    assert (
        line
        == "$.x: breaks old readers of new rows: it was required and no longer is; keep writing it in every message"
    )
    (line,) = map(str, compare(at_key(STRING), at_key(INTEGER)))
    assert line.startswith(
        "$.x: breaks old readers of new rows and new readers of old rows: it was string, is integer; "
    )
    assert str(Change("$.x", "a new optional key")) == "$.x: fine: a new optional key"


NO_SCHEMA: dict[str, tuple[Any, str]] = {
    "a list": ([], "$: expected a schema"),
    "no dialect": ({}, "$: expected a schema with $schema"),
    "another dialect": ({"$schema": "http://json-schema.org/draft-07/schema#"}, "$: expected"),
    "a schema that is none": (at_key(5), "$.properties.x: expected a schema"),
    "properties that are none": (document(properties=[]), "$.properties: expected an object"),
    "choices that are none": (document(anyOf={}), "$.anyOf: expected an array of schemas"),
    "no choices": (document(anyOf=[]), "$.anyOf: expected an array of schemas"),
    "a type that is none": (at_key({"type": "text"}), "$.properties.x.type: expected one or more of"),
    "no types": (at_key({"type": []}), "$.properties.x.type: expected"),
    "names that are none": (document(required="x"), "$.required: expected an array of names"),
    "a limit that is none": (at_key({"minimum": True}), "$.properties.x.minimum: expected a number"),
    "a length that is none": (at_key({"maxLength": -1}), "$.properties.x.maxLength: expected an integer"),
    "an enum that is none": (at_key({"enum": "a"}), "$.properties.x.enum: expected an array"),
    "a title that is none": (document(title={}), "$.title: expected a string"),
    "a pattern that is none": (at_key({"pattern": 1}), "$.properties.x.pattern: expected a string"),
    "a reference to nothing": (at_key({"$ref": "#/$defs/d"}), '$.properties.x["$ref"]: expected a reference'),
    "a reference to itself": (
        at_key(True, **{"$defs": {"d": {"$ref": "#/$defs/d"}}}),
        '$["$defs"].d["$ref"]: expected a reference',
    ),
    "a reference elsewhere": (at_key({"$ref": "other.json"}), '$.properties.x["$ref"]: expected a reference'),
    "an identity inside": (at_key({"$id": "urn:x"}), '$.properties.x["$id"]: expected no $id except'),
}


@pytest.mark.parametrize("kind", NO_SCHEMA)
def test_invalid_schema_is_rejected_with_its_place(kind: str) -> None:
    """An invalid schema on either side raises ConfigurationError before anything is compared."""
    wrong, said = NO_SCHEMA[kind]
    for old, new in ((wrong, SCHEMA), (SCHEMA, wrong), (wrong, wrong)):
        with pytest.raises(ConfigurationError) as caught:
            compare(old, new)
        assert str(caught.value).startswith(said)


def test_equal_schemas_have_no_changes() -> None:
    """A schema compared with itself, or with a copy, has no changes."""
    assert compare(SCHEMA, json.loads(json.dumps(SCHEMA))) == []


KEYWORDS = [
    "title", "type", "minLength", "maxLength", "enum", "const", "required", "properties", "not", "anyOf", "items",
    "additionalProperties", "maximum", "exclusiveMinimum", "pattern", "x-unknown", "minProperties", "oneOf", "allOf",
]  # fmt: skip
PIECES: list[Any] = [
    True, False, None, 0, 1, 3, 1e300, "", "x", "string", "null", "integer", "^a", [], ["x"], ["task_id"],
    ["string", "null"], [{"type": "null"}], {}, {"type": "string"}, {"minLength": 2}, {"x": True},
    {"task_id": {"type": "integer"}}, {"$ref": "#/$defs/text"}, {"$ref": "#/$defs/value"}, {"required": ["task_id"]},
    [{"$ref": "#/$defs/name"}, {"type": "null"}],
]  # fmt: skip


@st.composite
def changed_schemas(draw: st.DrawFn) -> Any:
    """Draw the schema with one part dropped, replaced or added."""
    new = copy.deepcopy(SCHEMA)
    places: list[Any] = []
    waiting: list[Any] = [new]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            places.append(item)
            waiting += item.values() if isinstance(item, dict) else item
    place = draw(st.sampled_from(places))
    if isinstance(place, dict):
        key: Any = draw(st.sampled_from([*place, *KEYWORDS]))
        if key in place and draw(st.booleans()):
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(st.sampled_from(PIECES)))
    else:
        index = draw(st.integers(0, len(place)))
        place[index : index + draw(st.integers(0, 1))] = draw(st.sampled_from([[], *([piece] for piece in PIECES)]))
    return new


def compared(old: Any, new: Any) -> list[Change]:
    """Return the changes; an example with an invalid schema is skipped."""
    try:
        return compare(old, new)
    except ConfigurationError:
        assume(False)
        raise


@given(changed_schemas())
def test_any_single_change_is_reported(new: Any) -> None:
    """Any single change of the schema is reported in both directions, as breaking or as fine."""
    assume(json.dumps(new) != json.dumps(SCHEMA))
    assert compared(SCHEMA, new)
    assert compared(new, SCHEMA)
    assert compared(new, copy.deepcopy(new)) == []


def known_to_both(wire: Wire, *schemas: Any) -> Wire:
    """Return the message without the keys that one of the schemas does not know."""
    known = [schema.get("properties", {}).keys() | set(schema.get("required", [])) for schema in schemas]
    return {key: value for key, value in wire.items() if all(key in names for names in known)}


@given(changed_schemas(), mutated())
def test_unbroken_side_reads_every_row(new: Any, wire: Wire) -> None:
    """Another implementation accepts each row for a side that is not reported as broken."""
    changes = compared(SCHEMA, new)
    broken = {side for change in changes for side in change.breaks}
    wire = known_to_both(wire, SCHEMA, new) if changes else wire
    try:
        by_old, by_new = (jsonschema.Draft202012Validator(schema).is_valid(wire) for schema in (SCHEMA, new))
    except RecursionError:  # a schema that contains itself
        assume(False)
    if by_new and not by_old:
        assert OLD_READERS in broken
    if by_old and not by_new:
        assert NEW_READERS in broken
