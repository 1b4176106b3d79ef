"""Signals and processes of the operating system, as the supervisor handles them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Collection, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def woken_by_signals(received: list[int]) -> Iterator[selectors.BaseSelector]:
    """Yield a selector that wakes at each signal; append each SIGTERM and SIGINT to `received`.

    The key of the wake-up pipe has the data `received`, and has to be read. All handlers are restored afterwards.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        read_end, write_end = os.pipe()
        for end in (read_end, write_end):
            stack.callback(os.close, end)
            os.set_blocking(end, False)
        selector.register(read_end, selectors.EVENT_READ, received)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
        for number in STOP_SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, lambda n, _: received.append(n)))
        stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
        yield selector


def reap_orphans(children: Collection[int]) -> None:
    """Reap ended processes that are not ours: as process 1 of a container the supervisor inherits them.

    Ours are `children`, and the processes in our own process group, which a library may have started.
    """
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in children or os.getpgid(ended.si_pid) == os.getpgrp():
                return  # other code waits for this one; the next iteration reaps those behind it
            os.waitpid(ended.si_pid, 0)


def exit_name(status: int) -> str | int:
    """Return the exit code, or the name of the signal that ended the process."""
    try:
        return signal.Signals(-status).name if status < 0 else status
    except ValueError:
        return f"signal {-status}"
