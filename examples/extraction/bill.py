"""Read an invoice or a receipt by its layout, and check its sums."""

from __future__ import annotations

import datetime
from decimal import Decimal
from re import Match, Pattern

import attrs

from examples.extraction.errors import ExtractionError
from examples.extraction.layouts import Layout
from examples.extraction.values import cents, parse_date, parse_number

_CURRENCY_SIGNS = {"€": "EUR", "£": "GBP", "$": "USD"}


@attrs.frozen
class LineItem:
    """One line; `unit_price` is None if only the amount is printed."""

    description: str
    quantity: Decimal
    unit_price: Decimal | None
    amount: Decimal


@attrs.frozen(kw_only=True)
class Bill:
    """An invoice or a receipt; `tax_rate` is in per cent."""

    document_type: str
    vendor: str
    number: str
    date: datetime.date
    due: datetime.date | None
    currency: str
    line_items: list[LineItem]
    subtotal: Decimal
    tax_rate: Decimal
    tax: Decimal
    total: Decimal


def read_bill(text: str, layout: Layout) -> Bill:
    """Return the fields of a bill.

    Raises:
        ExtractionError: A field is missing, or a sum is wrong.
    """
    tax = _find(text, layout.tax, "tax")
    amount, total = _number(tax["value"], layout), _number(_value(text, layout.total, "total"), layout)
    currency = _value(text, layout.currency, "currency")
    bill = Bill(
        document_type=layout.document_type,
        vendor=_value(text, layout.vendor, "vendor"),
        number=_value(text, layout.number, "number"),
        date=parse_date(_value(text, layout.date, "date")),
        due=None if layout.due is None else parse_date(_value(text, layout.due, "due date")),
        currency=_CURRENCY_SIGNS.get(currency, currency),
        line_items=[_line_item(found, layout) for found in layout.item.finditer(text)],
        subtotal=total - amount
        if layout.subtotal is None
        else _number(_value(text, layout.subtotal, "subtotal"), layout),
        tax_rate=_number(tax["rate"], layout),
        tax=amount,
        total=total,
    )
    _check(bill, tax_included=layout.tax_included)
    return bill


def _find(text: str, pattern: Pattern[str], field: str) -> Match[str]:
    if (found := pattern.search(text)) is None:
        raise ExtractionError(f"no {field} found: the document is cut off or not of the layout that it looks like")
    return found


def _value(text: str, pattern: Pattern[str], field: str) -> str:
    return _find(text, pattern, field)["value"].strip()


def _number(text: str, layout: Layout) -> Decimal:
    return parse_number(text, decimal_comma=layout.decimal_comma)


def _line_item(found: Match[str], layout: Layout) -> LineItem:
    groups = found.groupdict()
    price = groups.get("price")
    return LineItem(
        description=groups["description"].strip(),
        quantity=_number(groups["quantity"], layout),
        unit_price=None if price is None else _number(price, layout),
        amount=_number(groups["amount"], layout),
    )


def _check(bill: Bill, *, tax_included: bool) -> None:
    for item in bill.line_items:
        if item.unit_price is not None and cents(item.quantity * item.unit_price) != item.amount:
            expected = cents(item.quantity * item.unit_price)
            raise _contradiction(bill, f"line {item.description!r} comes to", expected, "is printed as", item.amount)
    items = sum((item.amount for item in bill.line_items), Decimal(0))
    printed, name = (bill.total, "total") if tax_included else (bill.subtotal, "subtotal")
    if items != printed:
        count = len(bill.line_items)
        raise _contradiction(bill, f"its {count} line items come to", items, f"its {name} says", printed)
    tax = cents(bill.subtotal * bill.tax_rate / 100)
    if abs(tax - bill.tax) > Decimal("0.01"):
        raise _contradiction(bill, f"{bill.tax_rate} % tax comes to", tax, "is printed as", bill.tax)
    if bill.subtotal + bill.tax != bill.total:
        raise _contradiction(bill, "subtotal and tax come to", bill.subtotal + bill.tax, "its total says", bill.total)


def _contradiction(bill: Bill, what: str, computed: Decimal, claim: str, printed: Decimal) -> ExtractionError:
    name = f"{bill.document_type} {bill.number} of {bill.vendor}"
    sums = f"{what} {computed:,.2f} {bill.currency}, but {claim} {printed:,.2f}"
    return ExtractionError(f"{name} does not add up: {sums}")
