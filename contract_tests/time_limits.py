"""Time limits: each test ends, also if the transport hangs.

The limit reaches the main thread as a signal, which also interrupts a thread that waits for a lock or in a system call.
The signal handler raises a BaseException. A transport, or hypothesis when it shrinks an example, would catch an
Exception and continue; pytest-timeout raises one. If the transport catches the BaseException again and again, the
whole run is aborted.
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
"""How many times a test is interrupted before the run is aborted."""

report_abort: Callable[[str], object] = print
"""Prints the reason before the run is aborted."""


class TimeLimit(BaseException):
    """A test, or the opening or closing of a transport, exceeded its time limit."""


@contextlib.contextmanager
def limited(seconds: float, doing: Callable[[], str]) -> Iterator[None]:
    """Limit the time of a block in the main thread; other threads have no limit.

    Args:
        seconds: The time limit.
        doing: Returns the running calls, for the error text. It is called when the limit is exceeded.

    Raises:
        TimeLimit: The block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    started = time.monotonic()

    def handle(number: int, frame: FrameType | None) -> None:
        if not over.is_set() and _interruptible(frame):
            raise TimeLimit(f"not finished after {time.monotonic() - started:.3g} s{doing()}")

    def watch() -> None:
        wait = seconds
        for _ in range(_MAX_SIGNALS):
            if over.wait(wait):
                return
            signal.pthread_kill(main, _SIGNAL)
            wait = min(_SIGNAL_INTERVAL, seconds)
        if not over.wait(wait):
            report_abort(
                f"not finished after {time.monotonic() - started:.3g} s{doing()};"
                " the call cannot be interrupted, so the run is aborted"
            )
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
    """Turn a TimeLimit into a test failure. After other BaseExceptions in a fixture, pytest skips further teardown."""
    try:
        yield
    except TimeLimit as exc:
        pytest.fail(str(exc), pytrace=False)


def together(*calls: Callable[[], T], limit: float = 45.0) -> list[T]:
    """Run calls concurrently, each on its own daemon thread, and return their results.

    The calls start when all threads run. A call that hangs keeps neither the test nor the interpreter alive.

    Args:
        calls: The functions to call.
        limit: Time limit of each call, in seconds. The test fails if a call takes longer.

    Raises:
        BaseException: The error of the first call that raised one.
    """
    ready = threading.Barrier(len(calls))

    def begin(call: Callable[[], T]) -> T:
        ready.wait(limit)
        return call()

    running = [start(partial(begin, call)) for call in calls]
    return [one(limit) for one in running]


def start(call: Callable[[], T]) -> Callable[[float], T]:
    """Start a call on a daemon thread.

    Returns:
        A function that waits for the call, at most the given number of seconds, and returns its result or raises its
        error.
    """
    outcome: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as exc:  # raised again in the waiting thread
            error.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(limit: float) -> T:
        thread.join(limit)
        if thread.is_alive():
            pytest.fail(f"a thread of this test did not finish within {limit:g} s")
        if error:
            raise error[0]
        return outcome[0]  # type: ignore[no-any-return]

    return result


def _interruptible(frame: FrameType | None) -> bool:
    """Whether a test or fixture is running. An error raised in pytest itself would end the session."""
    return any(name.startswith("contract_tests.") for name in _modules(frame))


def _modules(frame: FrameType | None) -> Sequence[str]:
    names = []
    while frame is not None:
        names.append(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    return names
