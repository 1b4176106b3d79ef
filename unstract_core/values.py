"""The JSON value domain: what may travel, and how other values are made to fit.

One domain for every transport: null, bool, int in [-2^63, 2^63), finite float with |x| < 1e16, str without NUL or
lone surrogates, list, and dict with such str keys whose key set is not {"__type__", "__value__"}; at most
`MAX_DEPTH` containers deep and `MAX_SIZE` bytes large. The limits are PostgreSQL's jsonb's (NUL, surrogates, 1e22
comes back an int), kombu's (the envelope) and those of 64-bit JSON readers.

`normalise` is strict at dispatch, where the caller can still mend a value, and lenient for a task's result, where
the money is spent and the callback must arrive. Both convert by named rules; neither ever falls back on `str`.
Deliberately absent: typed decoding. A UUID arrives as a string.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import decimal
import enum
import json
import math
import re
import uuid
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import attrs

from unstract_core.errors import PayloadError

JSONValue: TypeAlias = "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"

MAX_DEPTH = 64
"""How many lists and dicts may stand inside each other."""

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of one value: its strings in UTF-8, and 16 for every element."""

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
FLOAT_LIMIT = 1e16
ENVELOPE = frozenset({"__type__", "__value__"})

ERROR_LIMIT = 4000
"""Characters of an error text; a longer one is cut, and the cut is marked."""

MAX_REPLACED = 100
"""How many replacements in one value are listed and counted: a million NaNs must not cost a million paths."""

_ELEMENT_SIZE = 16
# A lenient walk that runs out of room leaves a stub on each level, and its result becomes an element of args.
_STUB_RESERVE = (MAX_DEPTH + 1) * 256
_UNFIT = re.compile("[\x00\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[^\W\d]\w{0,63}\Z")


def normalise(value: object, *, lenient: bool = False, path: str = "$", replaced: list[str] | None = None) -> JSONValue:
    """Return a copy of `value` made of plain JSON values, inside the domain of this module.

    Rules, strict and lenient alike: UUID and Decimal become str; datetime, date and time become RFC 3339 text with
    `T`; an Enum its value; tuple and set a list (a set in sorted order); an integral float from 1e16 on an int where
    it fits; -0.0 becomes 0.0; int keys become str; attrs and dataclass instances become dicts; subclasses of the
    plain types become the plain type.

    Strict raises PayloadError for anything else, its `path` below `path`. Lenient never raises: NaN and Infinity
    become null, NUL and surrogates U+FFFD, bytes base64, other objects their `repr`, what is too deep or too large a
    marked stub; the path of each such replacement, of the first MAX_REPLACED, is appended to `replaced`.
    """
    if not lenient:
        try:
            return _Strict(path).value(value, 0)
        except RecursionError as exc:
            raise PayloadError("nested too deep for what is left of the stack", path=path) from exc
    walk = _Lenient(path, replaced if replaced is not None else [])
    try:
        return walk.value(value, 0)
    except BaseException:  # lenient never raises
        walk.keys.clear()
        return walk.foreign(value)


def normalise_members(
    container: list[Any] | tuple[Any, ...] | dict[Any, Any], *, path: str = "$", lenient: bool = False
) -> Any:
    """Normalise the members of `args` or `kwargs`; the container itself does not count as a level."""
    if not container:
        return {} if isinstance(container, dict) else []
    return (_Lenient(path, []) if lenient else _Strict(path)).value(container, -1)


def error_text(exc: BaseException) -> str:
    """Write an exception as `Type: message`, inside the domain and at most `ERROR_LIMIT` characters. Never raises."""
    try:
        message = str.__str__(str(exc))
    except BaseException:  # a hostile __str__ may even exit
        message = "<its message cannot be printed>"
    name = type(exc).__name__
    return cut(f"{name}: {message}" if message else name)


def cut(text: str) -> str:
    """Make an error text fit: inside the domain, and cut at `ERROR_LIMIT` with the cut marked."""
    if len(text) > ERROR_LIMIT:
        mark = f" [cut: {len(text)} characters in all]"
        text = text[: ERROR_LIMIT - len(mark)] + mark
    return _UNFIT.sub("\ufffd", text)


def json_path(root: str, keys: Iterable[str | int]) -> str:
    """Write a JSON path: `$.kwargs.x[0]["odd key"]`."""
    return root + "".join(_step(key) for key in keys)


