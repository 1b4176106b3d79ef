"""The log of a worker and of its supervisor: one line for each record on standard error, with passwords masked."""

from __future__ import annotations

import contextlib
import copy
import datetime
import logging
from collections.abc import Callable, Iterator
from typing import Any

from unstract_core.cli.render.output import marked_traceback, printable, utc


@contextlib.contextmanager
def log_to_stderr(level: str, mask: Callable[[str], str]) -> Iterator[None]:
    """Log to standard error while the block runs.

    Args:
        level: The lowest level that is logged.
        mask: Returns a text with its passwords masked.
    """
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
    """One line for each record: UTC time, level, logger, message. Each line of a traceback starts with `TRACE`."""

    def __init__(self, mask: Callable[[str], str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._mask = mask

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return utc(datetime.datetime.fromtimestamp(record.created, datetime.UTC), "milliseconds")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return marked_traceback(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return marked_traceback(super().formatStack(stack_info))

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)  # other handlers share the record and its formatted traceback
        record.exc_text = None if record.exc_info else record.exc_text and marked_traceback(record.exc_text)
        return self._mask(super().format(record))
