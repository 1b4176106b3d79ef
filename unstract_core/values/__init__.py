"""Values that may travel, and how others are made to fit: strictly at dispatch, leniently for a task's result."""

from unstract_core.values.conversion import (
    ERROR_LIMIT,
    cut,
    error_parts,
    error_text,
    normalise,
    normalise_members,
    type_name,
)

__all__ = ["ERROR_LIMIT", "cut", "error_parts", "error_text", "normalise", "normalise_members", "type_name"]
