"""The exit of a process: the command's exit codes, and exits that do not wait for threads that a task has started."""

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

EXIT_TIMEOUT = 5.0
"""Seconds within which a process must exit if another one replaces it."""

exit_code: int | None = None
"""The code with which this process exits after its exit handlers; None: the interpreter exits as usual."""


@contextlib.contextmanager
def exiting_in_time(
    is_replaced: Callable[[], bool], grace: float, log: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Make sure that the process exits soon after the block, even if a thread of the application never ends.

    Args:
        is_replaced: Whether another process replaces this one. The exit handlers then have 5 s.
        grace: Seconds for the exit handlers of the application if the process is not replaced.
        log: Opens the log again, for the event `exit_held_up`.
    """
    code: object = 0
    try:
        yield
    except BaseException as exc:
        code = getattr(exc, "exit_code", getattr(exc, "code", FAILED))
        raise
    finally:
        seconds = EXIT_TIMEOUT if is_replaced() or code else grace
        code = code if isinstance(code, int) else FAILED
        threading.Thread(target=_exit_later, args=[log, seconds, code], name="unstract-wire-exit", daemon=True).start()


def _exit_later(log: Callable[[], AbstractContextManager[None]], seconds: float, code: int) -> None:
    time.sleep(seconds)
    with contextlib.suppress(Exception), log():
        emit(logger, logging.WARNING, "exit_held_up", pid=os.getpid(), seconds=seconds)
    flush()
    os._exit(code)


def exit_now(code: int) -> NoReturn:
    """Exit now, without the interpreter's clean-up. Buffered data of all open files is written first."""
    ignore_signals()
    with contextlib.suppress(Exception):
        logging.shutdown()
    for candidate in gc.get_objects():
        if issubclass(type(candidate), io.IOBase):
            with contextlib.suppress(Exception):
                candidate.flush()
    flush()
    os._exit(code)


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT while this process exits: an exception there would start the interpreter's clean-up."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def flush() -> None:
    """Flush standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
