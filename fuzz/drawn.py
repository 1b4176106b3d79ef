"""Values, and changes of values, from a fuzzer's bytes.

A reader of structured messages rejects nearly all random bytes. So the bytes select the part of a valid message that is
replaced, removed or added, and the new value.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Sequence
from typing import Any

import atheris

SCALARS: list[Any] = [None, True, False, 0, 1, -1, 7, 2**31, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, 1e16, 1e22, 1e300]
SCALARS += [float("nan"), float("inf"), "", "x", "x" * 255, "x" * 256, "é" * 130, "a\0b", "\ud800", "7"]
LARGE = [2**63, -(2**63) - 1, 2**64, 10**30]
"""Values of JSON that AMQP's headers cannot have."""
FOREIGN: list[Any] = [b"", b"\xff\x00", b"text", decimal.Decimal("1.50"), decimal.Decimal("-5E-255")]
FOREIGN += [datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)]
"""Values of AMQP's headers that JSON cannot have."""
_DEEP = 4


class Drawn:
    """Values from bytes; `names` are keys and texts with a meaning for the reader."""

    def __init__(self, data: bytes, names: Sequence[str]) -> None:
        self._source = atheris.FuzzedDataProvider(data)
        self._names = names

    def number(self, below: int) -> int:
        found: int = self._source.ConsumeIntInRange(0, below - 1)
        return found

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.number(len(choices))]

    def text(self) -> str:
        if self.number(2):
            return str(self.one_of(self._names))
        found: str = self._source.ConsumeUnicode(self.number(12))
        return found

    def octets(self) -> bytes:
        found: bytes = self._source.ConsumeBytes(self.number(64))
        return found

    def value(self, *, foreign: bool = False, depth: int = 0) -> Any:
        """Return a JSON value, or with `foreign` a value of an AMQP table."""
        kind = self.number(8 if depth < _DEEP else 5)
        if kind == 0:
            return self.one_of([*SCALARS, *(FOREIGN if foreign else LARGE)])
        if kind == 1:
            return int(self._source.ConsumeInt(8 if foreign else 9))
        if kind == 2:
            return float(self._source.ConsumeFloat())
        if kind in (3, 4):
            return self.text()
        if kind == 5:
            return [self.value(foreign=foreign, depth=depth + 1) for _ in range(self.number(4))]
        if kind == 6:
            return {self.text(): self.value(foreign=foreign, depth=depth + 1) for _ in range(self.number(4))}
        if self.number(2):
            inner = self.value(foreign=foreign, depth=depth + 1)
            for _ in range(self.one_of([1, 2, 60, 63, 64, 65, 300])):
                inner = [inner]
            return inner
        kinds = ["uuid", "datetime", "date", "time", "decimal", "bytes", "base64", "x"]
        return {"__type__": self.one_of(kinds), "__value__": self.value(foreign=foreign, depth=depth + 1)}

    def changed(self, value: Any, *, foreign: bool = False) -> Any:
        """Return a copy of a value with one change."""
        if isinstance(value, dict):
            if value and self.number(4):
                key = self.one_of(list(value))
                if not self.number(4):
                    return {name: one for name, one in value.items() if name != key}
                return {**value, key: self.changed(value[key], foreign=foreign)}
            if self.number(2):
                return {**value, self.text(): self.value(foreign=foreign)}
        if isinstance(value, list):
            if value and self.number(4):
                index = self.number(len(value))
                if not self.number(4):
                    return [*value[:index], *value[index + 1 :]]
                return [*value[:index], self.changed(value[index], foreign=foreign), *value[index + 1 :]]
            if self.number(2):
                return [*value, self.value(foreign=foreign)]
        return self.value(foreign=foreign)

    def changed_bytes(self, text: bytes) -> bytes:
        """Return bytes of which some are replaced by others of any length."""
        at = self.number(len(text) + 1)
        return text[:at] + self.octets() + text[at + self.number(20) :]
