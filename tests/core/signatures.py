"""Callback signatures in Celery's shape, made without Celery."""

from __future__ import annotations

import types
from typing import Any


def fields_of(**changed: Any) -> dict[str, Any]:
    """Return the fields of a signature that can be translated, but for what is `changed`."""
    return {
        "task": "done",
        "args": (),
        "kwargs": {"callback_kwargs": {"a": 1}},
        "options": {"queue": "ide_callback"},
        "subtask_type": None,
        "immutable": False,
        **changed,
    }


def as_object(fields: dict[str, Any]) -> Any:
    """Return a signature that has its fields as attributes, as Celery's own has."""
    return types.SimpleNamespace(**fields)