def _step(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    if _PLAIN_KEY.match(key):
        return f".{key}"
    return f"[{json.dumps(key if len(key) <= 64 else key[:64] + '...')}]"


class _Strict:
    """One walk over one value. `keys` is the way from the root to where the walk stands."""

    __slots__ = ("keys", "room", "root")

    def __init__(self, root: str) -> None:
        self.root = root
        self.keys: list[str | int] = []
        self.room = MAX_SIZE

    def value(self, value: Any, depth: int) -> JSONValue:
        kind = type(value)
        if kind is str:
            if value.isascii() and "\0" not in value and (size := len(value)) <= self.room:
                self.room -= size
                return value  # type: ignore[no-any-return]  # a cast would cost a call for each string
            return self.text(value)
        if value is None or kind is bool:
            return value  # type: ignore[no-any-return]  # likewise
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
        if len(text) > self.room:  # UTF-8 is never shorter: nothing of it has to be read
            return cast(str, self.too_large(text))
        if _UNFIT.search(text) is not None:
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
            self.room -= _ELEMENT_SIZE
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
                self.room -= _ELEMENT_SIZE + len(key)
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
        raise self.refuse("two keys become the same string; one of them would be lost")

    def envelope(self, members: dict[str, JSONValue]) -> JSONValue:
        raise self.refuse("a dict of exactly __type__ and __value__ cannot be sent (it is kombu's own envelope)")

    def changed(self, value: object, exc: RuntimeError) -> JSONValue:
        raise self.refuse("the dict changed while it was read") from exc

    def too_deep(self, value: object) -> JSONValue:
        raise self.refuse(f"nested deeper than {MAX_DEPTH} levels, or cyclic")

    def too_large(self, value: object) -> JSONValue:
        raise self.refuse(f"larger than {MAX_SIZE} bytes in all; store it elsewhere and send a reference")

    def foreign(self, value: object) -> JSONValue:
        raise self.refuse(f"{type(value).__qualname__} is not a JSON value; convert it before dispatch")


class _Lenient(_Strict):
    """The same walk, with something to say where the strict one refuses."""

    __slots__ = ("replaced",)

    def __init__(self, root: str, replaced: list[str]) -> None:
        super().__init__(root)
        self.replaced = replaced
        self.room -= _STUB_RESERVE

    def note(self) -> None:
        if len(self.replaced) < MAX_REPLACED:
            self.replaced.append(json_path(self.root, self.keys))

    def stub(self, text: str) -> str:
        self.note()
        self.room -= len(text)
        return text

    def converted(self, value: object, depth: int) -> JSONValue:
        standing = len(self.keys)
        try:
            return self.by_rule(value, depth)
        except BaseException:  # the money is spent: even an exit must not cost the result
            del self.keys[standing:]
            return self.foreign(value)

    def key(self, key: object) -> str:
        try:
            return super().key(key)
        except BaseException:
            return self.unfit_key(key)

    def unfit(self, value: object, what: str) -> JSONValue:
        self.note()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return self.printed(value)

    def text(self, text: str) -> str:
        if len(text) > self.room or _UNFIT.search(text) is None:
            return super().text(text)
        standing = len(self.replaced)
        fitted = super().text(_UNFIT.sub("\ufffd", text))
        if len(self.replaced) == standing:
            self.note()
        return fitted

    def unfit_key(self, key: object) -> str:
        self.note()
        return self.printed(key)

    def taken(self, key: str, members: dict[str, JSONValue]) -> str:
        self.note()
        number = len(members) + 1
        while f"{key}~{number}" in members:
            number += 1
        return f"{key}~{number}"

    def envelope(self, members: dict[str, JSONValue]) -> JSONValue:
        self.note()
        self.room -= _ELEMENT_SIZE + len("__kept__")
        return {**members, "__kept__": True}

    def changed(self, value: object, exc: RuntimeError) -> JSONValue:
        return self.foreign(value)

    def too_deep(self, value: object) -> JSONValue:
        return self.stub(f"<unstract-wire: {_short_name(value)} nested deeper than {MAX_DEPTH} levels>")

    def too_large(self, value: object) -> JSONValue:
        return self.stub(f"<unstract-wire: {_short_name(value)} and what follows it beyond {MAX_SIZE} bytes>")

    def foreign(self, value: object) -> JSONValue:
        if issubclass(type(value), bytes | bytearray | memoryview):
            with contextlib.suppress(Exception):  # a released memoryview, say
                return self.encoded(bytes(cast("bytes | bytearray | memoryview", value)))
        self.note()
        return self.printed(value)

    def encoded(self, value: bytes) -> str:
        text = base64.b64encode(value).decode()
        if len(text) > self.room:
            return cast(str, self.too_large(value))
        self.note()
        self.room -= len(text)
        return text

    def printed(self, value: object) -> str:
        try:
            text = str.__str__(repr(value))
        except BaseException:  # a hostile __repr__ may even exit
            text = f"<unprintable {_short_name(value)}>"
        text = _UNFIT.sub("\ufffd", text)
        size = len(text.encode())
        if size > self.room:
            text = f"<unstract-wire: {_short_name(value)} beyond {MAX_SIZE} bytes>"
            size = len(text)
        self.room -= size
        return text


def _short_name(value: object) -> str:
    name = type(value).__name__
    return name if name.isascii() and len(name) <= 64 else "object"


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
