"""The end of a process: the command's exit codes, and exits that do not wait for threads that a task left behind."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn

from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.worker")

FAILED, DECLINED, INTERRUPTED = 2, 1, 130

HELD_UP = 5.0

exit_code: int | None = None
"""With which this process ends when its exit handlers have run; None for the interpreter's usual end."""


@contextlib.contextmanager
def leaving_in_time(
    is_replaced: Callable[[], bool], grace: float, log: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Leave some seconds after the block, whatever holds up the end of the process: its place is another's.

    What the application does at exit has its time: `grace` seconds where the process was asked to leave, and fewer
    where another waits for its place. A thread that it has left behind would be waited for for ever. `log` opens the
    log once more, to tell of it.
    """
    code: object = 0
    try:
        yield
    except BaseException as exc:
        code = getattr(exc, "exit_code", getattr(exc, "code", FAILED))
        raise
    finally:
        seconds = HELD_UP if is_replaced() or code else grace
        code = code if isinstance(code, int) else FAILED
        threading.Thread(target=_leave, args=[log, seconds, code], name="unstract-wire-exit", daemon=True).start()


def _leave(log: Callable[[], AbstractContextManager[None]], seconds: float, code: int) -> None:
    time.sleep(seconds)
    with contextlib.suppress(Exception), log():
        emit(logger, logging.WARNING, "exit_held_up", pid=os.getpid(), seconds=seconds)
    flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End this process now; what the application has written to its open files is written out."""
    ignore_signals()
    with contextlib.suppress(Exception):
        logging.shutdown()
    for one in gc.get_objects():
        if issubclass(type(one), io.IOBase):
            with contextlib.suppress(Exception):
                one.flush()
    flush()
    os._exit(code)


def ignore_signals() -> None:
    """Let no signal interrupt the end of this process: an exception there leads to the interpreter's own clean-up."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
