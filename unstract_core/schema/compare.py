"""What changed between two schemas of the wire, and whom it breaks.

A schema says what a writer writes. Where the new one allows more, old readers may meet what they cannot read; where it
allows less, new readers may meet old rows that they refuse. Beside that stand the rules of docs/wire.md: a key that a
reader does not know is ignored. So a new optional key is fine, and one that is gone is no longer read in old rows.

What may stand at one place is compared keyword by keyword, references followed. Whatever cannot be judged breaks both
sides. The rest is judged with caution: a break may be reported that is none, never the other way round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from unstract_core.schema.changes import KEEP_READING, ONLY_WHAT_WAS, OPTIONAL, STILL_WRITE, UNDECIDED, Change, Changes
from unstract_core.schema.document import Part, checked, follow, in_any_order, reached, text
from unstract_core.schema.keywords import LIMITING, named, shown, told, types_of, verdicts
from unstract_core.values.limits import json_path

ANNOTATIONS = ("title", "description", "$comment", "examples", "default", "deprecated", "readOnly", "writeOnly")
OF_THE_DOCUMENT = ("$schema", "$id", "$defs")
MEMBERS = ("properties", "required", "additionalProperties")
FAR = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$dynamicAnchor", "$vocabulary")
"""Keywords whose meaning depends on what stands elsewhere: beside one of them nothing can be judged by itself."""


def compare(old: Any, new: Any) -> list[Change]:
    """List every change from `old` to `new`; raises ConfigurationError when one of them is no schema."""
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
                self.changes.other("$", f"{keyword} is used, which this command cannot follow")
        if self.old.get("$id") != self.new.get("$id"):
            self.changes.other("$", f"$id was {told(self.old, '$id')}, is {told(self.new, '$id')}", UNDECIDED)
        self.parts(self.old, self.new, "$")
        used = reached(self.old, self.old).keys() | reached(self.new, self.new).keys()
        olds, news = self.old.get("$defs", {}), self.new.get("$defs", {})
        for name in {**olds, **news}:
            if f"#/$defs/{name}" not in used and text(olds.get(name)) != text(news.get(name)):
                self.changes.fine(json_path("$", ["$defs", name]), "a definition that nothing refers to")
        if not self.changes.found:
            if text(in_any_order(self.old)) == text(in_any_order(self.new)):
                self.changes.fine("$", "the same in another order")
            else:
                self.changes.other("$", "it is written in another way")

    def parts(self, old: Part, new: Part, path: str) -> None:
        """Compare what may stand at one place of a message."""
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
            self.changes.fine(path, f"$ref was {told(old, '$ref')}, is {told(new, '$ref')}")
        self.parts(
            follow(old["$ref"], self.old) if _says_only(old, "$ref") else old,
            follow(new["$ref"], self.new) if _says_only(new, "$ref") else new,
            path,
        )

    def keywords(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        for verdict in verdicts(old, new):
            if verdict.less:
                self.changes.narrowed(path, verdict.what)
            if verdict.more:
                self.changes.widened(path, verdict.what)
            if not verdict.less and not verdict.more:
                self.changes.fine(path, f"{verdict.what}, which comes to the same")
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
                self.changes.narrowed(path, f"{keyword} is {told(new, keyword)}, was absent")
            case "not" | "anyOf" | "oneOf" if keyword not in new:
                self.changes.widened(path, f"{keyword} was {told(old, keyword)}, is absent")
            case "not":
                with self.turned_round():
                    self.parts(old[keyword], new[keyword], path)
            case "anyOf":
                self.choices(old[keyword], new[keyword], path)
            case "oneOf" if _apart(old[keyword]) and _apart(new[keyword]):
                self.choices(old[keyword], new[keyword], path)
            case _:
                self.changes.other(path, f"{keyword} was {told(old, keyword)}, is {told(new, keyword)}")

    @contextlib.contextmanager
    def turned_round(self) -> Iterator[None]:
        self.changes.inside_not ^= True
        try:
            yield
        finally:
            self.changes.inside_not ^= True

    def choices(self, old: Sequence[Part], new: Sequence[Part], path: str) -> None:
        """Compare two lists of which one schema has to fit."""
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
        """Compare two lists of which every schema has to fit."""
        olds, news = self.without_common(old, new)
        if len(olds) == len(news) == 1:
            self.parts(olds[0], news[0], path)
            return
        for one in olds:
            self.changes.widened(path, f"the condition {shown(one)} is gone")
        for other in news:
            self.changes.narrowed(path, f"the condition {shown(other)} is new")

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
        """Compare the keys of an object: which there are, which have to be, and what may stand under others."""
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
            self.changes.narrowed(place, "a key is gone, and what old rows say under it is ignored", KEEP_READING)

    def come(self, was: Part, now: Part, required: bool, place: str) -> None:
        if required:
            self.changes.narrowed(place, "a new required key, which old rows lack", OPTIONAL)
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
    """Whether no value can fit two of them, by their types alone."""
    met: set[str] = set()
    for found in (types_of(_as_object(part)) for part in choices):
        if met & found:
            return False
        met |= found
    return True
