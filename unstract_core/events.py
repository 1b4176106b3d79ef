"""How this package logs: named events with fields, ids only, never payload content.

`emit` writes `wire.<event> key=value ...` as the message, and the same fields as `extra` under `wire.<key>`, so that
both a person and a log pipeline can read it. docs/operating.md lists every event. No handler is added, no level set.
"""

from __future__ import annotations

import logging


def emit(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log one event. The fields must be ids, names, numbers and error types: they end up in somebody's log store."""
    if not logger.isEnabledFor(level):
        return
    text = "".join(f" {key}={value}" for key, value in fields.items())
    extra = {f"wire.{key}": value for key, value in fields.items()}
    logger.log(level, "wire.%s%s", event, text, extra={"wire.event": event, **extra}, stacklevel=2)
