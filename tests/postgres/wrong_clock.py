"""Processes with a wrong wall clock, and calls into them.

The `sitecustomize` of the process changes the clock before anything else is imported: time.time and datetime.now are
wrong by hours, or jump at each call. The monotonic clock stays, as after a real change of the wall clock.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from unittest import mock

Result = TypeVar("Result")

RealMoment: TypeAlias = datetime.datetime
RealDay: TypeAlias = datetime.date

OFF = 30 * 3600.0
"""Seconds: longer than any time that the package uses."""

AHEAD, BEHIND, JUMPING = [OFF], [-OFF], [OFF, -OFF]
"""The errors of a clock in seconds, for each call in turn."""

_SITECUSTOMIZE = "from postgres.wrong_clock import put_wrong\nput_wrong({offsets!r})\n"


def put_wrong(offsets: list[float]) -> None:
    """Change the clock of this process by these seconds in turn."""
    real, real_ns = time.time, time.time_ns
    off = itertools.cycle(offsets)

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, cls.__bases__[0])

    class Moment(RealMoment, metaclass=Kind):
        __slots__ = ()  # modules in C look at the size

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return RealMoment.now(tz) + datetime.timedelta(seconds=next(off))

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    class Day(RealDay, metaclass=Kind):
        __slots__ = ()

        @classmethod
        def today(cls) -> Any:
            return Moment.now().date()

    time.time = lambda: real() + next(off)
    time.time_ns = lambda: real_ns() + int(next(off) * 1e9)
    datetime.datetime = Moment  # type: ignore[misc]
    datetime.date = Day  # type: ignore[misc]


class WrongClock:
    """Runs functions in a process with a wrong clock."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Callable[..., Result], *args: Any) -> Result:
        return self._pool.submit(function, *args).result(timeout=120)


@contextlib.contextmanager
def starting_wrong(directory: Path, offsets: list[float]) -> Iterator[None]:
    """Give a wrong clock to the processes of the block that inherit PYTHONPATH or sys.path."""
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(offsets=offsets))
    path = [str(directory), *filter(None, sys.path)]
    with mock.patch.object(sys, "path", path), mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):
        yield


@contextlib.contextmanager
def wrong_clock(directory: Path, offsets: list[float]) -> Iterator[WrongClock]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with starting_wrong(directory, offsets):
            pool.submit(tell).result(timeout=60)
        yield WrongClock(pool)


def tell() -> tuple[float, float]:
    """Return the time by both clocks of Python."""
    return time.time(), datetime.datetime.now(datetime.UTC).timestamp()
