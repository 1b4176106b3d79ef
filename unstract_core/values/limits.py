"""The value domain of the wire: the JSON values that every transport can carry.

- null and bool.
- int in [-2^63, 2^63), the range of 64-bit JSON readers.
- Finite float with |x| < 1e16: PostgreSQL's jsonb returns a larger one as an int.
- str without NUL and lone surrogates, which jsonb rejects.
- list, and dict with such str keys. A dict of exactly "__type__" and "__value__" is excluded: kombu would decode it.

A value has at most `MAX_DEPTH` levels of containers and `MAX_SIZE` bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TypeAlias

JSONValue: TypeAlias = "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"

MAX_DEPTH = 64
"""The highest number of levels of nested lists and dicts."""

MAX_SIZE = 64 * 1024 * 1024
"""The largest value, in bytes: its strings in UTF-8, and 16 bytes for each element."""

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
FLOAT_LIMIT = 1e16
ENVELOPE = frozenset({"__type__", "__value__"})

ELEMENT_SIZE = 16
UNFIT = re.compile("[\x00\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[^\W\d]\w{0,63}\Z")


def json_path(root: str, keys: Iterable[str | int]) -> str:
    """Return a JSON path such as `$.kwargs.x[0]["odd key"]`."""
    return root + "".join(_step(key) for key in keys)


def _step(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    if _PLAIN_KEY.match(key):
        return f".{key}"
    return f"[{json.dumps(key if len(key) <= 64 else key[:64] + '...')}]"
