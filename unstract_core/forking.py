"""Signal handlers and thread checks that a forked child does not inherit.

A task may fork at any time: `os.fork`, `multiprocessing`, `subprocess` with a `preexec_fn`. The child gets a copy of
the worker's memory. It must not handle the worker's signals, and must not continue the worker's deliveries.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, Protocol

Handler = Callable[[int, FrameType | None], Any]


class Stopped(SystemExit):
    """A signal asked the process to exit at once; its handler raises this in the code that the thread is running."""


class ResetInChild(Protocol):
    """An object whose state belongs to the worker's process and must not be used in a forked child."""

    def reset_in_child(self) -> None:
        """Discard that state. Called in the child right after the fork; must not raise and must not take a lock."""


_installed: list[tuple[int, Handler, Any]] = []
"""Signal, our handler, and the previous handler; in the order of installation."""
_to_reset: weakref.WeakSet[ResetInChild] = weakref.WeakSet()


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Handler) -> Iterator[Callable[[], None]]:
    """Handle signals within the block, in this process and not in its forked children. Main thread only.

    A forked child gets the handlers from before the block, unless the application has set another handler since.

    Args:
        numbers: The signals.
        handler: Called with the signal's number and the interrupted frame.

    Yields:
        A function that installs the handler again if a task has replaced it. Main thread only.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # the child received the signal before its handlers were restored
            _restore()
            os.kill(os.getpid(), number)
            return
        handler(number, frame)

    def install() -> None:
        for number in numbers:
            if signal.getsignal(number) is not handle:
                signal.signal(number, handle)

    before = [(number, handle, signal.getsignal(number)) for number in numbers]
    _installed.extend(before)
    try:
        install()
        yield install
    finally:
        if os.getpid() == owner:
            for number, _, previous in before:
                _set(number, previous)
        for entry in before:
            with contextlib.suppress(ValueError):  # a forked child has forgotten them
                _installed.remove(entry)


_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def keeping_signals() -> Callable[[], None]:
    """Return a function that stops the timers that a task started, and restores the current signal handlers.

    Main thread only.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    idle = [timer for timer in _TIMERS if signal.getitimer(timer) == (0.0, 0.0)]

    def undo() -> None:
        for timer in idle:
            if signal.getitimer(timer) != (0.0, 0.0):
                signal.setitimer(timer, 0.0)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    return undo


def reset_in_child(resettable: ResetInChild) -> None:
    """Reset an object in each child that is forked from now on, for as long as the object exists."""
    _to_reset.add(resettable)


def end_child(code: object) -> NoReturn:
    """End a forked child that returned into the worker's code, without running the worker's clean-up.

    Args:
        code: The `code` of a SystemExit: an exit code, None for 0, or a text for 1.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(0 if code is None else code & 0xFF if isinstance(code, int) else 1)


def _restore() -> None:
    while _installed:
        number, ours, previous = _installed.pop()
        if signal.getsignal(number) is ours:
            _set(number, previous)


def _set(number: int, handler: Any) -> None:
    """Set a handler; None is a handler that was not installed from Python, and becomes the default."""
    with contextlib.suppress(ValueError):  # in a fork of a subinterpreter's
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _before() -> None:
    """Block the signals until the child has its own handlers: Python drops signals that arrive right after a fork."""
    _forking.mask = None
    if _installed:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number for number, _, _ in _installed})


def _in_parent() -> None:
    if (mask := getattr(_forking, "mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_child() -> None:
    _restore()
    for resettable in list(_to_reset):
        resettable.reset_in_child()
    _in_parent()


_forking = threading.local()
os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
