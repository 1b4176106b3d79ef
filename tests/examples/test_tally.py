"""The tally of the demo: it names each missing or changed part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from examples.outputs import save_output
from examples.product import PRODUCT, Dispatched
from examples.progress import Event
from examples.tally import Evidence, take_stock
from unstract_core import ExecutionResult, Reply
from unstract_core.transport import QueueState

GOOD = Dispatched("good", "task-1", "run-1")
BAD = Dispatched("bad", "task-2", "run-2")
REASON = "ExtractionError: it does not add up"


def output(one: Dispatched, **changes: Any) -> dict[str, Any]:
    kept = {
        "document_id": one.document,
        "task_id": one.task_id,
        "status": "completed",
        "fields": {"a": 1},
        "error": None,
    }
    if one is BAD:
        kept |= {"status": "failed", "fields": None, "error": REASON}
    return kept | changes


def called_back(one: Dispatched) -> Event:
    return Event("done", one.run_id, "a_callback", 1, {})


def queue(name: str, **counts: int) -> QueueState:
    empty: dict[str, Any] = {"ready": 0, "in_flight": 0, "delayed": 0, "oldest": None, "dead": 0}
    return QueueState(name, **(empty | counts))


@pytest.fixture
def complete(tmp_path: Path) -> Evidence:
    """The evidence of a successful run: one readable document and one unreadable one."""
    for one in (GOOD, BAD):
        save_output(tmp_path, output(one))
    return Evidence(
        dispatched=[GOOD, BAD],
        broken={"bad": REASON},
        callbacks={one.task_id: [called_back(one)] for one in (GOOD, BAD)},
        statuses={"task-1": Reply("task-1", "completed"), "task-2": Reply("task-2", "failed", error=REASON)},
        output=tmp_path,
        answer=ExecutionResult(success=True, data={"fields": {}}),
        names=PRODUCT.names,
        queues=[queue(PRODUCT.executor), queue(PRODUCT.callbacks)],
        exits={"executor": 0, "callback": 0},
    )


def test_complete_evidence_has_nothing_missing(complete: Evidence) -> None:
    """The counts are those of the evidence."""
    tally = take_stock(complete)
    assert tally.missing == []
    assert tally.line == (
        "2 dispatched, 2 called back; 1 outputs and 1 error saved; 1 of 1 reply; 2 of 2 queues empty; "
        "0 dead letters: complete"
    )


def saving(one: Dispatched, **changes: Any) -> Callable[[Evidence], Evidence]:
    def save(evidence: Evidence) -> Evidence:
        save_output(evidence.output, output(one, **changes))
        return evidence

    return save


def unsaved(evidence: Evidence) -> Evidence:
    (evidence.output / "good.json").unlink()
    return evidence


def changed(**changes: Any) -> Callable[[Evidence], Evidence]:
    return lambda evidence: attrs.evolve(evidence, **changes)


def with_status(one: Dispatched, reply: Reply | None) -> Callable[[Evidence], Evidence]:
    return lambda evidence: attrs.evolve(evidence, statuses={**(evidence.statuses or {}), one.task_id: reply})


def with_callbacks(count: int) -> Callable[[Evidence], Evidence]:
    events = {BAD.task_id: [called_back(BAD)], GOOD.task_id: [called_back(GOOD)] * count}
    return changed(callbacks=events)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (unsaved, "good: no output was saved"),
        (saving(GOOD, task_id="another"), "good: the saved output is of task another"),
        (saving(GOOD, fields={}), "good: the saved output has no fields"),
        (saving(GOOD, status="failed", error="x"), "good: the saved output is of task task-1 and failed: x"),
        (saving(BAD, error="task task-2 failed"), "bad: the saved error is not what the executor raised"),
        (saving(BAD, status="completed", error=None), "bad: the saved output is of task task-2 and completed"),
        (with_callbacks(0), "good: called back 0 times"),
        (with_callbacks(2), "good: called back 2 times"),
        (with_status(GOOD, None), "good: its status is unknown"),
        (with_status(GOOD, Reply("task-1", "failed")), "good: its status is failed, not completed"),
        (with_status(BAD, Reply("task-2", "failed", error="other")), "bad: the error of its status is not what"),
        (changed(answer=ExecutionResult.failure("no reply")), "the reply of the blocking dispatch: no reply"),
        (changed(queues=[queue(PRODUCT.executor, ready=1), queue(PRODUCT.callbacks)]), "still holds 1"),
        (changed(queues=[queue(PRODUCT.executor), queue(PRODUCT.callbacks, in_flight=2)]), "still holds 2"),
        (changed(queues=[queue(PRODUCT.executor), queue(PRODUCT.callbacks, dead=1)]), "has 1 dead letters"),
        (changed(queues=[queue(PRODUCT.executor)]), "queue ide_callback: its state is unknown"),
        (changed(exits={"executor": 0, "callback": -9}), "the callback worker ended with exit code -9"),
        (changed(dispatched=[BAD]), "documents: no readable one was dispatched"),
        (changed(dispatched=[GOOD]), "bad: it was not dispatched"),
    ],
)
def test_each_fault_is_named(complete: Evidence, fault: Callable[[Evidence], Evidence], complaint: str) -> None:
    """One fault in the evidence is reported as exactly that fault."""
    tally = take_stock(fault(complete))
    assert len(tally.missing) == 1
    assert complaint in tally.missing[0]
    assert "INCOMPLETE, 1 missing" in tally.line


def test_missing_statuses_are_ignored_without_support(complete: Evidence) -> None:
    """For a transport without statuses the line is the same, and nothing is missing."""
    assert take_stock(attrs.evolve(complete, statuses=None)) == take_stock(complete)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (saving(BAD, error="task task-2 failed"), "bad: the saved error is not what the executor raised"),
        (with_callbacks(0), "good: called back 0 times"),
        (unsaved, "good: no output was saved"),
    ],
)
def test_fault_is_named_without_statuses(
    complete: Evidence, fault: Callable[[Evidence], Evidence], complaint: str
) -> None:
    """The lost error text is detected from the document without a status."""
    (missing,) = take_stock(fault(attrs.evolve(complete, statuses=None))).missing
    assert complaint in missing


def test_unknown_queue_is_not_counted_as_empty(complete: Evidence) -> None:
    """A queue with an unknown state stays in the number of queues."""
    tally = take_stock(attrs.evolve(complete, queues=[queue(PRODUCT.executor)]))
    assert "; 1 of 2 queues empty; " in tally.line
