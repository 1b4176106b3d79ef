"""The error of the extraction."""

from __future__ import annotations


class ExtractionError(ValueError):
    """A document cannot be read or contradicts itself; the text is meant for a person."""
