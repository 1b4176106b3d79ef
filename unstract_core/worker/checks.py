"""Checks of a consumer's settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unstract_core.errors import ConfigurationError
from unstract_core.transport import LONGEST_DELAY


def allowed_continuations(listed: Iterable[object] | None) -> frozenset[tuple[str, str | None]] | None:
    """Return the (queue, task) pairs of `allow_continuations`; None if all are allowed."""
    if listed is None:
        return None
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ConfigurationError(f'allow_continuations must be a list such as ["queue:task"], not {listed!r}')
    return frozenset(map(_queue_and_task, listed))


def _queue_and_task(entry: object) -> tuple[str, str | None]:
    queue, task_name = (None, None) if not isinstance(entry, tuple) or len(entry) != 2 else entry
    if isinstance(entry, str):
        queue, colon, name = entry.partition(":")
        task_name = name if colon else None
    if isinstance(queue, str) and queue and (task_name is None or (isinstance(task_name, str) and task_name)):
        return queue, task_name
    raise ConfigurationError(
        f'allow_continuations: {entry!r} lacks a queue or a task; write "queue", "queue:task" or ("queue", "task")'
    )


def check_choice(name: str, choice: object, known: Sequence[str | None]) -> None:
    """Raise ConfigurationError unless a setting is one of the known choices."""
    if choice not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, known))}, not {choice!r}")


def check_count(name: str, count: object) -> None:
    """Raise ConfigurationError unless a setting is a whole number of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {count!r}")


def check_seconds(name: str, seconds: object, *, zero: bool = False) -> None:
    """Raise ConfigurationError unless a setting is a positive number of seconds, or 0 where `zero` allows it."""
    if not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_DELAY or (seconds == 0 and not zero):
        kind = "number of seconds, not negative" if zero else "positive number of seconds"
        raise ConfigurationError(f"{name} must be a {kind}, {LONGEST_DELAY:g} at most; got {seconds!r}")
