"""Read a business letter."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal

import attrs

from examples.extraction.errors import ExtractionError
from examples.extraction.values import POINT_AMOUNT, parse_date, parse_number

_SALUTATION = re.compile(r"^Dear (?P<name>.+),$", re.MULTILINE)
_REFERENCE = re.compile(r"^Our ref: *(?P<value>\S+)", re.MULTILINE)
_SUBJECT = re.compile(r"^Re: *(?P<value>.+)$", re.MULTILINE)
_SIGNATORY = re.compile(r"^Yours (?:sincerely|faithfully),\s+(?P<value>.+)$", re.MULTILINE)
_AMOUNT = re.compile(rf"£(?P<value>{POINT_AMOUNT})")


@attrs.frozen(kw_only=True)
class Letter:
    """A letter; `amounts` are the sums of money in the order of the text."""

    document_type: str = "letter"
    sender: str
    recipient: str
    date: datetime.date
    reference: str | None
    subject: str
    currency: str | None
    amounts: list[Decimal]
    signatory: str


def is_letter(text: str) -> bool:
    return _SALUTATION.search(text) is not None


def read_letter(text: str) -> Letter:
    """Return the fields of a letter: letterhead, date, addressee, subject, body, signature.

    Raises:
        ExtractionError: A field is missing.
    """
    head = [block for block in text.partition("\nDear ")[0].split("\n\n") if block.strip()]
    if len(head) < 3:
        raise ExtractionError("a letter needs its sender, a date and an addressee above the salutation")
    letterhead, date, addressee = head[:3]
    reference = _REFERENCE.search(text)
    amounts = [parse_number(found["value"]) for found in _AMOUNT.finditer(text)]
    return Letter(
        sender=letterhead.strip().splitlines()[0],
        recipient=", ".join(addressee.strip().splitlines()[:2]),
        date=parse_date(date),
        reference=None if reference is None else reference["value"],
        subject=_value(text, _SUBJECT, "subject"),
        currency="GBP" if amounts else None,
        amounts=amounts,
        signatory=_value(text, _SIGNATORY, "signature"),
    )


def _value(text: str, pattern: re.Pattern[str], field: str) -> str:
    if (found := pattern.search(text)) is None:
        raise ExtractionError(f"the letter has no {field}")
    return found["value"].strip()
