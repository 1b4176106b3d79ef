"""One moment of the queues, as `unstract-wire top` shows it: taken from a transport, and written as rows or JSON."""

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
"""Headings: ">" stands to the right, and "<" is a name that may be cut."""

_LETTERS = 5
_HIDDEN = "some sessions are hidden from this role; on PostgreSQL: GRANT pg_read_all_stats"

Rows: TypeAlias = Sequence[Sequence[str]]


@attrs.frozen
class Snapshot:
    """What there was at one moment; `rates` is by how much a queue's depth has grown a second, since the last one.

    `moment` is the same as `at`, on the monotonic clock.
    """

    at: datetime.datetime
    moment: float
    queues: Sequence[QueueState]
    rates: Mapping[str, float]
    workers: Sequence[WorkerState] | None
    letters: Sequence[DeadLetter]


def take_snapshot(transport: Transport, names: Sequence[str], before: Snapshot | None) -> Snapshot:
    about: Any = transport
    queues = list(cast(Inspection, about).queues(list(names) or None))
    now, moment = datetime.datetime.now(datetime.UTC), time.monotonic()
    rates: dict[str, float] = {}
    if before is not None and (seconds := moment - before.moment) > 0:
        depths = {state.queue: depth(state) for state in before.queues}
        rates = {state.queue: (depth(state) - depths.get(state.queue, 0)) / seconds for state in queues}
    workers = cast(SupportsWorkerList, about).workers() if callable(getattr(about, "workers", None)) else None
    letters: list[DeadLetter] = []
    if transport.capabilities.dead_letters:
        for name in names or (None,):
            letters += summaries(cast(DeadLetters, about.dead), queue=name, limit=_LETTERS)
    letters.sort(key=lambda letter: letter.buried_at, reverse=True)
    return Snapshot(now, moment, queues, rates, workers, letters[:_LETTERS])


def document(snapshot: Snapshot) -> dict[str, Any]:
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
    if snapshot.workers is None:
        return "this transport does not tell who works on it"
    if not snapshot.workers:
        return "nobody is connected"
    return _HIDDEN if any(worker.state is None for worker in snapshot.workers) else ""


def summaries(letters: DeadLetters, *, queue: str | None, limit: int) -> Sequence[DeadLetter]:
    """Return the newest letters, without their content where the transport can leave it out."""
    look = letters.summaries if isinstance(letters, BatchedDeadLetters) else letters.find
    return look(queue=queue, limit=limit)


def depth(state: QueueState) -> int:
    return state.ready + state.in_flight + state.delayed + state.unknown


def count(state: QueueState, number: int) -> str:
    return f"~{number}" if state.estimated else str(number)


def queue_row(state: QueueState) -> dict[str, Any]:
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
