"""A producer process: dispatches with callbacks in a loop, and writes down what became of each send.

`before` is written before a send, with the callback that its task will end in. Afterwards `accepted`; `refused`, when
the error says that nothing was sent; `unknown`, when it may have been; or nothing, when the process was killed before.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from typing import Any

from chaos import messages, stall_detector
from chaos.breakpoints import SENT, Breakpoints
from chaos.journal import Journal
from unstract_core import Dispatcher, TransportError, load_transport

_PACE = 0.03
"""Seconds between two sends: the workers keep up, on a machine that does much else."""
_FAILS = 10
"""Every so many tasks raise, so that both callbacks are needed."""


def main() -> None:
    options = messages.options(__doc__).parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    journal = Journal(options.directory, options.name)
    stall_detector.start(journal, messages.LEASE / 3)
    breakpoints = Breakpoints(options.directory, options.name, journal)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    dispatcher = Dispatcher(load_transport(options.url))
    journal.write("ready")
    for number in itertools.count(1):
        if stopped.is_set():
            break
        _dispatch(dispatcher, journal, breakpoints, f"{options.name}/{number}", fails=number % _FAILS == 0)
        time.sleep(_PACE)
    dispatcher.transport.close()


def _dispatch(
    dispatcher: Dispatcher, journal: Journal, breakpoints: Breakpoints, dispatch: str, *, fails: bool
) -> None:
    journal.write("before", dispatch, messages.ON_ERROR if fails else messages.ON_SUCCESS)
    try:
        dispatcher.send_with_callback(
            messages.TASK,
            kwargs={"dispatch": dispatch, "fails": fails},
            queue=messages.EXECUTOR_QUEUE,
            task_id=dispatch,
            on_success=_callback(messages.ON_SUCCESS, dispatch),
            on_error=_callback(messages.ON_ERROR, dispatch),
        )
    except TransportError as exc:
        unknown = getattr(exc, "fate_unknown", False)
        journal.write("unknown" if unknown else "refused", dispatch, type(exc).__name__)
    else:
        breakpoints.reach(SENT, [dispatch])
        journal.write("accepted", dispatch)


def _callback(kind: str, dispatch: str) -> dict[str, Any]:
    return {"task": kind, "kwargs": {"dispatch": dispatch}, "options": {"queue": messages.CALLBACK_QUEUE}}


if __name__ == "__main__":
    main()
