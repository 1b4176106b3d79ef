"""The rows of the design's table, and the visible result of each, which is the same on every side.

`ab_differences.py` has the exceptions and their reasons.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
from celery_wire.ab_product import VALUES
from celery_wire.ab_sides import MAX_ATTEMPTS, Fired, Injected

from unstract_core import normalise

LATE = "no answer in time"
DOCUMENT = "d-1"
KWARGS: dict[str, Any] = {"callback_kwargs": {"run_id": "r"}}
FAIRNESS = {"org_id": "acme", "workload_type": "api", "pipeline_priority": 7}

Way = Literal["a reply", "callbacks", "on_success alone", "on_error alone", "neither"]
WAYS: tuple[Way, ...] = ("a reply", "callbacks", "on_success alone", "on_error alone", "neither")
"""`dispatch`, `dispatch_with_callback` with both, one or the other, and `dispatch_async`."""


@attrs.frozen
class Seen:
    """The visible result of a dispatch that has ended."""

    runs: int = 1
    #: The return value of `dispatch`; None for another method.
    caller: Any = None
    callbacks: tuple[Fired, ...] = ()
    status: Any = None
    #: How many messages are left in the queue.
    waiting: int = 0
    #: The reasons of the dead letters.
    buried: tuple[str, ...] = ()


@attrs.frozen
class Row:
    """An end of a task, and its consequences by the design."""

    #: The behaviour of the task.
    deed: str = "succeed"
    value: str | None = None
    #: The message that is put into the queue instead of a dispatch; None for a dispatch.
    injected: Injected | None = None
    result: Any = None
    error: str | None = None
    runs: int = 1
    #: Whether the task is run again if it has no caller and no callbacks.
    again: bool = False
    buried: bool = False
    #: Whether the sender gets no outcome.
    silent: bool = False
    for_an_organisation: bool = False
    #: Whether its claim is lost while it runs, in a test of its own.
    lost: bool = False
    ways: tuple[Way, ...] = WAYS

    def expected(self, way: Way) -> Seen:
        """Return the promise of the design, which Postgres shows."""
        runs = MAX_ATTEMPTS if self.again and way == "neither" else self.runs
        if self.silent:
            return Seen(runs, caller=LATE if way == "a reply" else None)
        buried = (self.error,) if self.error and (self.buried or way == "neither") else ()
        outcome = ("failed", self.error) if self.error else ("completed", self.result)
        if way == "a reply":
            return Seen(runs, caller=_caller(self, outcome), buried=buried)
        if way == "neither":
            return Seen(runs, status=outcome if self.error else None, buried=buried)
        fired: tuple[Fired, ...] = (
            _callback("error", "<the id>", error=self.error) if self.error else _callback("complete", self.result),
        )
        if self.for_an_organisation:
            fired = tuple(attrs.evolve(one, fairness=FAIRNESS) for one in fired)
        if way == ("on_success alone" if self.error else "on_error alone"):
            fired = ()
        return Seen(runs, callbacks=fired, status=outcome, buried=buried)


def _caller(row: Row, outcome: tuple[str, Any]) -> Any:
    if row.injected is not None:
        return row.error
    return failure(row.error) if row.error else row.result


def failure(error: str | None) -> dict[str, Any]:
    return {"success": False, "data": {}, "metadata": {}, "error": error}


def _callback(task: str, first: Any, **more: Any) -> Fired:
    return Fired(task, [first], {"callback_kwargs": {**KWARGS["callback_kwargs"], **more}})


def comparable(value: Any) -> Any:
    """Replace what is not equal to itself."""
    if isinstance(value, dict):
        return {key: comparable(member) for key, member in value.items()}
    if isinstance(value, list):
        return [comparable(member) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


RESULT = {"success": True, "data": {"document_id": DOCUMENT}, "metadata": {"pages": 2}, "error": None}


def valued(value: Any) -> dict[str, Any]:
    return {"success": True, "data": {"value": value}, "metadata": {}, "error": None}


MALFORMED = "MalformedPayload: expected an object, got str @ $.kwargs"
UNKNOWN = "UnknownTask: no task 'nobody_has_it' in the worker of queue '<the queue>'"
TOO_MANY = "TooManyAttempts: delivered 5 times and never settled; the limit is 4"

ROWS: dict[str, Row] = {
    "returned": Row(result=RESULT),
    "returned success=False": Row("do_not_succeed", result=failure("the document is empty")),
    "returned, for an organisation": Row(result=RESULT, for_an_organisation=True, ways=("callbacks",)),
    "raised": Row("raise_one", error="ValueError: it does not add up", again=True),
    "asked to retry, then returned": Row("be_away_once", result=RESULT, runs=2),
    "asked to retry to the end": Row("be_away", error="ConnectionError: away, after 3 retries", runs=4),
    "asked by self.retry": Row("ask_once", error="KeyError: 'model'", runs=2),
    "left with SystemExit": Row("leave", error="SystemExit: 3", again=True),
    "ignored itself": Row("be_ignored", silent=True),
    "rejected itself": Row("be_rejected", error="Reject: not for me", buried=True),
    "malformed": Row(injected=Injected(kwargs="x"), error=MALFORMED, runs=0, buried=True),
    "unknown task": Row(injected=Injected(task="nobody_has_it"), error=UNKNOWN, runs=0, buried=True),
    "too many attempts": Row(injected=Injected(delivered=4), error=TOO_MANY, runs=0, buried=True),
    "lease lost": Row("wait_for_word", result=RESULT, runs=2, lost=True, ways=("a reply", "callbacks")),
    **{
        f"a result with {name}": Row(
            "give", name, result=valued(normalise(VALUES[name], lenient=True)), ways=("a reply", "callbacks")
        )
        for name in VALUES
    },
}
TRIALS = [(name, way) for name, row in ROWS.items() for way in row.ways]
