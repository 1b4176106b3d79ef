"""Extract the fields of invoices, receipts and letters by rules.

The rules replace the model that a product would call. Every field is read from the text. `extract` raises
ExtractionError for a document that contradicts itself; the error text is for the document's sender.
"""

from __future__ import annotations

from examples.extraction.bill import Bill, LineItem, read_bill
from examples.extraction.errors import ExtractionError
from examples.extraction.layouts import LAYOUTS
from examples.extraction.letter import Letter, is_letter, read_letter

__all__ = ["Bill", "ExtractionError", "Letter", "LineItem", "extract"]


def extract(text: str) -> Bill | Letter:
    """Return the fields of a document.

    Raises:
        ExtractionError: The document cannot be read, or contradicts itself.
    """
    for layout in LAYOUTS:
        if layout.mark.search(text):
            return read_bill(text, layout)
    if is_letter(text):
        return read_letter(text)
    raise ExtractionError("no known layout: neither an invoice, nor a receipt, nor a letter")
