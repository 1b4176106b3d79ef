"""A worker process: a Consumer on one queue, which records its events and stops at breakpoints.

The events are `claimed`, `started`, `finished`, `called`, and `settled` with whether it took effect. Executor and
callback workers run the same program on different queues.
"""

from __future__ import annotations

import logging
import threading
import time

from chaos import messages, stall_detector
from chaos.breakpoints import RUNNING, Breakpoints
from chaos.journal import Journal
from chaos.planted_bugs import PLANTED_BUGS
from chaos.recording import RecordingTransport
from unstract_core import Consumer, Tasks, load_transport

_SHORTEST, _STEP, _STEPS = 0.02, 0.005, 8
"""Seconds that a task takes: the shortest time, and a number of steps."""


class Failed(RuntimeError):
    """Raised by the tasks that should fail."""


def tasks(journal: Journal, breakpoints: Breakpoints) -> Tasks:
    registry = Tasks()
    turns = threading.local()

    @registry.register(messages.TASK)
    def work(dispatch: str, fails: bool) -> dict[str, str]:
        journal.write("started", dispatch)
        turns.count = getattr(turns, "count", 0) + 1
        time.sleep(_SHORTEST + _STEP * (turns.count % _STEPS))
        breakpoints.reach(RUNNING, [dispatch])
        journal.write("finished", dispatch)
        if fails:
            raise Failed(dispatch)
        return {"dispatch": dispatch}

    @registry.register(messages.ON_SUCCESS)
    def on_success(result: dict[str, str], dispatch: str) -> None:
        right = result == {"dispatch": dispatch}
        journal.write("called", dispatch, messages.ON_SUCCESS if right else "another's result")
        breakpoints.reach(RUNNING, [dispatch])

    @registry.register(messages.ON_ERROR)
    def on_error(task_id: str, dispatch: str) -> None:
        journal.write("called", dispatch, messages.ON_ERROR if task_id == dispatch else "another's error")
        breakpoints.reach(RUNNING, [dispatch])

    return registry


def main() -> None:
    parser = messages.options(__doc__)
    parser.add_argument("--queue", required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--plant", choices=list(PLANTED_BUGS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    journal = Journal(options.directory, options.name)
    stall_detector.start(journal, messages.LEASE / 3)
    breakpoints = Breakpoints(options.directory, options.name, journal)
    transport = RecordingTransport(load_transport(options.url), journal, breakpoints, PLANTED_BUGS.get(options.plant))
    Consumer(
        transport,
        tasks(journal, breakpoints),
        [options.queue],
        concurrency=options.concurrency,
        lease=messages.LEASE,
        max_attempts=messages.MAX_ATTEMPTS,
    ).run()
    transport.close()


if __name__ == "__main__":
    main()
