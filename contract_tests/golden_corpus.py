"""The golden corpus: stored messages of every shape that all versions must read, with their expected values.

The corpus is append-only: no file is ever changed or removed (tools/check_golden.py checks this). A file holds one
stored message under "text" (or "base64", if it is not UTF-8), and one sentence about it.

- Readable: "reads_as" is the message as this package writes it again. If a value outside the domain prevents that,
  "refused_at" is the path of the refusal instead. "args" and "kwargs" are the values that the task gets, if they
  differ and JSON can express them. A message without queue is refused at "$.queue": its queue is that of its row.
- Unreadable: "problems" are the paths of the errors, in the order of the wire. "salvage" has the addresses of the
  sender that can still be read. Error texts are left out, because they may change.
- "supersedes" names an unreadable message with the same text, which newer versions read better. It replaces that one.
  A readable message is never superseded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeAlias

import attrs

from unstract_core.codec import Salvage
from unstract_core.payload import ContinuationSpec, FairnessKey

FOLDERS = ("rows", "wire")


@attrs.frozen(kw_only=True)
class Readable:
    """A message that is a task. `args` and `kwargs` are the task's arguments; None if JSON cannot express them."""

    name: str
    about: str
    raw: str | bytes
    reads_as: dict[str, Any] | None = None
    refused_at: str | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    supersedes: str | None = None


@attrs.frozen(kw_only=True)
class Unreadable:
    """A message that cannot be read as a task."""

    name: str
    about: str
    raw: str | bytes
    problems: tuple[str, ...]
    salvage: Salvage
    supersedes: str | None = None


WireMessage: TypeAlias = Readable | Unreadable


def wire_messages() -> Iterator[WireMessage]:
    """Yield every message of the corpus in wire JSON, by name: `wire/v1/plain`, `rows/single-pass`."""
    golden = files("contract_tests").joinpath("golden")
    found = {
        name: read(name, json.loads(file.read_text(encoding="utf-8")))
        for folder in FOLDERS
        for name, file in _found(golden.joinpath(folder), folder)
    }
    yield from current(found).values()


def current(found: Mapping[str, WireMessage]) -> dict[str, WireMessage]:
    """Return the messages without the superseded ones.

    Raises:
        ValueError: A superseded message is missing, is readable, or has another text.
    """
    superseded = set()
    for one in found.values():
        if one.supersedes is None:
            continue
        earlier = found.get(one.supersedes)
        if not isinstance(earlier, Unreadable) or earlier.raw != one.raw or one.supersedes in superseded:
            raise ValueError(
                f"{one.name} supersedes {one.supersedes}, which is not an unreadable message with the same text"
            )
        superseded.add(one.supersedes)
    return {name: one for name, one in found.items() if name not in superseded}


def read(name: str, fields: Mapping[str, Any]) -> WireMessage:
    """Read one file of the corpus.

    Raises:
        TypeError: A key is unknown, or a required key is missing.
    """
    rest = dict(fields)
    raw = base64.b64decode(rest.pop("base64")) if "base64" in rest else rest.pop("text")
    if "problems" in rest:
        problems, salvage = tuple(rest.pop("problems")), _salvage(**rest.pop("salvage"))
        return Unreadable(name=name, raw=raw, problems=problems, salvage=salvage, **rest)
    for key in ("args", "kwargs"):
        if "reads_as" in rest:
            rest.setdefault(key, rest["reads_as"][key])
    return Readable(name=name, raw=raw, **rest)


def equal(left: object, right: object) -> bool:
    """Return whether two values are the same JSON value: 1 equals 1.0, but true does not equal 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def _found(folder: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _found(entry, f"{name}/{entry.name}")
        elif entry.name.endswith(".json"):
            yield f"{name}/{entry.name.removesuffix('.json')}", entry


def _salvage(
    *,
    task_id: str | None,
    reply_key: str | None,
    on_error: Mapping[str, Any] | None,
    fairness: Mapping[str, Any] | None,
    headers: dict[str, str] | None = None,
) -> Salvage:
    return Salvage(
        task_id=task_id,
        reply_key=reply_key,
        on_error=None if on_error is None else ContinuationSpec(**on_error),
        fairness=None if fairness is None else FairnessKey(**fairness),
        headers=headers,
    )
