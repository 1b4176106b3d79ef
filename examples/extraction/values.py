"""Amounts and dates in English, German and French notation."""

from __future__ import annotations

import datetime
import re
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation

from examples.extraction.errors import ExtractionError

POINT_AMOUNT = r"-?\$?\d+(?:[,'’]\d{3})*\.\d{2}"
"""1,234.50, 1'234.50, -$36.00"""

COMMA_AMOUNT = r"-?\d+(?:[.\u00a0\u202f]\d{3})*,\d{2}"
"""1.234,50 and, with a no-break space, 1 234,50"""

_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "january januar janvier",
            "february februar février",
            "march märz mars",
            "april avril",
            "may mai",
            "june juni juin",
            "july juli juillet",
            "august août",
            "september septembre",
            "october oktober octobre",
            "november novembre",
            "december dezember décembre",
        ),
        start=1,
    )
    for name in names.split()
}

_NUMERIC_DATE = re.compile(r"(?P<day>\d{1,2})[./](?P<month>\d{1,2})[./](?P<year>\d{4})")
_DAY_FIRST = re.compile(r"(?P<day>\d{1,2})\.? (?P<month>[^\W\d]+) (?P<year>\d{4})")
_MONTH_FIRST = re.compile(r"(?P<month>[^\W\d]+) (?P<day>\d{1,2}), (?P<year>\d{4})")


def parse_number(text: str, *, decimal_comma: bool = False) -> Decimal:
    """Return a quantity or an amount, without its currency sign and thousands separators; raises ExtractionError."""
    digits = re.sub(r"[^\d.,-]", "", text)
    plain = digits.replace(".", "").replace(",", ".") if decimal_comma else digits.replace(",", "")
    try:
        return Decimal(plain)
    except InvalidOperation:
        raise ExtractionError(f"{text.strip()!r} is not a number") from None


def parse_date(text: str) -> datetime.date:
    """Return the first date in `text`, with the day before the month; raises ExtractionError if there is none."""
    for pattern in (_NUMERIC_DATE, _DAY_FIRST, _MONTH_FIRST):
        if (found := pattern.search(text)) is None:
            continue
        month = found["month"]
        number = int(month) if month.isdigit() else _MONTHS.get(month.lower(), 0)
        try:
            return datetime.date(int(found["year"]), number, int(found["day"]))
        except ValueError:
            continue
    raise ExtractionError(f"{text.strip()!r} is not a date")


def cents(amount: Decimal) -> Decimal:
    """Round to two places, with halves away from zero, as in invoices."""
    return amount.quantize(Decimal("0.01"), ROUND_HALF_UP)
