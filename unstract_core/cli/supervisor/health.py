"""The health of a supervised worker, as /healthz shows it."""

from __future__ import annotations

import time
from typing import Any

from unstract_core.cli.health_server import Health
from unstract_core.cli.supervisor.pool import WorkerPool
from unstract_core.cli.supervisor.worker_process import WorkerProcess


def pool_health(pool: WorkerPool, silence_limit: float) -> Health:
    """Return the health of all children.

    The worker is healthy if each child is alive, has reported within `silence_limit` seconds, and is in no crash loop.
    A worker that is stopping is not healthy.

    Args:
        pool: The children.
        silence_limit: Seconds after which a child without a report, or a child that has not exited, is not healthy.
    """
    now, children = time.monotonic(), pool.all()
    reasons = ["the worker stops"] if pool.stopping else []
    for child in children:
        reasons += _reasons(child, pool, now, silence_limit)
    return Health(reasons, {"children": [_fields(child, now) for child in children]})


def _reasons(child: WorkerProcess, pool: WorkerPool, now: float, silence_limit: float) -> list[str]:
    reasons, state = [], child.state
    if state == "dead" and child in pool.active:
        reasons.append(f"child {child.number} has died and is started again")
    if state == "silent":
        reasons.append(f"child {child.number} has not been heard of for {now - child.last_report_at:.0f} s")
    if child.backoff.looping and child not in pool.leaving:
        spare = "the spare of " if child.is_spare else ""
        reasons.append(f"{spare}child {child.number} has died {child.backoff.deaths} times in a row")
    if (leaving := _leaving_for(child, now)) >= silence_limit and child in pool.active:
        reasons.append(
            f"child {child.number} has taken no messages for {leaving:.0f} s: it leaves, and so does the one"
            " before it; does a task hang? Give --task-deadline"
        )
    return reasons


def _fields(child: WorkerProcess, now: float) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "slot": child.number,
        "state": child.state,
        "deaths": child.backoff.deaths,
        "away": child.away,
    }
    if leaving := _leaving_for(child, now):
        fields["leaving"] = round(leaving, 1)
    if (process := child.process) is not None:
        silent_for = now - child.last_report_at
        fields |= {"pid": process.pid, "heard": round(silent_for, 1), "lived": round(child.lived, 1)}
    return fields


def _leaving_for(child: WorkerProcess, now: float) -> float:
    return 0.0 if child.leave_reason is None or child.process is None else now - child.leaving_since
