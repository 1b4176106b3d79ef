"""How this package logs: named events with fields, ids only, never payload content.

`emit` writes `wire.<event> key=value ...` as the message, and the same fields as `extra` under `wire.<key>`, so that
both a person and a log pipeline can read it. docs/operating.md lists every event. No handler is added, no level set.
"""

from __future__ import annotations

import contextlib
import json
import logging

LONGEST_FIELD = 500
"""Characters of a field in the message; the record's `extra` has it whole."""


def emit(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log one event. The fields must be ids, names, numbers and error types: they end up in somebody's log store.

    Never raises: what somebody's filter or handler does must not decide what becomes of a message.
    """
    with contextlib.suppress(Exception):
        if logger.isEnabledFor(level):
            text = "".join(f" {key}={_printed(value)}" for key, value in fields.items())
            extra = {f"wire.{key}": value for key, value in fields.items()}
            logger.log(level, "wire.%s%s", event, text, extra={"wire.event": event, **extra}, stacklevel=2)


def _printed(value: object) -> str:
    """Write a field so that it stays on its line and in its place, whatever a foreign message calls its task."""
    text = str(value)
    if len(text) > LONGEST_FIELD:
        text = text[:LONGEST_FIELD] + "..."
    return text if text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=not text.isprintable())
