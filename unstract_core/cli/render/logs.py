"""The log of a worker, and of what supervises it: whole lines on standard error, without any password."""

from __future__ import annotations

import contextlib
import copy
import datetime
import logging
from collections.abc import Callable, Iterator
from typing import Any

from unstract_core.cli.render.output import behind_mark, printable, utc


@contextlib.contextmanager
def log_to_stderr(level: str, mask: Callable[[str], str]) -> Iterator[None]:
    """Write what is logged from `level` on to standard error; `mask` returns a text without its passwords."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(mask))
    previous = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(level.upper())
    try:
        yield
    finally:
        logging.root.setLevel(previous)
        logging.root.removeHandler(handler)


class LogFormatter(logging.Formatter):
    """One line a record: UTC time, level, logger, message. Each line of a traceback follows behind `TRACE`."""

    def __init__(self, mask: Callable[[str], str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._mask = mask

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return utc(datetime.datetime.fromtimestamp(record.created, datetime.UTC), "milliseconds")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return behind_mark(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return behind_mark(super().formatStack(stack_info))

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)  # its text of the traceback is another handler's, and stays so
        record.exc_text = None if record.exc_info else record.exc_text and behind_mark(record.exc_text)
        return self._mask(super().format(record))
