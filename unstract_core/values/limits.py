"""The JSON value domain: which values may travel.

One domain for every transport: null, bool, int in [-2^63, 2^63), finite float with |x| < 1e16, str without NUL or
lone surrogates, list, and dict with such str keys whose key set is not {"__type__", "__value__"}; at most
`MAX_DEPTH` containers deep and `MAX_SIZE` bytes large. The limits are PostgreSQL's jsonb's (NUL, surrogates, 1e22
comes back an int), kombu's (the envelope) and those of 64-bit JSON readers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TypeAlias

JSONValue: TypeAlias = "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"

MAX_DEPTH = 64
"""How many lists and dicts may stand inside each other."""

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of one value: its strings in UTF-8, and 16 for every element."""

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
FLOAT_LIMIT = 1e16
ENVELOPE = frozenset({"__type__", "__value__"})

ELEMENT_SIZE = 16
UNFIT = re.compile("[\x00\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[^\W\d]\w{0,63}\Z")


def json_path(root: str, keys: Iterable[str | int]) -> str:
    """Write a JSON path: `$.kwargs.x[0]["odd key"]`."""
    return root + "".join(_step(key) for key in keys)


def _step(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    if _PLAIN_KEY.match(key):
        return f".{key}"
    return f"[{json.dumps(key if len(key) <= 64 else key[:64] + '...')}]"
