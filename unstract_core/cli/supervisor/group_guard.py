"""A small process that kills a child's process group when both the child and its supervisor have died.

Without it, programs that tasks have started would run for ever after both were killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterable

_MAX_FILES = 2**16
"""The highest file number that is closed where the system does not list the open files of a process."""


def start_group_guard(watched: int, guard: int) -> None:
    """Start the guard for the process group of this process.

    The guard is in the group itself, so that the group still exists when it is signalled. It is a grandchild of this
    process, so that a task that waits for all its child processes does not wait for the guard.

    Args:
        watched: The read end of a pipe. At the end of this pipe the guard kills the group; after a byte it only exits.
        guard: The write end of the same pipe, which this process and the supervisor keep open.
    """
    if os.getpgrp() == os.getpid():
        middle = os.fork()
        if middle == 0:
            try:
                if os.fork() == 0:
                    _guard(watched, guard)
            finally:
                os._exit(0)
        os.waitpid(middle, 0)
    os.close(watched)


def _guard(watched: int, guard: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.close(guard)  # an open write end in the guard itself would keep the pipe from ending
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for end in _open_files():
        if end not in (0, 1, 2, watched):
            with contextlib.suppress(OSError):
                os.close(end)
    if not os.read(watched, 1):
        os.killpg(0, signal.SIGKILL)


def _open_files() -> Iterable[int]:
    """Return the numbers of all open files of this process; some of the numbers may not be open."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/dev/fd")]
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return range(min(limit, _MAX_FILES) if limit >= 0 else _MAX_FILES)
