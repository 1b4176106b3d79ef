"""The differences between the schema of the wire and its readers and writers: two closed lists with examples.

The schema describes the messages of a writer. A reader accepts more: `TOLERATED` lists each such difference, with a
repair that turns it into a message of a writer. JSON Schema cannot express every rule: `UNSAID` lists the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import strategies as some
from hypothesis import strategies as st

from unstract_core import to_wire
from unstract_core.schema import committed_schema

Wire: TypeAlias = dict[str, Any]

CONTINUATIONS = ("on_success", "on_error")
DEFAULT_FAIRNESS: dict[str, Any] = {"org_id": None, "workload_type": "non_api", "pipeline_priority": 5}
OPTIONAL = ("reply_key", *CONTINUATIONS, "task_id", "headers")


@attrs.frozen
class Tolerated:
    """A difference that no writer writes and every reader accepts."""

    what: str
    reason: str
    mend: Callable[[Wire], None]
    examples: tuple[Wire, ...]


@attrs.frozen
class Unsaid:
    """A value that the schema allows and the wire does not, and the side that rejects it."""

    what: str
    refused_by: str
    examples: tuple[Wire, ...]


def wire_of(**keys: Any) -> Wire:
    return {"task_name": "t", "args": [], "kwargs": {}, "queue": "q", "fairness": None, **keys}


def continuation(**keys: Any) -> Wire:
    return {"task_name": "c", "kwargs": {}, "queue": "q", **keys}


def fairness(**keys: Any) -> Wire:
    return {"org_id": "o", "workload_type": "api", "pipeline_priority": 5, **keys}


def every(*values: Any) -> tuple[Any, ...]:
    return values


def without(wire: Wire, *keys: str) -> Wire:
    return {key: value for key, value in wire.items() if key not in keys}


def parts(wire: Wire) -> list[Wire]:
    """Return the message and its continuations."""
    return [wire, *(wire[key] for key in CONTINUATIONS if isinstance(wire.get(key), dict))]


def _supply(wire: Wire) -> None:
    supplied: Wire = {"args": [], "kwargs": {}, "fairness": None}
    for key, value in supplied.items():
        wire.setdefault(key, value)


def _supply_queue(wire: Wire) -> None:
    if not isinstance(wire.get("queue"), str) or not wire["queue"]:
        wire["queue"] = "the row's"


def _supply_empty(wire: Wire) -> None:
    for key in ("args", "kwargs"):
        if key in wire and not wire[key]:
            wire[key] = [] if key == "args" else {}


def _supply_kwargs(wire: Wire) -> None:
    for part in parts(wire)[1:]:
        if part and not part.get("kwargs"):
            part["kwargs"] = {}


def _supply_fairness(wire: Wire) -> None:
    if isinstance(wire.get("fairness"), dict):
        wire["fairness"] = {**DEFAULT_FAIRNESS, **wire["fairness"]}


def _fit_fairness(wire: Wire) -> None:
    if not isinstance(key := wire.get("fairness"), dict):
        if "fairness" in wire:
            wire["fairness"] = None
        return
    if not isinstance(org := key.get("org_id", ""), str):
        key["org_id"] = json.dumps(org) if is_number(org) else None
    if key.get("workload_type", "api") not in ("api", "non_api"):
        key["workload_type"] = "non_api"
    if not is_number(priority := key.get("pipeline_priority", 5)) or priority not in range(1, 11):
        key["pipeline_priority"] = 5


def _drop_empty(wire: Wire) -> None:
    for key in OPTIONAL:
        if key in wire and (wire[key] is None or (key != "headers" and not wire[key])):
            del wire[key]


def _write_addresses(wire: Wire) -> None:
    for key in ("reply_key", "task_id"):
        if wire.get(key) and not isinstance(wire[key], str):
            wire[key] = json.dumps(wire[key], separators=(",", ":"))


def _write_queues(wire: Wire) -> None:
    for part in parts(wire)[1:]:
        if is_number(queue := part.get("queue")):
            part["queue"] = json.dumps(queue)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _drop_odd_headers(wire: Wire) -> None:
    headers = wire.get("headers")
    if headers is None:
        return
    if not isinstance(headers, dict) or not all(type(x) is str for pair in headers.items() for x in pair):
        del wire["headers"]


def _fit_headers(wire: Wire) -> None:
    headers = wire.get("headers")
    if isinstance(headers, dict):
        wire["headers"] = {
            "".join("x" if char in some.UNFIT_CHARACTERS else char for char in name or "x")[:255]: text
            if not isinstance(text, str)
            else "".join("x" if char in some.UNFIT_CHARACTERS else char for char in text)
            for name, text in headers.items()
        }


def _empty_values(wire: Wire) -> None:
    if isinstance(wire.get("args"), list):
        wire["args"] = []
    for part in parts(wire):
        if isinstance(part.get("kwargs"), dict):
            part["kwargs"] = {}


def _shorten_names(wire: Wire) -> None:
    for part in parts(wire):
        for key in ("task_name", "queue", "reply_key", "task_id"):
            if isinstance(name := part.get(key), str) and (part is wire or key in ("task_name", "queue")):
                part[key] = name[:255]


def _clean_names(wire: Wire) -> None:
    for part in [*parts(wire), *([wire["fairness"]] if isinstance(wire.get("fairness"), dict) else [])]:
        for key in ("task_name", "queue", "reply_key", "task_id", "org_id"):
            if isinstance(name := part.get(key), str):
                part[key] = "".join("x" if char in some.UNFIT_CHARACTERS else char for char in name)


ODD_HEADERS: tuple[Any, ...] = (7, "x", [], {"x": 1}, {"x": None}, {"x": "y", "z": []})
TOLERATED = (
    Tolerated(
        "`args`, `kwargs` or `fairness` absent",
        "rows of earlier writers; read as empty, empty and null",
        _supply,
        tuple(without(wire_of(), key) for key in ("args", "kwargs", "fairness")),
    ),
    Tolerated(
        "`queue` absent, null, empty or not a string",
        "rows of the product; read as the queue in which the message was found",
        _supply_queue,
        (without(wire_of(), "queue"), *(wire_of(queue=odd) for odd in every(None, "", 7, False, [], {"name": "q"}))),
    ),
    Tolerated(
        '`args` or `kwargs` null, or another empty value (`false`, `0`, `""`, `[]`, `{}`)',
        "rows of the product; read as empty",
        _supply_empty,
        (
            *(wire_of(args=empty) for empty in every(None, False, 0, 0.0, "", {})),
            *(wire_of(kwargs=empty) for empty in every(None, False, 0, 0.0, "", [])),
        ),
    ),
    Tolerated(
        "a continuation whose `kwargs` are absent, null or empty",
        "rows of the product; read as empty",
        _supply_kwargs,
        (
            *(wire_of(**{key: without(continuation(), "kwargs")}) for key in CONTINUATIONS),
            *(wire_of(on_error=continuation(kwargs=empty)) for empty in every(None, False, 0, "", [])),
        ),
    ),
    Tolerated(
        "a fairness object without some of its keys",
        "rows of earlier writers; each missing key has its default",
        _supply_fairness,
        tuple(wire_of(fairness=without(fairness(), key)) for key in fairness()),
    ),
    Tolerated(
        "`fairness` that is not an object, or has a member with a wrong value",
        "no task depends on it; read as null, the member as absent, and a number as `org_id` as its text",
        _fit_fairness,
        (
            *(wire_of(fairness=odd) for odd in every(7, "org", [], True, False, "")),
            *(wire_of(fairness=fairness(org_id=odd)) for odd in every(7, 1.5, True, [], {})),
            *(wire_of(fairness=fairness(workload_type=odd)) for odd in every(None, "API", "batch", "", 1, ["api"], {})),
            *(
                wire_of(fairness=fairness(pipeline_priority=odd))
                for odd in every(None, "7", 7.5, True, 0, 11, [], 2**70)
            ),
        ),
    ),
    Tolerated(
        "`reply_key`, `on_success`, `on_error` or `task_id` null or empty, or `headers` null",
        "rows of the product; read as absent",
        _drop_empty,
        (
            *(wire_of(**{key: None}) for key in OPTIONAL),
            *(wire_of(**{key: empty}) for key in OPTIONAL[:-1] for empty in every("", False, 0, [], {})),
        ),
    ),
    Tolerated(
        "`reply_key` or `task_id` that is not a string",
        'rows of the product; read as its JSON text, for example 7 as `"7"`',
        _write_addresses,
        tuple(
            wire_of(**{key: odd}) for key in ("reply_key", "task_id") for odd in every(7, 1.5, True, ["x"], {"x": 1})
        ),
    ),
    Tolerated(
        "a number as the `queue` of a continuation",
        "rows of the product; read as its text",
        _write_queues,
        tuple(wire_of(**{key: continuation(queue=odd)}) for key in CONTINUATIONS for odd in every(7, 1.5)),
    ),
    Tolerated(
        "`headers` that are not an object of strings",
        "no task depends on them; read as absent",
        _drop_odd_headers,
        tuple(wire_of(headers=odd) for odd in ODD_HEADERS),
    ),
    Tolerated(
        "NUL, a lone surrogate, or an empty or longer name in `headers`",
        "a transport has already carried it; a continuation is sent without such headers",
        _fit_headers,
        tuple(wire_of(headers=odd) for odd in ({"": "x"}, {"x" * 256: "x"}, {"x": "\0"}, {"\ud800": "x"})),
    ),
    Tolerated(
        "a value outside the domain in `args` or `kwargs`",
        "the task checks its arguments; a check of every value would make each delivery slower",
        _empty_values,
        (
            wire_of(args=[2**63]),
            wire_of(args=[-(2**63) - 1]),
            wire_of(args=[1e300]),
            wire_of(args=[{"x": ["\0"]}]),
            wire_of(kwargs={"\0": 1}),
            wire_of(kwargs={"__type__": 1, "__value__": 2}),
            wire_of(on_success=continuation(kwargs={"x": "\ud800"})),
            wire_of(on_error=continuation(kwargs={"x": {"__type__": 1, "__value__": 2}})),
        ),
    ),
    Tolerated(
        "a name of more than 255 bytes",
        "a transport has already carried it",
        _shorten_names,
        (
            *(wire_of(**{key: "x" * 256}) for key in ("task_name", "queue", "reply_key", "task_id")),
            *(wire_of(on_error=continuation(**{key: "x" * 256})) for key in ("task_name", "queue")),
        ),
    ),
    Tolerated(
        "NUL or a lone surrogate in a name or in `org_id`",
        "a transport has already carried it",
        _clean_names,
        (
            *(wire_of(**{key: "a\0"}) for key in ("task_name", "queue", "reply_key", "task_id")),
            *(wire_of(on_success=continuation(**{key: "\udfff"})) for key in ("task_name", "queue")),
            wire_of(fairness=fairness(org_id="\ud800")),
        ),
    ),
)

UNSAID = (
    Unsaid(
        "names have at most 255 **bytes** of UTF-8; the schema counts characters",
        "writers",
        (wire_of(queue="é" * 128), wire_of(on_error=continuation(task_name="😀" * 64))),
    ),
    Unsaid(
        "at most 64 arrays and objects are nested",
        "writers",
        (wire_of(args=[some.nest(65)]), wire_of(kwargs={"x": some.nest(65, kind=dict)})),
    ),
    Unsaid("a value has at most 64 MiB", "writers", ()),
    Unsaid(
        "`headers` have at most 8192 bytes of UTF-8, names and values together",
        "writers",
        (wire_of(headers={"x": "x" * 8192}), wire_of(headers={f"{n}": "é" * 512 for n in range(9)})),
    ),
)

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, 7, 7.0, 7.5, -1, 10, 11, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 1e15, 1e16, 1e18, 1e19,
    -1e300, "", "x", "é", "api", "API", "7", "a\0", "\ud800", "\udfff", "x\n", "x" * 255, "x" * 256, "é" * 255,
    [], [None], [[]], ["\0"], [2**63], [{"__type__": 1, "__value__": 2}], {}, {"\0": 1}, {"x": "\ud800"},
    {"__type__": 1, "__value__": 2}, {"__type__": 1, "__value__": 2, "x": 3}, {"__type__": 1},
    continuation(), continuation(kwargs=None), continuation(x=1),
    fairness(), fairness(org_id=None), fairness(x=1), wire_of(),
]  # fmt: skip
KEYS = list(dict.fromkeys([*committed_schema()["properties"], *continuation(), *fairness(), "x-new", "\0"]))


@st.composite
def mutated(draw: st.DrawFn) -> Wire:
    """Draw a written message with up to three parts dropped, replaced or added."""
    wire = copy.deepcopy(to_wire(draw(some.payloads())))
    for _ in range(draw(st.integers(0, 3))):
        inner = [wire["fairness"]] if isinstance(wire.get("fairness"), dict) else []
        target = draw(st.sampled_from([wire, *parts(wire)[1:], *inner]))
        key = draw(st.sampled_from([*target, *KEYS]))
        if draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return wire
