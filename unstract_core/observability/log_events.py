"""The log events of this package: an event name, and fields without payload content.

`emit` writes `wire.<event> key=value ...` as the message, and the same fields as `extra` under `wire.<key>`, for people
and for log pipelines. docs/monitoring.md lists every event. This package adds no handler and sets no level.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

LONGEST_FIELD = 500
"""The longest field in the message, in characters; the record's `extra` has the full value."""
_LONGER_FIELDS = {"traceback": 4000, "error": 2000}
_MOST_FRAMES = 30
_MOST_CAUSES = 5
_OURS = f"{Path(__file__).parent.parent}{os.sep}"


class OwnText(str):
    """A field that the operator of this process wrote, such as a URL: it is not quoted because of an equals sign."""

    __slots__ = ()


_SPECIAL = re.compile(r"""[\s="'`\\]""")
"""Characters that have a meaning for a reader of logfmt."""


def emit(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log one event. Never raises: an error in a log filter or handler must not change how a message is processed.

    Args:
        logger: The logger.
        level: The level of the event.
        event: The name of the event, without the prefix `wire.`.
        fields: Ids, names, numbers and error types. They are stored in logs, so they must not quote a payload.
    """
    with contextlib.suppress(Exception):
        if logger.isEnabledFor(level):
            text = "".join(
                f" {key}={_printed(value, _LONGER_FIELDS.get(key, LONGEST_FIELD))}" for key, value in fields.items()
            )
            extra = {f"wire.{key}": value for key, value in fields.items()}
            logger.log(level, "wire.%s%s", event, text, extra={"wire.event": event, **extra}, stacklevel=2)


def frames(exc: BaseException) -> str:
    """Return the traceback of an exception without values and messages: file, line and function of each frame.

    The innermost frame comes first. The frames of this package that lead to the task are omitted. The causes of the
    exception follow, each with the name of its type.
    """
    texts: list[str] = []
    link: BaseException | None = exc
    while link is not None and len(texts) <= _MOST_CAUSES:
        texts.append((f"caused by {type(link).__name__}: " if texts else "") + _frames(link.__traceback__))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; ".join(texts)


def stack_of(thread: int) -> str:
    """Return the current stack of a thread of this process in the form of `frames`; "" if there is no such thread."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else _shown(reversed(list(traceback.walk_stack(frame))))


def _frames(trace: TracebackType | None) -> str:
    return _shown(traceback.walk_tb(trace))


def _shown(steps: Iterable[tuple[FrameType, int]]) -> str:
    called = [(step.f_code.co_filename, line, step.f_code.co_name) for step, line in steps]
    ours = [n for n, (file, _, _) in enumerate(called) if file.startswith(_OURS)]
    called = called[min(max(ours, default=-1) + 1, len(called) - 1) :] if called else called
    shown = [f"{file}:{line} {name}" for file, line, name in reversed(called[-_MOST_FRAMES:])]
    return " < ".join(shown) + (f" < {len(called) - _MOST_FRAMES} more" if len(called) > _MOST_FRAMES else "")


def _printed(value: object, longest: int) -> str:
    """Return a field as text that cannot break the line or add a field, even if the text comes from a message."""
    text = str(value)
    if len(text) > longest:
        text = text[:longest] + "..."
    plain = text.replace("=", "") if isinstance(value, OwnText) else text
    if text.isprintable() and text and not _SPECIAL.search(plain):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable()).replace("\x7f", "\\u007f")


class LogThrottle(Generic[Kind]):
    """Limits how often events of one kind are logged, and counts the suppressed ones so that the count can be logged.

    Each of the first `burst` events of a kind is logged; the others within `seconds` are counted. Call `admit` if the
    next event reports the count. Call `passes` and `due` if the count is reported without another event.

    Args:
        burst: Events of a kind that are logged in one interval.
        seconds: Length of the interval, from its first event.
        monotonic: Returns the time in seconds. None (default): the clock of the machine.
    """

    def __init__(self, *, burst: int, seconds: float, monotonic: Callable[[], float] | None = None) -> None:
        self._burst = burst
        self._seconds = seconds
        self._monotonic = monotonic or time.monotonic
        self._kinds: dict[Kind, tuple[float, int, int]] = {}

    def admit(self, kind: Kind, now: float | None = None) -> int | None:
        """Return how many events were suppressed since the last logged one, or None if this event must not be logged.

        Args:
            kind: The kind of the event.
            now: The monotonic time in seconds; None reads the clock.
        """
        now = self._monotonic() if now is None else now
        began, logged, suppressed = self._kinds.get(kind, (now, 0, 0))
        if now - began >= self._seconds:
            began, logged = now, 0
        admitted = logged < self._burst
        self._kinds[kind] = (began, logged + 1, 0) if admitted else (began, logged, suppressed + 1)
        return suppressed if admitted else None

    def passes(self, kind: Kind) -> bool:
        """Count an event, and return whether to log it; False until `due` has returned an earlier count."""
        now = self._monotonic()
        began, logged, suppressed = self._kinds.get(kind, (now, 0, 0))
        if suppressed and now - began >= self._seconds:
            self._kinds[kind] = (began, logged, suppressed + 1)
            return False
        return self.admit(kind, now) is not None

    def due(self, *, at_once: bool = False) -> list[tuple[Kind, int, float]]:
        """Return each kind whose suppressed events must be reported, their number, and the seconds they span.

        The count of a kind that is returned starts again at zero.

        Args:
            at_once: True returns every count now, because no other call follows. False by default.
        """
        now, counts = self._monotonic(), []
        for kind, (began, _, suppressed) in list(self._kinds.items()):
            if suppressed and (at_once or now - began >= self._seconds):
                counts.append((kind, suppressed, round(now - began, 1)))
                self._kinds[kind] = (now, self._burst - 1, 0)
        return counts


class NewNames:
    """Limits warnings about names that clients choose: one for each set of names, and at most `burst` in an interval.

    It stores a hash of each set, and drops the least recent ones. A set that exceeds `burst` is new again later.

    Args:
        most: The number of sets that are remembered; 1000 by default.
        burst: The number of new sets in one interval; 100 by default.
        seconds: The length of the interval; 60 by default.
    """

    SHOWN = 20
    """The highest number of names in a warning."""
    LONGEST = 100
    """The longest name in a warning, in characters."""

    def __init__(self, *, most: int = 1000, burst: int = 100, seconds: float = 60.0) -> None:
        self._most = most
        self._burst = burst
        self._seconds = seconds
        self._known: OrderedDict[int, None] = OrderedDict()
        self._began = 0.0
        self._new = 0

    def are(self, names: Sequence[str]) -> bool:
        """Return whether to log a warning about these names, and remember them if so."""
        digest = hash(tuple(names))
        with contextlib.suppress(KeyError):
            self._known.move_to_end(digest)
            return False
        now = time.monotonic()
        if now - self._began >= self._seconds:
            self._began, self._new = now, 0
        if self._new >= self._burst:
            return False
        self._new += 1
        self._known[digest] = None
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return True

    @classmethod
    def shown(cls, names: Sequence[str]) -> str:
        """Return the first names as the field of a log event."""
        return ", ".join(name[: cls.LONGEST] for name in names[: cls.SHOWN])
