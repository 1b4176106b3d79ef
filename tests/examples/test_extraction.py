"""The extraction of the examples: it reads the fields of a text, and rejects a text that contradicts itself."""

from __future__ import annotations

import contextlib
import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.demo import BROKEN, DOCUMENTS
from examples.extraction import Bill, ExtractionError, Letter, extract
from examples.extraction.values import parse_date, parse_number

BILLS = {
    "facture-atelier-morvan": ("Atelier Morvan", "F24-091", (2024, 4, 3), 3, "1096.00", "219.20", "1315.20 EUR"),
    "invoice-kestrel-roofing": (
        "KESTREL ROOFING LTD",
        "KR-2024-0117",
        (2024, 3, 15),
        4,
        "1901.30",
        "380.26",
        "2281.56 GBP",
    ),
    "invoice-lattice-cloud": ("Lattice Cloud, Inc.", "LC-100482", (2024, 4, 1), 4, "505.00", "41.66", "546.66 USD"),
    "kassenbon-brunner": ("EISENWAREN BRUNNER AG", "77-20418", (2024, 3, 22), 3, "1419.61", "114.99", "1534.60 CHF"),
    "receipt-harbour-kitchen": ("THE HARBOUR KITCHEN", "004182", (2024, 3, 2), 4, "30.37", "6.08", "36.45 GBP"),
    "rechnung-birkenhof": (
        "Tischlerei Birkenhof GmbH",
        "2024-0238",
        (2024, 2, 14),
        4,
        "2047.70",
        "389.06",
        "2436.76 EUR",
    ),
}
LETTERS = {"letter-lindqvist-hale"}


def text_of(document: str) -> str:
    return (DOCUMENTS / f"{document}.txt").read_text(encoding="utf-8")


def test_every_shipped_document_has_expectations() -> None:
    """Each document has its expected fields in this file."""
    assert {path.stem for path in DOCUMENTS.iterdir()} == {*BILLS, *LETTERS, *BROKEN}


@pytest.mark.parametrize("document", BILLS)
def test_bill_fields_are_those_of_the_text(document: str) -> None:
    """Vendor, number, date, line items, net, tax and total are those of the text."""
    vendor, number, date, items, subtotal, tax, total = BILLS[document]
    bill = extract(text_of(document))
    assert isinstance(bill, Bill)
    assert (bill.vendor, bill.number, bill.date) == (vendor, number, datetime.date(*date))
    assert len(bill.line_items) == items
    assert (str(bill.subtotal), str(bill.tax), f"{bill.total} {bill.currency}") == (subtotal, tax, total)


def test_line_items_keep_their_quantities_and_prices() -> None:
    """A line item is read with fractions and foreign number formats."""
    bill = extract(text_of("rechnung-birkenhof"))
    assert isinstance(bill, Bill)
    assert bill.due == datetime.date(2024, 2, 28)
    item = bill.line_items[3]
    assert item.description == "Oberfläche geölt, zweifach"
    assert (item.quantity, item.unit_price, item.amount) == (Decimal("4.2"), Decimal("28.50"), Decimal("119.70"))


def test_letter_fields_are_those_of_the_text() -> None:
    """Sender, recipient, date, subject and amounts are those of the text."""
    letter = extract(text_of("letter-lindqvist-hale"))
    assert letter == Letter(
        sender="Lindqvist & Hale LLP",
        recipient="Mrs Theodora Okafor, Okafor Ceramics",
        date=datetime.date(2024, 3, 26),
        reference="LH/24/0317",
        subject="Rent review, 14 Pottergate Yard",
        currency="GBP",
        amounts=[Decimal("11400.00"), Decimal("12250.00")],
        signatory="Ingrid Lindqvist",
    )


def test_inconsistent_bill_names_the_differing_sums() -> None:
    """The error names the document, both sums and the currency."""
    with pytest.raises(ExtractionError) as caught:
        extract(text_of("invoice-marlow-print"))
    assert str(caught.value) == (
        "invoice MF-4471 of MARLOW & FINCH PRINT does not add up: "
        "its 3 line items come to 1,184.00 GBP, but its subtotal says 1,284.00"
    )


@pytest.mark.parametrize(
    ("document", "printed", "forged", "complaint"),
    [
        (
            "invoice-kestrel-roofing",
            "     296.70",
            "     296.80",
            "line 'Welsh slate, 500 x 250 mm' comes to 296.70 GBP",
        ),
        ("invoice-lattice-cloud", "$41.66", "$51.66", "8.25 % tax comes to 41.66 USD"),
        ("rechnung-birkenhof", "2.436,76", "2.463,76", "subtotal and tax come to 2,436.76 EUR"),
        ("kassenbon-brunner", "1'534.60", "1'543.60", "its 3 line items come to 1,534.60 CHF"),
    ],
)
def test_changed_figure_is_detected(document: str, printed: str, forged: str, complaint: str) -> None:
    """A changed line, tax or total is detected in every layout."""
    text = text_of(document)
    assert printed in text
    with pytest.raises(ExtractionError, match=complaint):
        extract(text.replace(printed, forged))


@pytest.mark.parametrize("document", BILLS)
def test_truncated_bill_is_rejected_or_complete(document: str) -> None:
    """A truncated text raises an error or gives the fields of the whole document."""
    text = text_of(document)
    whole = extract(text)
    for end in range(len(text)):
        with contextlib.suppress(ExtractionError):
            assert extract(text[:end]) == whole
    with pytest.raises(ExtractionError, match="no "):
        extract(text[: len(text) // 2])


def test_text_of_unknown_layout_is_rejected() -> None:
    """A shopping list is not a known document."""
    with pytest.raises(ExtractionError, match="no known layout"):
        extract("milk\neggs\nbread\n")


@given(st.decimals(min_value=0, max_value=10**9, places=2))
def test_amount_formats_give_the_same_number(amount: Decimal) -> None:
    """1,234.50 and 1'234.50, 1.234,50 and 1 234,50 are one number."""
    english = f"{amount:,.2f}"
    swiss = english.replace(",", "'")
    german = english.translate(str.maketrans(",.", ".,"))
    french = german.replace(".", "\u202f")
    assert parse_number(english) == parse_number(swiss) == parse_number(f"${english}") == amount
    assert parse_number(german, decimal_comma=True) == parse_number(french, decimal_comma=True) == amount


@given(st.dates(min_value=datetime.date(1000, 1, 1)))
def test_date_formats_give_the_same_day(date: datetime.date) -> None:
    """15.03.2024, 15/03/2024, 15 March 2024 and March 15, 2024 are one day."""
    name = f"{date:%B}"
    for text in (
        f"{date.day:02}.{date.month:02}.{date.year}",
        f"{date.day}/{date.month}/{date.year}",
        f"{date.day} {name} {date.year}",
        f"{name} {date.day}, {date.year}",
    ):
        assert parse_date(text) == date
