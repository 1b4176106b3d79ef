"""A handler that keeps the records of all loggers at all levels."""

from __future__ import annotations

import contextlib
import logging
from typing import Self


class EveryRecord(logging.Handler):
    """Keeps each record while the block runs; the root logger passes all levels."""

    def __init__(self) -> None:
        super().__init__(1)
        self._texts: list[str] = []

    def __enter__(self) -> Self:
        self._level = logging.root.level
        logging.root.addHandler(self)
        logging.root.setLevel(1)
        return self

    def __exit__(self, *_: object) -> None:
        logging.root.removeHandler(self)
        logging.root.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        fields = dict(vars(record))
        with contextlib.suppress(Exception):
            fields["message"] = self.format(record)  # with its traceback
        self._texts.append(f"{record.name} {fields!r}")

    def text(self) -> str:
        """Return all texts, tracebacks, arguments and extra fields."""
        return "\n".join(self._texts)
