"""Where a side shows something else than Postgres, and why: the list is closed, and docs/celery.md has its reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from celery_wire.ab_product import VALUES
from celery_wire.ab_rows import KWARGS, RESULT, ROWS, TRIALS, WAYS, Row, Seen, Way, comparable, failure, valued
from celery_wire.ab_sides import Fired


def without_the_text(row: Row, seen: Seen) -> tuple[Fired, ...]:
    return tuple(attrs.evolve(one, kwargs=KWARGS) for one in seen.callbacks)


def as_it_was(name: str) -> dict[str, Any]:
    """Return the difference of a row whose executor's result has a value unchanged."""
    return {
        f"a result with {name}": {
            "a reply": {"caller": valued(comparable(VALUES[name]))},
            "callbacks": {"callbacks": (Fired("complete", [valued(comparable(VALUES[name]))], KWARGS),)},
        }
    }


ENCODE = "EncodeError: TypeError('Object of type set is not JSON serializable')"
LOST = "WorkerLostError: Worker exited prematurely: exitcode 3."
NOT_REGISTERED = "NotRegistered: 'nobody_has_it'"
_NOT_A_REPLY: tuple[Way, ...] = ("callbacks", "on_success alone", "on_error alone", "neither")

SYSTEM_EXIT = "A task that leaves with SystemExit ends its process, and its sender gets a lost worker."
REJECTED = "The error of a task that rejects itself has the arguments of its Reject; elsewhere its reason."
UNREGISTERED = "A task that the worker does not know fires no errback; the result backend says NotRegistered."
REJECT = "Reject: ('not for me', False)"
Shown = Mapping[str, Any]
"""The different values, by the field of Seen."""


@attrs.frozen
class Difference:
    """A difference of a side from Postgres, by row and way; docs/celery.md has the reason."""

    side: str
    reason: str
    shown: Mapping[str, Mapping[Way, Shown]]

    @classmethod
    def of(cls, side: str, reason: str, rows: Iterable[str], ways: Iterable[Way], **shown: Any) -> Difference:
        """Return a difference with the same values in several rows and ways, as far as Postgres has others."""
        shown_by_row: dict[str, dict[Way, Shown]] = {}
        for row, way in TRIALS:
            if row in rows and way in ways:
                seen = ROWS[row].expected(way)
                values = {field: value(ROWS[row], seen) if callable(value) else value for field, value in shown.items()}
                if different := {field: value for field, value in values.items() if getattr(seen, field) != value}:
                    shown_by_row.setdefault(row, {})[way] = different
        return cls(side, reason, shown_by_row)


_FAILED = [name for name, row in ROWS.items() if row.error]
_RAN = [name for name, row in ROWS.items() if row.injected is None]

DIFFERENCES: tuple[Difference, ...] = (
    Difference.of(
        "RabbitMQ",
        "A broker keeps no status: `status` raises NotSupported.",
        ROWS,
        _NOT_A_REPLY,
        status="not kept",
    ),
    Difference(
        "RabbitMQ",
        "A connection that breaks gives the message to another worker, and both outcomes are sent, under one id.",
        {"lease lost": {"callbacks": {"callbacks": (Fired("complete", [RESULT], KWARGS),) * 2}}},
    ),
    Difference(
        "Celery",
        "A message is acknowledged before its task runs: the task is run once, and with its process it would be lost.",
        {"lease lost": {way: {"runs": 1} for way in ROWS["lease lost"].ways}},
    ),
    Difference(
        "Celery",
        "A callback has neither the fairness nor the priority of its parent.",
        {"returned, for an organisation": {"callbacks": {"callbacks": (Fired("complete", [RESULT], KWARGS),)}}},
    ),
    Difference.of(
        "Celery",
        "Where there is a result backend, it has the end of every task, and not only of dispatches with callbacks.",
        [name for name in _RAN if not ROWS[name].silent],
        ["neither"],
        status=lambda row, seen: seen.status or ("completed", row.result),
    ),
    Difference.of(
        "Celery",
        "The error's text is not in `callback_kwargs`: the callback asks the result backend, which has no type.",
        [name for name in _RAN if name in _FAILED],
        ["callbacks", "on_error alone"],
        callbacks=without_the_text,
    ),
    Difference.of(
        "Celery",
        "There are no dead letters.",
        _FAILED,
        WAYS,
        buried=(),
    ),
    Difference.of(
        "Celery",
        "A task that raised, and whose end is not awaited, is not run again.",
        [name for name in ROWS if ROWS[name].again],
        ["neither"],
        runs=1,
    ),
    Difference.of(
        "Celery",
        SYSTEM_EXIT,
        ["left with SystemExit"],
        _NOT_A_REPLY,
        status=("failed", LOST),
    ),
    Difference.of("Celery", SYSTEM_EXIT, ["left with SystemExit"], ["a reply"], caller=failure(LOST)),
    Difference.of(
        "Celery",
        REJECTED,
        ["rejected itself"],
        _NOT_A_REPLY,
        status=("failed", REJECT),
    ),
    Difference.of("Celery", REJECTED, ["rejected itself"], ["a reply"], caller=failure(REJECT)),
    Difference.of(
        "Celery",
        "A malformed message is dropped without an error to its sender: a blocked caller times out.",
        ["malformed"],
        WAYS,
        callbacks=(),
        status=None,
        caller=None,
    ),
    Difference.of(
        "Celery",
        UNREGISTERED,
        ["unknown task"],
        WAYS,
        callbacks=(),
    ),
    Difference.of("Celery", UNREGISTERED, ["unknown task"], _NOT_A_REPLY, status=("failed", NOT_REGISTERED)),
    Difference.of("Celery", UNREGISTERED, ["unknown task"], ["a reply"], caller=NOT_REGISTERED),
    Difference(
        "Celery",
        "Deliveries are not counted: a message with too many deliveries is run again.",
        {
            "too many attempts": {
                "a reply": {"runs": 1, "caller": ""},
                "callbacks": {
                    "runs": 1,
                    "callbacks": (Fired("complete", [RESULT], KWARGS),),
                    "status": ("completed", RESULT),
                },
                "on_success alone": {
                    "runs": 1,
                    "callbacks": (Fired("complete", [RESULT], KWARGS),),
                    "status": ("completed", RESULT),
                },
                "on_error alone": {"runs": 1, "callbacks": (), "status": ("completed", RESULT)},
                "neither": {"runs": 1, "status": ("completed", RESULT)},
            }
        },
    ),
    Difference(
        "Celery",
        "NaN, NUL, large ints, UUIDs, moments and bytes arrive as they were; on our wire by the rules of its domain.",
        {row: shown for name in VALUES.keys() - {"a tuple", "a set"} for row, shown in as_it_was(name).items()},
    ),
    Difference(
        "Celery",
        "A set in a result is a failure.",
        {
            "a result with a set": {
                "a reply": {"caller": failure(ENCODE)},
                "callbacks": {"callbacks": (Fired("error", ["<the id>"], KWARGS),), "status": ("failed", ENCODE)},
            }
        },
    ),
)


def expected(side: str, row: str, way: Way) -> Seen:
    seen = ROWS[row].expected(way)
    for one in DIFFERENCES:
        if one.side == side:
            seen = attrs.evolve(seen, **one.shown.get(row, {}).get(way, {}))
    return seen
