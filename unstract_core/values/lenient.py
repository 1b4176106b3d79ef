"""The lenient normalisation of a task's result: it replaces a value that the wire cannot carry, and never raises."""

from __future__ import annotations

import base64
import contextlib
import math
from typing import cast

from unstract_core.values import limits
from unstract_core.values.limits import ELEMENT_SIZE, MAX_DEPTH, UNFIT, JSONValue, json_path
from unstract_core.values.strict import Strict

MAX_REPLACED = 100
"""The highest number of replacements of one value that are listed and counted, to limit the length of the list."""

# A value above the size limit gets a short text on each level, and the result becomes an element of args.
_STUB_RESERVE = (MAX_DEPTH + 1) * 256


class Lenient(Strict):
    """The strict normalisation, with a replacement at each point where it would raise."""

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
        except BaseException:  # the task has run: even SystemExit must not lose its result
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
        if len(text) > self.room or UNFIT.search(text) is None:
            return super().text(text)
        standing = len(self.replaced)
        fitted = super().text(UNFIT.sub("\ufffd", text))
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
        self.room -= ELEMENT_SIZE + len("__kept__")
        return {**members, "__kept__": True}

    def changed(self, value: object, exc: RuntimeError) -> JSONValue:
        return self.foreign(value)

    def too_deep(self, value: object) -> JSONValue:
        return self.stub(f"<unstract-wire: {_short_name(value)} nested deeper than {MAX_DEPTH} levels>")

    def too_large(self, value: object) -> JSONValue:
        return self.stub(f"<unstract-wire: {_short_name(value)} and what follows it beyond {limits.MAX_SIZE} bytes>")

    def foreign(self, value: object) -> JSONValue:
        if issubclass(type(value), bytes | bytearray | memoryview):
            with contextlib.suppress(Exception):  # such as a released memoryview
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
        text = UNFIT.sub("\ufffd", text)
        size = len(text.encode())
        if size > self.room:
            text = f"<unstract-wire: {_short_name(value)} beyond {limits.MAX_SIZE} bytes>"
            size = len(text)
        self.room -= size
        return text


def _short_name(value: object) -> str:
    name = type(value).__name__
    return name if name.isascii() and len(name) <= 64 else "object"
