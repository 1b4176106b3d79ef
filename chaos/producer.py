"""A producer process: it dispatches with callbacks in a loop, and records the fate of each send.

It writes `before` before a send, with the expected callback. After the send it writes `accepted`, `refused` if the
error says that nothing was sent, or `unknown` otherwise. A killed process writes none of these.
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
"""Seconds between two sends. The workers keep up with this rate on a busy machine."""
_FAILS = 10
"""One in this many tasks raises, so that both callbacks are used."""


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
