"""The JSON Schema of the wire: it matches the types, the writer and, except for two lists, the reader."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal

import attrs
import jsonschema
import pytest
import strategies as some
from core.wire_schema import (
    KEYS,
    ODD_VALUES,
    TOLERATED,
    UNSAID,
    Tolerated,
    Unsaid,
    Wire,
    continuation,
    fairness,
    mutated,
    parts,
    wire_of,
)
from hypothesis import given
from hypothesis import strategies as st

from tools import check_schema
from tools.check_lock import ROOT
from unstract_core import (
    ConfigurationError,
    FairnessKey,
    MalformedPayload,
    PayloadError,
    TaskPayload,
    from_wire,
    to_wire,
)
from unstract_core.schema import committed_schema, generator, task_payload_schema
from unstract_core.values.limits import JSONValue

SCHEMA = committed_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def valid(wire: Any) -> bool:
    return bool(VALIDATOR.is_valid(wire))


def read(wire: Any) -> TaskPayload | None:
    """Return the payload that a reader makes of a message; None if it is malformed."""
    try:
        return from_wire(wire)
    except MalformedPayload:
        return None


def mended(wire: Wire, entries: tuple[Tolerated, ...] = TOLERATED) -> Wire:
    mended = copy.deepcopy(wire)
    for entry in entries:
        entry.mend(mended)
    return mended


def test_schema_is_valid_under_its_dialect() -> None:
    """Another implementation accepts the schema as JSON Schema 2020-12."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


def test_committed_schema_equals_the_generated_one() -> None:
    """The committed file equals the generated schema byte for byte."""
    assert task_payload_schema() == SCHEMA
    assert check_schema.PATH.read_text(encoding="utf-8") == check_schema.written()


