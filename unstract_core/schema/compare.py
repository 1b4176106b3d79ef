"""Compare two schemas of the wire, and name the readers that each change breaks.

A schema describes the messages that a writer writes. If the new schema allows more, an old reader may receive a message
that it cannot read. If it allows less, a new reader may reject a stored message. A reader ignores a key that it does
not know (docs/wire.md). So a new optional key breaks no reader, and a removed key is no longer read.

The schemas are compared keyword by keyword, and references are followed. A change that cannot be judged counts as
breaking both sides. The comparison finds every break, but may also report a change that breaks no reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from unstract_core.schema.changes import KEEP_READING, ONLY_WHAT_WAS, OPTIONAL, STILL_WRITE, UNDECIDED, Change, Changes
from unstract_core.schema.document import Part, checked, follow, in_any_order, reached, text
from unstract_core.schema.keywords import LIMITING, limit_changes, named, short_text, types_of, value_text
from unstract_core.values.limits import json_path

ANNOTATIONS = ("title", "description", "$comment", "examples", "default", "deprecated", "readOnly", "writeOnly")
OF_THE_DOCUMENT = ("$schema", "$id", "$defs")
MEMBERS = ("properties", "required", "additionalProperties")
FAR = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$dynamicAnchor", "$vocabulary")
"""Keywords whose meaning depends on other parts of the schema: a schema with one of them cannot be compared."""


def compare(old: Any, new: Any) -> list[Change]:
    """List the changes between two schemas.

    Args:
        old: The earlier schema.
        new: The later schema.

    Returns:
        Each change with the readers that it breaks; empty if the schemas are equal.

    Raises:
        ConfigurationError: One of the two is not a JSON Schema of draft 2020-12, or refers to another document.
    """
    walk = _Walk(checked(old), checked(new))
    if text(old) != text(new):
        walk.documents()
    return list(walk.changes.found)


@attrs.define
class _Walk:
    old: dict[str, Any]
    new: dict[str, Any]
    changes: Changes = attrs.field(factory=Changes)
    begun: set[tuple[str, str, bool]] = attrs.field(factory=set)

    def documents(self) -> None:
        for keyword in FAR:
            if f'"{keyword}":' in text([self.old, self.new]):
                self.changes.other("$", f"{keyword} is used, which this command cannot judge")
        if self.old.get("$id") != self.new.get("$id"):
            self.changes.other(
                "$", f"$id was {value_text(self.old, '$id')}, is {value_text(self.new, '$id')}", UNDECIDED
            )
        self.parts(self.old, self.new, "$")
        used = reached(self.old, self.old).keys() | reached(self.new, self.new).keys()
        olds, news = self.old.get("$defs", {}), self.new.get("$defs", {})
        for name in {**olds, **news}:
            if f"#/$defs/{name}" not in used and text(olds.get(name)) != text(news.get(name)):
                self.changes.fine(json_path("$", ["$defs", name]), "a definition that nothing refers to")
        if not self.changes.found:
            if text(in_any_order(self.old)) == text(in_any_order(self.new)):
                self.changes.fine("$", "the same schema in another order")
            else:
                self.changes.other("$", "the same schema in other words")

    def parts(self, old: Part, new: Part, path: str) -> None:
        """Compare the schemas of one path of a message."""
        pair = (text(old), text(new), self.changes.inside_not)
        if pair in self.begun or self.same(old, new):
            return
        self.begun.add(pair)
        one, other = _as_object(old), _as_object(new)
        self.annotations(one, other, path)
        if old is False:
            self.changes.widened(path, f"nothing was possible, now it can be {self.kind(new, self.new)}")
        elif new is False:
            self.changes.narrowed(path, f"it could be {self.kind(old, self.old)}, now nothing is possible")
        elif _says_only(one, "$ref") or _says_only(other, "$ref"):
            self.references(one, other, path)
        elif _says_only(one, "anyOf") != _says_only(other, "anyOf"):
            self.choices(_choices(one), _choices(other), path)
        elif types_of(one) & types_of(other):
            self.keywords(one, other, path)
        else:
            self.changes.other(path, f"it was {named(one)}, is {named(other)}", ONLY_WHAT_WAS)
        self.begun.remove(pair)

    def same(self, old: Any, new: Any) -> bool:
        return text(old) == text(new) and reached(old, self.old) == reached(new, self.new)

    def annotations(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        for keyword in ANNOTATIONS:
            if (keyword in old) != (keyword in new) or text(old.get(keyword)) != text(new.get(keyword)):
                self.changes.fine(path, f"another {keyword}")

    def references(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        if old.get("$ref") != new.get("$ref"):
            self.changes.fine(path, f"$ref was {value_text(old, '$ref')}, is {value_text(new, '$ref')}")
        self.parts(
            follow(old["$ref"], self.old) if _says_only(old, "$ref") else old,
            follow(new["$ref"], self.new) if _says_only(new, "$ref") else new,
            path,
        )

    def keywords(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        for limit in limit_changes(old, new):
            if limit.less:
                self.changes.narrowed(path, limit.what)
            if limit.more:
                self.changes.widened(path, limit.what)
            if not limit.less and not limit.more:
                self.changes.fine(path, f"{limit.what}, which is equivalent")
        changed = [
            keyword
            for keyword in {**old, **new}
            if (keyword in old) != (keyword in new) or not self.same(old.get(keyword), new.get(keyword))
        ]
        if any(keyword in MEMBERS for keyword in changed):
            self.members(old, new, path)
        for keyword in changed:
            if keyword not in (*LIMITING, *MEMBERS, *ANNOTATIONS, *OF_THE_DOCUMENT):
                self.keyword(keyword, old, new, path)

    def keyword(self, keyword: str, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        match keyword:
            case "items":
                self.parts(old.get(keyword, True), new.get(keyword, True), f"{path}[*]")
            case "propertyNames":
                self.parts(old.get(keyword, True), new.get(keyword, True), f"{path} (its keys)")
            case "allOf":
                self.conditions(old.get(keyword, []), new.get(keyword, []), path)
            case "not" | "anyOf" | "oneOf" if keyword not in old:
                self.changes.narrowed(path, f"{keyword} is {value_text(new, keyword)}, was absent")
            case "not" | "anyOf" | "oneOf" if keyword not in new:
                self.changes.widened(path, f"{keyword} was {value_text(old, keyword)}, is absent")
            case "not":
                with self.inside_not():
                    self.parts(old[keyword], new[keyword], path)
            case "anyOf":
                self.choices(old[keyword], new[keyword], path)
            case "oneOf" if _apart(old[keyword]) and _apart(new[keyword]):
                self.choices(old[keyword], new[keyword], path)
            case _:
                self.changes.other(path, f"{keyword} was {value_text(old, keyword)}, is {value_text(new, keyword)}")

    @contextlib.contextmanager
    def inside_not(self) -> Iterator[None]:
        self.changes.inside_not ^= True
        try:
            yield
        finally:
            self.changes.inside_not ^= True

    def choices(self, old: Sequence[Part], new: Sequence[Part], path: str) -> None:
        """Compare two lists of alternatives."""
        olds, news = self.without_common(old, new)
        for one in olds:
            kind = self.kind(one, self.old)
            alike = [index for index, other in enumerate(news) if self.kind(other, self.new) == kind]
            if alike:
                self.parts(one, news.pop(alike[0]), path)
            else:
                self.changes.narrowed(path, f"it can no longer be {kind}")
        for other in news:
            self.changes.widened(path, f"it can be {self.kind(other, self.new)}")

    def conditions(self, old: Sequence[Part], new: Sequence[Part], path: str) -> None:
        """Compare two lists of conditions that all apply."""
        olds, news = self.without_common(old, new)
        if len(olds) == len(news) == 1:
            self.parts(olds[0], news[0], path)
            return
        for one in olds:
            self.changes.widened(path, f"the condition {short_text(one)} is gone")
        for other in news:
            self.changes.narrowed(path, f"the condition {short_text(other)} is new")

    def without_common(self, old: Sequence[Part], new: Sequence[Part]) -> tuple[list[Part], list[Part]]:
        return (
            [one for one in old if not any(self.same(one, other) for other in new)],
            [other for other in new if not any(self.same(one, other) for one in old)],
        )

    def kind(self, part: Part, document: dict[str, Any]) -> str:
        part = _as_object(part)
        while _says_only(part, "$ref"):
            part = _as_object(follow(part["$ref"], document))
        return named(part)

    def members(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        """Compare the keys of an object: the known ones, the required ones, and the schema of any other."""
        olds, news = old.get("properties", {}), new.get("properties", {})
        other_old, other_new = old.get("additionalProperties", True), new.get("additionalProperties", True)
        had, has = old.get("required", []), new.get("required", [])
        if olds.keys() != news.keys() and "patternProperties" in {**old, **new}:
            self.changes.other(path, "other keys beside patternProperties")
        for name in dict.fromkeys([*olds, *news, *had, *has]):
            place = json_path(path, [name])
            was, now = olds.get(name, other_old), news.get(name, other_new)
            known, knows = name in olds or name in had, name in news or name in has
            if known == knows or self.changes.inside_not:
                self.parts(was, now, place)
                self.demand(name in had, name in has, place)
            elif known:
                self.gone(was, now, name in had, place)
            else:
                self.come(was, now, name in has, place)
        self.parts(other_old, other_new, f"{path}.*")

    def demand(self, before: bool, now: bool, place: str) -> None:
        if before and not now:
            self.changes.widened(place, "it was required and no longer is", STILL_WRITE)
        elif now and not before:
            self.changes.narrowed(place, "it is required and was not", OPTIONAL)

    def gone(self, was: Part, now: Part, required: bool, place: str) -> None:
        if required:
            self.changes.widened(place, "a required key is gone", STILL_WRITE)
        if not _allows_all(now):
            self.parts(was, now, place)
        else:
            self.changes.narrowed(place, "a key is gone, and stored values under it are ignored", KEEP_READING)

    def come(self, was: Part, now: Part, required: bool, place: str) -> None:
        if required:
            self.changes.narrowed(place, "a new required key, which stored messages lack", OPTIONAL)
        if not _allows_all(was):
            self.parts(was, now, place)
        elif not required:
            self.changes.fine(place, "a new optional key, which old readers ignore")


def _as_object(part: Part) -> dict[str, Any]:
    if isinstance(part, bool):
        return {} if part else {"not": {}}
    return part


def _saying(part: Part) -> list[str]:
    return [keyword for keyword in _as_object(part) if keyword not in (*ANNOTATIONS, *OF_THE_DOCUMENT)]


def _says_only(part: Part, keyword: str) -> bool:
    return _saying(part) == [keyword]


def _allows_all(part: Part) -> bool:
    return not _saying(part)


def _choices(part: dict[str, Any]) -> list[Part]:
    return part["anyOf"] if _says_only(part, "anyOf") else [part]


def _apart(choices: Sequence[Part]) -> bool:
    """Return whether the types of the alternatives do not overlap."""
    met: set[str] = set()
    for types in (types_of(_as_object(part)) for part in choices):
        if met & types:
            return False
        met |= types
    return True
