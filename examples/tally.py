"""Count the evidence of a run: saved files, callbacks, statuses, the reply and the queues.

The expectations are only the list of dispatches, the names of the queues, and the errors of the broken documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from examples.outputs import load_output
from examples.product import Dispatched
from examples.progress import Event
from unstract_core import ExecutionResult, Reply
from unstract_core.transport import QueueState


@attrs.frozen(kw_only=True)
class Evidence:
    """The evidence at the end of a run.

    Attributes:
        callbacks: The callbacks by task id.
        statuses: The statuses by task id; None if the transport stores none.
        exits: The exit codes by worker.
        broken: The error text of each document that cannot be extracted.
        names: The queues; one that is not in `queues` has an unknown state.
    """

    dispatched: Sequence[Dispatched]
    broken: Mapping[str, str]
    callbacks: Mapping[str, Sequence[Event]]
    statuses: Mapping[str, Reply | None] | None
    output: Path
    answer: ExecutionResult
    names: Sequence[str]
    queues: Sequence[QueueState]
    exits: Mapping[str, int]


@attrs.frozen
class Tally:
    """The result; `missing` lists everything that is missing, and is empty after a successful run."""

    line: str
    missing: list[str]


def take_stock(evidence: Evidence) -> Tally:
    missing = [*_missing_ends(evidence), *_missing_elsewhere(evidence)]
    saved = [load_output(evidence.output, one.document) for one in evidence.dispatched]
    fields = sum(1 for output in saved if output is not None and output["status"] == "completed" and output["fields"])
    errors = sum(1 for output in saved if output is not None and output["status"] == "failed" and output["error"])
    callbacks = sum(map(len, evidence.callbacks.values()))
    empty = sum(1 for state in evidence.queues if not _waiting(state))
    dead = sum(state.dead for state in evidence.queues)
    counts = (
        f"{len(evidence.dispatched)} dispatched, {callbacks} called back",
        f"{fields} outputs and {errors} error saved",
        f"{int(evidence.answer.success)} of 1 reply",
        f"{empty} of {len(evidence.names)} queues empty",
        f"{dead} dead letters",
    )
    return Tally(f"{'; '.join(counts)}: {f'INCOMPLETE, {len(missing)} missing' if missing else 'complete'}", missing)


def _missing_ends(evidence: Evidence) -> Iterator[str]:
    for one in evidence.dispatched:
        error = evidence.broken.get(one.document)
        for problem in _problems(one, error, evidence):
            yield f"{one.document}: {problem}"


def _problems(one: Dispatched, error: str | None, evidence: Evidence) -> Iterator[str]:
    """Yield the faults of a dispatch that should complete, or fail with `error` if that is given."""
    expected = "completed" if error is None else "failed"
    if (times := len(evidence.callbacks[one.task_id])) != 1:
        yield f"called back {times} times, not once"
    if evidence.statuses is not None:
        status = evidence.statuses[one.task_id]
        if status is None or status.status != expected:
            yield f"its status is {'unknown' if status is None else status.status}, not {expected}"
        elif expected == "failed" and status.error != error:
            yield f"the error of its status is not what the executor raised: {status.error}"
    output = load_output(evidence.output, one.document)
    if output is None:
        yield "no output was saved"
    elif output["task_id"] != one.task_id or output["status"] != expected:
        yield f"the saved output is of task {output['task_id']} and {output['status']}: {output['error']}"
    elif expected == "completed" and not output["fields"]:
        yield "the saved output has no fields"
    elif expected == "failed" and output["error"] != error:
        yield f"the saved error is not what the executor raised: {output['error']}"


def _missing_elsewhere(evidence: Evidence) -> Iterator[str]:
    documents = {one.document for one in evidence.dispatched}
    if not documents - evidence.broken.keys():
        yield "documents: no readable one was dispatched"
    for document in sorted(evidence.broken.keys() - documents):
        yield f"{document}: it was not dispatched"
    if not evidence.answer.success:
        yield f"the reply of the blocking dispatch: {evidence.answer.error}"
    for state in evidence.queues:
        if waiting := _waiting(state):
            yield f"queue {state.queue} still holds {waiting}"
        if state.dead:
            yield f"queue {state.queue} has {state.dead} dead letters"
    for queue in sorted({*evidence.names} - {state.queue for state in evidence.queues}):
        yield f"queue {queue}: its state is unknown"
    for name, code in evidence.exits.items():
        if code:
            yield f"the {name} worker ended with exit code {code}"


def _waiting(state: QueueState) -> int:
    return state.ready + state.in_flight + state.delayed
