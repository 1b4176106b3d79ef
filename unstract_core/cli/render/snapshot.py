"""A snapshot of queues, workers and failures for `unstract-wire top`, and its rows and JSON document."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import attrs

from unstract_core.cli.render.output import age, utc
from unstract_core.observability.diagnostics import SupportsWorkerList, WorkerState, kind_of_reason
from unstract_core.transport import BatchedDeadLetters, DeadLetter, DeadLetters, Inspection, QueueState, Transport

QUEUES = ("<queue", ">depth", ">change/s", ">ready", ">in flight", ">delayed", ">oldest", ">dead")
WORKERS = ("<session", "<from", ">pid", "state", ">for")
FAILURES = ("failure", "<queue", "<task", "buried at", "<error")
"""The headings of the tables: ">" aligns to the right, and "<" marks names that may be cut."""

_LETTERS = 5
_HIDDEN = "some sessions are hidden from this role; on PostgreSQL: GRANT pg_read_all_stats"

Rows: TypeAlias = Sequence[Sequence[str]]


@attrs.frozen
class Snapshot:
    """The state of the transport at one time.

    Attributes:
        at: The time.
        moment: The same time, on the monotonic clock.
        queues: The queues.
        rates: The growth of each queue's depth since the last snapshot, in messages per second.
        workers: The connected workers; None if the transport does not list them.
        letters: The newest dead letters.
    """

    at: datetime.datetime
    moment: float
    queues: Sequence[QueueState]
    rates: Mapping[str, float]
    workers: Sequence[WorkerState] | None
    letters: Sequence[DeadLetter]


def take_snapshot(transport: Transport, names: Sequence[str], before: Snapshot | None) -> Snapshot:
    """Read the state of a transport.

    Args:
        transport: The transport.
        names: The queues; if empty, all queues with messages.
        before: The last snapshot, for the rates; None for no rates.
    """
    source: Any = transport
    queues = list(cast(Inspection, source).queues(list(names) or None))
    now, moment = datetime.datetime.now(datetime.UTC), time.monotonic()
    rates: dict[str, float] = {}
    if before is not None and (seconds := moment - before.moment) > 0:
        depths = {state.queue: depth(state) for state in before.queues}
        rates = {state.queue: (depth(state) - depths.get(state.queue, 0)) / seconds for state in queues}
    workers = cast(SupportsWorkerList, source).workers() if callable(getattr(source, "workers", None)) else None
    letters: list[DeadLetter] = []
    if transport.capabilities.dead_letters:
        for name in names or (None,):
            letters += newest_dead_letters(cast(DeadLetters, source.dead), queue=name, limit=_LETTERS)
    letters.sort(key=lambda letter: letter.buried_at, reverse=True)
    return Snapshot(now, moment, queues, rates, workers, letters[:_LETTERS])


def document(snapshot: Snapshot) -> dict[str, Any]:
    """Return the JSON document of a snapshot."""
    return {
        "at": utc(snapshot.at),
        "queues": [queue_row(state) for state in snapshot.queues],
        "workers": None if snapshot.workers is None else [attrs.asdict(worker) for worker in snapshot.workers],
        "failures": [
            {
                "id": letter.id,
                "queue": letter.queue,
                "task_name": letter.task_name,
                "buried_at": utc(letter.buried_at),
                "error": kind_of_reason(letter.reason),
            }
            for letter in snapshot.letters
        ],
    }


def queue_rows(snapshot: Snapshot) -> Rows:
    """Return the rows for the headings `QUEUES`."""
    return [
        [
            state.queue,
            count(state, depth(state)),
            f"{snapshot.rates[state.queue]:+.1f}" if state.queue in snapshot.rates else "-",
            count(state, state.ready),
            str(state.in_flight),
            str(state.delayed),
            "-" if state.oldest is None else age(state.oldest),
            str(state.dead),
        ]
        for state in snapshot.queues
    ]


def worker_rows(snapshot: Snapshot) -> Rows:
    """Return the rows for the headings `WORKERS`."""
    return [
        [
            worker.name,
            worker.address or ("local" if worker.state is not None else "hidden"),
            str(worker.pid),
            worker.state or "hidden",
            "-" if worker.since is None else age(max(0.0, worker.since)),
        ]
        for worker in snapshot.workers or ()
    ]


def failure_rows(snapshot: Snapshot) -> Rows:
    """Return the rows for the headings `FAILURES`."""
    return [
        [
            letter.id,
            letter.queue,
            letter.task_name or "-",
            utc(letter.buried_at, "seconds"),
            kind_of_reason(letter.reason),
        ]
        for letter in snapshot.letters
    ]


def note_on_workers(snapshot: Snapshot) -> str:
    """Return the note below the workers, or instead of them; "" for none."""
    if snapshot.workers is None:
        return "this transport does not list its workers"
    if not snapshot.workers:
        return "no worker is connected"
    return _HIDDEN if any(worker.state is None for worker in snapshot.workers) else ""


def newest_dead_letters(letters: DeadLetters, *, queue: str | None, limit: int) -> Sequence[DeadLetter]:
    """Return the newest dead letters, without their content if the transport can omit it."""
    list_letters = letters.summaries if isinstance(letters, BatchedDeadLetters) else letters.find
    return list_letters(queue=queue, limit=limit)


def depth(state: QueueState) -> int:
    """Return the number of all messages in a queue."""
    return state.ready + state.in_flight + state.delayed + state.unknown


def count(state: QueueState, number: int) -> str:
    """Return a number of messages as text, with ~ if it is an estimate."""
    return f"~{number}" if state.estimated else str(number)


def queue_row(state: QueueState) -> dict[str, Any]:
    """Return the JSON object of a queue."""
    return {
        "queue": state.queue,
        "depth": depth(state),
        "ready": state.ready,
        "in_flight": state.in_flight,
        "delayed": state.delayed,
        "oldest_seconds": None if state.oldest is None else round(state.oldest, 3),
        "dead": state.dead,
        **({"unknown": state.unknown} if state.unknown else {}),
        "estimated": state.estimated,
    }
