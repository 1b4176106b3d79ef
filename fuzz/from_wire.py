"""Fuzz `from_wire` and `salvage` with text, bytes and mappings: the result is a payload or MalformedPayload.

A payload is written again, and is then rejected with PayloadError or reads back equal. The first byte of an input
selects the kind of the others: text, bytes, changes of a seed, or a new value.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["unstract_core"]):
    from unstract_core import TaskPayload, from_wire, to_wire
    from unstract_core.codec import Salvage, salvage, to_json
    from unstract_core.errors import MalformedPayload, PayloadError

from fuzz.drawn import Drawn
from fuzz.findings import keep
from tools.golden import corpus, read

SEEDS = [golden.expected["payload"] for golden in map(read, corpus()) if "payload" in golden.expected]
NAMES = ["task_name", "args", "kwargs", "queue", "fairness", "reply_key", "on_success", "on_error", "task_id"]
NAMES += ["org_id", "workload_type", "pipeline_priority", "callback_kwargs", "api", "non_api", "error", "success"]


def check(raw: Any) -> None:
    """Raise AssertionError, or the target's exception, if a guarantee is broken."""
    if not isinstance(salvage(raw), Salvage):
        raise AssertionError("salvage returned something else")
    try:
        payload = from_wire(raw)
    except MalformedPayload as exc:
        if not exc.problems:
            raise AssertionError("malformed, and no problem is named") from exc
        return
    if type(payload) is not TaskPayload:
        raise AssertionError(f"from_wire returned a {type(payload).__name__}")
    try:
        wire, text = to_wire(payload), to_json(payload)
    except PayloadError:
        return
    if not from_wire(wire) == from_wire(text) == payload:
        raise AssertionError("what was written reads back as something else")
    if to_wire(from_wire(text)) != wire:
        raise AssertionError("what was written is no normal form")


def drawn(data: bytes) -> Any:
    kind, rest = (data[0] if data else 0), data[1:]
    if kind % 4 == 0:
        return rest.decode("utf-8", "surrogateescape")
    if kind % 4 == 1:
        return rest
    source = Drawn(rest, NAMES)
    if kind % 4 == 3:
        return source.value()
    value = source.one_of(SEEDS)
    for _ in range(1 + source.number(4)):
        value = source.changed(value)
    with contextlib.suppress(RecursionError):  # too deep to write
        return json.dumps(value) if source.number(2) else value
    return value


def test_one(data: bytes) -> None:
    raw = drawn(data)
    try:
        check(raw)
    except Exception as exc:
        found = raw.decode("latin-1") if isinstance(raw, bytes) else raw
        kind, finding = type(raw).__name__, f"{type(exc).__name__}: {exc}"
        keep("from-wire", json.dumps({"finding": finding, "kind": kind, "raw": found}, indent=2))
        raise


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
