"""The strict normalisation: copies a value into the domain of limits.py, or raises with the path of a bad value."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import uuid
from collections.abc import Iterable
from typing import Any, cast

import attrs

from unstract_core.errors import PayloadError
from unstract_core.values import limits
from unstract_core.values.limits import (
    ELEMENT_SIZE,
    ENVELOPE,
    FLOAT_LIMIT,
    INT_MAX,
    INT_MIN,
    MAX_DEPTH,
    UNFIT,
    JSONValue,
    json_path,
)


class Strict:
    """The normalisation of one value.

    Attributes:
        root: The JSON path of the value in its message.
        keys: The keys and indices from the root to the current part.
        room: The remaining bytes of `MAX_SIZE`.
    """

    __slots__ = ("keys", "room", "root")

    def __init__(self, root: str) -> None:
        self.root = root
        self.keys: list[str | int] = []
        self.room = limits.MAX_SIZE

    def value(self, value: Any, depth: int) -> JSONValue:
        kind = type(value)
        if kind is str:
            if value.isascii() and "\0" not in value and (size := len(value)) <= self.room:
                self.room -= size
                return value  # type: ignore[no-any-return]  # a cast would add a call for each string
            return self.text(value)
        if value is None or kind is bool:
            return value  # type: ignore[no-any-return]  # the same
        if kind is int:
            return value if INT_MIN <= value <= INT_MAX else self.unfit(value, "int outside [-2^63, 2^63)")
        if kind is dict:
            return self.mapping(value, depth + 1)
        if kind is list:
            return self.array(value, depth + 1)
        if kind is float:
            return self.number(value)
        return self.converted(value, depth)

    def text(self, text: str) -> str:
        if len(text) > self.room:  # UTF-8 is never shorter, so its size need not be computed
            return cast(str, self.too_large(text))
        if UNFIT.search(text) is not None:
            text = self.unfit_text(text)
        size = len(text) if text.isascii() else len(text.encode())
        if size > self.room:
            return cast(str, self.too_large(text))
        self.room -= size
        return text

    def number(self, number: float) -> JSONValue:
        if -FLOAT_LIMIT < number < FLOAT_LIMIT:
            return number or 0.0
        if math.isfinite(number) and INT_MIN <= (integral := int(number)) <= INT_MAX:
            return integral
        return self.unfit(number, "float that no JSON reader agrees on (NaN, Infinity, or beyond 64 bits)")

    def array(self, items: Iterable[object], depth: int) -> JSONValue:
        if depth > MAX_DEPTH:
            return self.too_deep(items)
        keys, value = self.keys, self.value
        keys.append(0)
        out: list[JSONValue] = []
        for index, item in enumerate(items):
            keys[-1] = index
            self.room -= ELEMENT_SIZE
            if self.room < 0:
                out.append(self.too_large(item))
                break
            out.append(value(item, depth))
        keys.pop()
        return out

    def mapping(self, members: dict[object, object], depth: int) -> JSONValue:
        if depth > MAX_DEPTH:
            return self.too_deep(members)
        keys, value, standing = self.keys, self.value, len(self.keys)
        out: dict[str, JSONValue] = {}
        try:
            for key, item in members.items():
                if type(key) is not str or not key.isascii() or "\0" in key or len(key) > self.room:
                    key = self.key(key)
                if key in out:
                    key = self.taken(key, out)
                keys.append(key)
                self.room -= ELEMENT_SIZE + len(key)
                if self.room < 0:
                    out[key] = self.too_large(item)
                    keys.pop()
                    break
                out[key] = value(item, depth)
                keys.pop()
        except RecursionError:
            raise
        except RuntimeError as exc:
            del keys[standing:]
            return self.changed(members, exc)
        return self.envelope(out) if out.keys() == ENVELOPE else out

    def key(self, key: object) -> str:
        try:
            if isinstance(key, enum.Enum):
                key = key.value
            if isinstance(key, str):
                return self.text(str.__str__(key))
            if isinstance(key, int) and not isinstance(key, bool) and INT_MIN <= key <= INT_MAX:
                return int.__repr__(key)
        except PayloadError:
            raise
        except Exception as exc:  # a key's own code may raise anything
            raise self.refuse(f"a key raised {type(exc).__name__} when it was read") from exc
        return self.unfit_key(key)

    def converted(self, value: object, depth: int) -> JSONValue:
        try:
            return self.by_rule(value, depth)
        except PayloadError:
            raise
        except Exception as exc:  # a value's own code (properties, isoformat, iterators) may raise anything
            raise self.refuse(f"{type(value).__qualname__} raised {type(exc).__name__} when it was read") from exc

    def by_rule(self, value: object, depth: int) -> JSONValue:
        match value:
            case enum.Enum():
                return self.value(value.value, depth)
            case str():
                return self.text(str.__str__(value))
            case int():
                return self.value(int.__int__(value), depth)
            case float():
                return self.number(float.__float__(value))
            case uuid.UUID() | decimal.Decimal():
                return self.text(str.__str__(str(value)))
            case datetime.datetime() | datetime.date() | datetime.time():
                return self.text(str.__str__(value.isoformat()))
            case tuple() | list():
                return self.array(value, depth + 1)
            case set() | frozenset():
                return _in_order(self.array(value, depth + 1))
            case dict():
                return self.mapping(value, depth + 1)
            case _ if _is_record(value):
                return self.mapping(_fields(value), depth + 1)
        return self.foreign(value)

    def refuse(self, message: str) -> PayloadError:
        return PayloadError(message, path=json_path(self.root, self.keys))

    def unfit(self, value: object, what: str) -> JSONValue:
        raise self.refuse(f"{what} cannot be sent; send it as a string, or mend it")

    def unfit_text(self, text: str) -> str:
        raise self.refuse("a string with NUL or a lone surrogate cannot be sent (PostgreSQL's jsonb refuses both)")

    def unfit_key(self, key: object) -> str:
        raise self.refuse(f"a key of type {type(key).__name__} cannot be sent; keys are str, or int within 64 bits")

    def taken(self, key: str, members: dict[str, JSONValue]) -> str:
        raise self.refuse("two keys become the same string; rename one of them")

    def envelope(self, members: dict[str, JSONValue]) -> JSONValue:
        raise self.refuse("a dict of exactly __type__ and __value__ cannot be sent (it is kombu's own envelope)")

    def changed(self, value: object, exc: RuntimeError) -> JSONValue:
        raise self.refuse("the dict changed while it was read; pass a copy") from exc

    def too_deep(self, value: object) -> JSONValue:
        raise self.refuse(f"nested deeper than {MAX_DEPTH} levels, or cyclic")

    def too_large(self, value: object) -> JSONValue:
        raise self.refuse(f"larger than {limits.MAX_SIZE} bytes; store it elsewhere and send a reference")

    def foreign(self, value: object) -> JSONValue:
        raise self.refuse(f"{type(value).__qualname__} is not a JSON value; convert it before dispatch")


def _is_record(value: object) -> bool:
    kind = type(value)
    return kind is not type and (attrs.has(kind) or dataclasses.is_dataclass(kind))


def _fields(record: object) -> dict[object, object]:
    kind = type(record)
    names = (
        [field.name for field in attrs.fields(kind)]
        if attrs.has(kind)
        else [field.name for field in dataclasses.fields(cast(Any, record))]
    )
    return {name: getattr(record, name) for name in names}


def _in_order(array: JSONValue) -> JSONValue:
    if not isinstance(array, list):
        return array
    try:
        return sorted(cast("list[Any]", array))
    except TypeError:
        return sorted(array, key=lambda item: json.dumps(item, sort_keys=True))
