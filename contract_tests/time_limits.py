"""Time limits: whatever a transport does, each test of it has an end.

The limit reaches the main thread as a signal, because a thread that hangs in a lock or in a system call sees nothing
else. What is raised there is no Exception, so that neither a transport nor hypothesis (which would run the example
again, to shrink it) can catch it and go on. pytest-timeout raises what hypothesis catches. Who catches that too, time
after time, leaves nothing but to end the whole run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_SIGNAL = signal.SIGUSR2
_SIGNAL_INTERVAL = 5.0
_MAX_SIGNALS = 8
"""How often a test is told to end before the run is ended."""

report_abort: Callable[[str], object] = print
"""How it is told that the run is ended."""


class TimeLimit(BaseException):
    """A test, or the opening or closing of a transport, has not ended in its time."""


@contextlib.contextmanager
def limited(seconds: float, doing: Callable[[], str]) -> Iterator[None]:
    """Raise TimeLimit in the main thread when the block takes longer; `doing` says what hangs. Elsewhere: no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    started = time.monotonic()

    def handle(number: int, frame: FrameType | None) -> None:
        if not over.is_set() and _interruptible(frame):
            raise TimeLimit(f"no end after {time.monotonic() - started:.3g} s{doing()}")

    def watch() -> None:
        wait = seconds
        for _ in range(_MAX_SIGNALS):
            if over.wait(wait):
                return
            signal.pthread_kill(main, _SIGNAL)
            wait = min(_SIGNAL_INTERVAL, seconds)
        if not over.wait(wait):
            report_abort(f"no end after {time.monotonic() - started:.3g} s{doing()}; it cannot be ended, so the run is")
            os._exit(1)

    main = threading.get_ident()
    previous = signal.signal(_SIGNAL, handle)
    watcher = threading.Thread(target=watch, name="contract_tests-limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(_SIGNAL, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def as_failure() -> Iterator[None]:
    """Make a TimeLimit a failure like any other: for what else a fixture raises, pytest leaves the others unended."""
    try:
        yield
    except TimeLimit as exc:
        pytest.fail(str(exc), pytrace=False)


def together(*calls: Callable[[], T], limit: float = 45.0) -> list[T]:
    """Run calls at once, each on a thread of its own; return what they return, or raise what the first of them raised.

    None begins before all of their threads run. The threads are daemons: one that hangs keeps neither the test nor the
    interpreter from ending.
    """
    ready = threading.Barrier(len(calls))

    def begin(call: Callable[[], T]) -> T:
        ready.wait(limit)
        return call()

    running = [start(partial(begin, call)) for call in calls]
    return [one(limit) for one in running]


def start(call: Callable[[], T]) -> Callable[[float], T]:
    """Run a call on a daemon thread; return what waits for its end, so many seconds at most, and gives its outcome."""
    outcome: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as exc:  # handed to the thread that waits
            error.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(limit: float) -> T:
        thread.join(limit)
        if thread.is_alive():
            pytest.fail(f"a thread of this test has not ended within {limit:g} s")
        if error:
            raise error[0]
        return outcome[0]  # type: ignore[no-any-return]

    return result


def _interruptible(frame: FrameType | None) -> bool:
    """Whether a test or a fixture is running, and not pytest itself: there, what is raised would end the session."""
    return any(name.startswith("contract_tests.") for name in _modules(frame))


def _modules(frame: FrameType | None) -> Sequence[str]:
    names = []
    while frame is not None:
        names.append(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    return names
