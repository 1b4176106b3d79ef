"""Callback signatures in Celery's shape, made without Celery."""

from __future__ import annotations

import types
from typing import Any


def fields_of(**changed: Any) -> dict[str, Any]:
    """Return the fields of a valid signature, with the given changes."""
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
    """Return a signature with its fields as attributes, like Celery's."""
    return types.SimpleNamespace(**fields)
