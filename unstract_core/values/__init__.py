"""The values that the wire carries, and the normalisation to them: strict at dispatch, lenient for results."""

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
