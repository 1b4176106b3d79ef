"""Celery's own exceptions in a task: Retry, Reject and Ignore.

Celery itself is not imported: a task that raises one of its exceptions has imported it.
"""

from __future__ import annotations

import datetime

from unstract_core.outcomes import Ignored, Rejected, RetryAsked, fit_delay
from unstract_core.values import error_parts

_MODULE = "celery.exceptions"


def outcome_of(exc: BaseException) -> RetryAsked | Rejected | Ignored | None:
    """Return the outcome that an exception of Celery's asks for; None for every other exception."""
    match _celery_name(exc):
        case "Retry":
            return _retry(exc)
        case "Reject":
            return _reject(exc)
        case "Ignore":
            return Ignored()
    return None


def is_retry(exc: BaseException) -> bool:
    """Whether an exception is Celery's Retry, or a subclass of it."""
    return any((kind.__module__, kind.__name__) == (_MODULE, "Retry") for kind in type(exc).__mro__)


def _celery_name(exc: BaseException) -> str | None:
    """Return the name of the exception's first class that is Celery's; None if it has none."""
    return next((kind.__name__ for kind in type(exc).__mro__ if kind.__module__ == _MODULE), None)


def _retry(exc: BaseException) -> RetryAsked:
    """Read a Retry: `exc` is the error of the task, `when` a number of seconds or a moment."""
    when, reason = getattr(exc, "when", None), getattr(exc, "exc", None)
    if isinstance(when, datetime.datetime):
        when = max(0.0, (when - datetime.datetime.now(when.tzinfo)).total_seconds())
    return RetryAsked(*error_parts(reason if isinstance(reason, BaseException) else exc), delay=fit_delay(when))


def _reject(exc: BaseException) -> RetryAsked | Rejected:
    """Read a Reject: `reason` is the error of the task or a text; `requeue` asks for another run."""
    reason = getattr(exc, "reason", None)
    if isinstance(reason, str) or reason is None:
        error = ("Reject", str.__str__(reason) if reason else "")
    else:
        error = error_parts(reason if isinstance(reason, BaseException) else exc)
    return RetryAsked(*error) if getattr(exc, "requeue", False) else Rejected(*error)