@pytest.mark.parametrize(("part", "other"), [("255", "256"), ("\n", ""), ("    ", "  ")])
def test_write_fixes_an_outdated_schema_file(
    part: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check names the remedy, and `--write` applies it."""
    path = tmp_path / "task_payload.v1.json"
    path.write_text(check_schema.written().replace(part, other))
    assert check_schema.main([], path) == 1
    assert "make schema" in capsys.readouterr().out
    assert check_schema.main(["--write"], path) == check_schema.main([], path) == 0


def test_missing_file_or_unknown_option_fails(tmp_path: Path) -> None:
    """A missing file or an unknown option fails the check."""
    assert check_schema.main([], tmp_path / "absent.json") == 1
    assert check_schema.main(["--wirte"]) == 2


def test_properties_are_the_fields_of_the_types() -> None:
    """The properties are in the order of the wire, and those of a minimal payload are required."""
    bare = to_wire(TaskPayload(task_name="t", queue="q"))
    assert list(SCHEMA["properties"]) == [field.name for field in attrs.fields(TaskPayload)]
    assert SCHEMA["required"] == list(bare) == ["task_name", "args", "kwargs", "queue", "fairness"]
    assert SCHEMA["$defs"]["ContinuationSpec"]["required"] == ["task_name", "kwargs", "queue"]
    assert SCHEMA["$defs"]["FairnessKey"]["required"] == [field.name for field in attrs.fields(FairnessKey)]


def _schema_with(hint: Any, default: Any) -> dict[str, Any]:
    """Generate the schema of a class with an additional field."""
    kind = attrs.make_class(
        "Grown", {"task_name": attrs.field(type=str), "new": attrs.field(default=default, type=hint)}
    )
    return generator.schema_of(kind, lambda grown: {k: v for k, v in attrs.asdict(grown).items() if v is not None})


@attrs.frozen
class Part:
    """A nested class."""

    code: Literal["a", "b"] = "a"


OPTIONAL_PART: Any = Part | None


@pytest.mark.parametrize(
    ("hint", "default", "expected"),
    [
        (str | None, None, {"type": "string"}),
        (int | None, None, {"type": "integer"}),
        (Literal["a", "b"], "a", {"enum": ["a", "b"]}),
        (dict[str, generator._Value], attrs.Factory(dict), {"type": "object"}),
        (OPTIONAL_PART, None, {"$ref": "#/$defs/Part"}),
    ],
    ids=["a string", "an integer", "a choice", "a mapping", "a part"],
)
def test_new_field_appears_in_the_schema(hint: Any, default: Any, expected: dict[str, Any]) -> None:
    """A field whose values the writer does not check yet appears without limits."""
    grown = _schema_with(hint, default)
    assert grown["properties"]["new"] == expected
    assert ("new" in grown["required"]) == (default is not None)


@pytest.mark.parametrize("hint", [float, bytes, list[str], str | int, Any, JSONValue], ids=repr)
def test_field_of_an_unknown_type_is_rejected(hint: Any) -> None:
    """The error names the field and the module to extend."""
    with pytest.raises(ConfigurationError, match=r"Grown\.new: no schema is known for"):
        _schema_with(hint, None)


def test_class_with_two_encodings_is_rejected() -> None:
    """One definition cannot describe two encodings of a class."""
    kind = attrs.make_class("Twice", {name: attrs.field(type=OPTIONAL_PART, default=None) for name in ("one", "two")})

    def write(twice: Any) -> dict[str, Any]:
        wire = {key: part for key, part in attrs.asdict(twice).items() if part is not None}
        wire.get("two", {}).clear()
        return wire

    with pytest.raises(ConfigurationError, match=r"Twice\.two: Part is written differently"):
        generator.schema_of(kind, write)


def test_text_pattern_rejects_only_nul_and_surrogates() -> None:
    """The pattern is checked with every code point."""
    search = re.compile(generator.TEXT).search
    refused = {code for code in range(0x110000) if search(f"a{chr(code)}\n") is None}
    assert refused == {0, *range(0xD800, 0xE000)}
    assert search("")


@given(some.payloads())
def test_every_written_message_is_valid(payload: TaskPayload) -> None:
    """A written payload of any shape and value is valid."""
    VALIDATOR.validate(to_wire(payload))
    VALIDATOR.validate(json.loads(json.dumps(to_wire(payload))))


@given(some.convertibles)
def test_every_normalised_value_is_valid(value: Any) -> None:
    """Every value that the rules convert is valid."""
    VALIDATOR.validate(to_wire(TaskPayload(task_name="t", args=[value], kwargs={"x": value}, queue="q")))


odd_texts = st.text(some.UNFIT_CHARACTERS + "\n\x01aé\U0010ffff", max_size=3)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | odd_texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(odd_texts | st.sampled_from(["__type__", "__value__"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(any_json)
def test_schema_and_writer_accept_the_same_values(value: Any) -> None:
    """The schema and the writer agree, except for depth and size, which UNSAID lists."""
    for wire in (
        wire_of(args=[value]),
        wire_of(kwargs={"x": value}),
        wire_of(on_error=continuation(kwargs={"x": value})),
    ):
        written = some.attempt(to_wire, from_wire(wire))
        assert valid(wire) == (not isinstance(written, PayloadError))


@given(mutated())
def test_reader_rejects_invalid_messages_unless_tolerated(wire: Wire) -> None:
    """A reader reads a message only if it is valid after the repairs of TOLERATED."""
    assert (read(wire) is not None) == valid(mended(wire))


@pytest.mark.parametrize("key", [None, "fairness", "on_success", "on_error"])
@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_reader_rejects_any_single_fault_unless_tolerated(key: str | None, value: Any) -> None:
    """The same holds for each odd value at each place of a message, and for each dropped key."""
    whole = wire_of(fairness=fairness(), on_success=continuation(), on_error=continuation(), task_id="i")
    for place in KEYS:
        wire = copy.deepcopy(whole)
        target = wire if key is None else wire[key]
        target[place] = value
        assert (read(wire) is not None) == valid(mended(wire)), wire
        del target[place]
        assert (read(wire) is not None) == valid(mended(wire)), wire


@given(mutated())
def test_valid_message_can_be_read_and_rewritten(wire: Wire) -> None:
    """A valid message keeps its known keys and values, except for those that UNSAID lists."""
    unsaid = any(len(name.encode(errors="replace")) > 255 for name in names_in(wire))
    if valid(wire) and not unsaid:
        payload = read(wire)
        assert payload is not None
        assert to_wire(payload) == known_part(wire)


def names_in(wire: Wire) -> list[str]:
    names = (part.get(key) for part in parts(wire) for key in ("task_name", "queue", "reply_key", "task_id"))
    return [name for name in names if isinstance(name, str)]


def known_part(wire: Wire) -> Wire:
    known = {key: value for key, value in wire.items() if key in SCHEMA["properties"]}
    for key, kind in (
        ("fairness", "FairnessKey"),
        ("on_success", "ContinuationSpec"),
        ("on_error", "ContinuationSpec"),
    ):
        if isinstance(known.get(key), dict):
            names = SCHEMA["$defs"][kind]["properties"]
            known[key] = {name: value for name, value in known[key].items() if name in names}
    return known


@pytest.mark.parametrize("entry", TOLERATED, ids=lambda entry: entry.what)
def test_each_tolerated_entry_is_readable_and_unique(entry: Tolerated) -> None:
    """Each example is not written, is read, and is repaired only by its own entry."""
    others = tuple(other for other in TOLERATED if other is not entry)
    assert entry.examples
    for wire in entry.examples:
        assert not valid(wire)
        assert read(wire) is not None
        assert valid(mended(wire, (entry,)))
        assert not valid(mended(wire, others))


@given(some.payloads())
def test_repair_leaves_valid_messages_unchanged(payload: TaskPayload) -> None:
    """Apart from the values, a valid message stays valid with the same keys."""
    wire = to_wire(payload)
    again = mended(wire)
    assert valid(again)
    assert again.keys() == wire.keys()


@pytest.mark.parametrize("entry", [entry for entry in UNSAID if entry.examples], ids=lambda entry: entry.what)
def test_unsaid_entries_are_rejected_as_listed(entry: Unsaid) -> None:
    """Each example is valid under the schema, and is rejected by the listed side."""
    for wire in entry.examples:
        assert valid(wire)
        payload = read(wire)
        assert (payload is None) == (entry.refused_by == "readers")
        if payload is not None:
            with pytest.raises(PayloadError):
                to_wire(payload)


def test_schema_does_not_limit_the_size() -> None:
    """A value that is too large is valid under the schema, and a writer rejects it."""
    wire = wire_of(args=["x" * 2000])
    with some.size_limit(1000), pytest.raises(PayloadError, match="larger than"):
        to_wire(from_wire(wire))
    assert valid(wire)


def test_document_lists_tolerated_and_unsaid() -> None:
    """docs/wire.md has these entries in this order and in these words."""
    section = (
        (ROOT / "docs" / "wire.md").read_text(encoding="utf-8").partition("\n## The schema\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| (?!tolerated|---)(.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert rows == [(entry.what, entry.reason) for entry in TOLERATED]
    listed = re.findall(r"^- (.+?) \((\w+) refuse it\)$", section, re.MULTILINE)
    assert listed == [(entry.what, entry.refused_by) for entry in UNSAID]
