"""Reads fields out of the text of invoices, receipts and letters, by rules.

It stands in for the model that a product would ask: slower and cleverer, but called in the same place. What it reads
is really in the text, and what does not add up is refused: `extract` raises ExtractionError, whose text says what is
wrong with the document in words that its sender understands.
"""

from __future__ import annotations

from examples.extraction.bill import Bill, LineItem, read_bill
from examples.extraction.errors import ExtractionError
from examples.extraction.layouts import LAYOUTS
from examples.extraction.letter import Letter, is_letter, read_letter

__all__ = ["Bill", "ExtractionError", "Letter", "LineItem", "extract"]


def extract(text: str) -> Bill | Letter:
    """Return the fields of a document. Raises ExtractionError where it cannot be read or contradicts itself."""
    for layout in LAYOUTS:
        if layout.mark.search(text):
            return read_bill(text, layout)
    if is_letter(text):
        return read_letter(text)
    raise ExtractionError("no known layout: neither an invoice, nor a receipt, nor a letter")
