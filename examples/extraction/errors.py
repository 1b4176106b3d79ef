"""What goes wrong when a document is read."""

from __future__ import annotations


class ExtractionError(ValueError):
    """A document that cannot be read, or that contradicts itself; the text is meant for a person."""
