"""The layouts of bills as data: the place of each field, and the number format.

A pattern captures its field in the group `value`; those of line items and taxes have more groups. `<n.n>` matches an
amount with a decimal point, `<n,n>` one with a decimal comma.
"""

from __future__ import annotations

import re
from re import Pattern
from typing import Literal

import attrs

from examples.extraction.values import COMMA_AMOUNT, POINT_AMOUNT


def _pattern(pattern: str) -> Pattern[str]:
    return re.compile(pattern.replace("<n.n>", POINT_AMOUNT).replace("<n,n>", COMMA_AMOUNT), re.MULTILINE)


def _optional(pattern: str | None) -> Pattern[str] | None:
    return None if pattern is None else _pattern(pattern)


@attrs.frozen(kw_only=True)
class Layout:
    """One layout.

    Attributes:
        mark: A pattern that identifies the layout.
        tax_included: Whether the amounts of line items include the tax.
    """

    document_type: Literal["invoice", "receipt"]
    mark: Pattern[str] = attrs.field(converter=_pattern)
    vendor: Pattern[str] = attrs.field(converter=_pattern, default=r"\A\s*(?P<value>\S.*?)\s*$")
    number: Pattern[str] = attrs.field(converter=_pattern)
    date: Pattern[str] = attrs.field(converter=_pattern)
    due: Pattern[str] | None = attrs.field(converter=_optional, default=None)
    currency: Pattern[str] = attrs.field(converter=_pattern)
    item: Pattern[str] = attrs.field(converter=_pattern)
    subtotal: Pattern[str] | None = attrs.field(converter=_optional, default=None)
    tax: Pattern[str] = attrs.field(converter=_pattern)
    total: Pattern[str] = attrs.field(converter=_pattern)
    decimal_comma: bool = False
    tax_included: bool = False


ENGLISH_INVOICE = Layout(
    document_type="invoice",
    mark=r"^\s*I N V O I C E$",
    number=r"^Invoice no\. +(?P<value>\S+)",
    date=r" Date +(?P<value>.+)$",
    due=r" Due +(?P<value>.+)$",
    currency=r"Total due +(?P<value>[A-Z]{3})",
    item=r"^ *(?P<quantity>\d+)  +(?P<description>\S.*?)  +(?P<price><n.n>) +(?P<amount><n.n>)$",
    subtotal=r"Subtotal +[A-Z]{3} +(?P<value><n.n>)$",
    tax=r"VAT (?P<rate>[\d.]+)% +[A-Z]{3} +(?P<value><n.n>)$",
    total=r"Total due +[A-Z]{3} +(?P<value><n.n>)$",
)

AMERICAN_INVOICE = Layout(
    document_type="invoice",
    mark=r"\AINVOICE$",
    vendor=r"^From: +(?P<value>.+)$",
    number=r"^Invoice number: +(?P<value>\S+)",
    date=r"^Invoice date: +(?P<value>.+)$",
    due=r"^Due date: +(?P<value>.+)$",
    currency=r"^Currency: +(?P<value>[A-Z]{3})",
    item=r"^\* (?P<description>.+)\n +(?P<quantity>[\d,]+) x (?P<price><n.n>) \.+ (?P<amount><n.n>)$",
    subtotal=r"^Subtotal \.+ (?P<value><n.n>)$",
    tax=r"^Sales tax \((?P<rate>[\d.]+)%\) \.+ (?P<value><n.n>)$",
    total=r"^Amount due \.+ (?P<value><n.n>)$",
)

GERMAN_INVOICE = Layout(
    document_type="invoice",
    mark=r"^Rechnung Nr\.",
    number=r"^Rechnung Nr\. (?P<value>\S+)",
    date=r"^Rechnung Nr\. .*, (?P<value>[\d.]+)$",
    due=r"^Zahlbar .* bis zum (?P<value>\d+\.\d+\.\d+)",
    currency=r"Rechnungsbetrag +(?P<value>[A-Z]{3})",
    item=r"^ *\d+  +(?P<description>\S.*?)  +(?P<quantity>[\d,]+)  \S+ +(?P<price><n,n>) +(?P<amount><n,n>)$",
    subtotal=r"Nettobetrag +[A-Z]{3} +(?P<value><n,n>)$",
    tax=r"zzgl\. (?P<rate>[\d,]+) % MwSt\. +[A-Z]{3} +(?P<value><n,n>)$",
    total=r"Rechnungsbetrag +[A-Z]{3} +(?P<value><n,n>)$",
    decimal_comma=True,
)

FRENCH_INVOICE = Layout(
    document_type="invoice",
    mark=r"^\s*FACTURE N°",
    vendor=r"\A(?P<value>.+?)(?: — .*)?$",
    number=r"FACTURE N° (?P<value>\S+)",
    date=r"\sDate\s*: (?P<value>.+)$",
    due=r"Échéance\s*: (?P<value>.+)$",
    currency=r"Total TTC .*(?P<value>€)$",
    item=r"^(?P<description>\S.*?)  +(?P<quantity>\d+) +(?P<price><n,n>)\s€ +(?P<amount><n,n>)\s€$",
    subtotal=r"Total HT +(?P<value><n,n>)",
    tax=r"TVA (?P<rate>[\d,]+)\s% +(?P<value><n,n>)",
    total=r"Total TTC +(?P<value><n,n>)",
    decimal_comma=True,
)

ENGLISH_RECEIPT = Layout(
    document_type="receipt",
    mark=r"^Receipt \d+",
    number=r"^Receipt (?P<value>\d+)",
    date=r"^Receipt \d+ +(?P<value>\S+)",
    currency=r"^TOTAL +(?P<value>[A-Z]{3})",
    item=r"^(?P<quantity>\d+)  (?P<description>\S.*?)  +(?P<amount><n.n>)$",
    tax=r"^of which VAT (?P<rate>[\d.]+)% +[A-Z]{3} +(?P<value><n.n>)$",
    total=r"^TOTAL +[A-Z]{3} +(?P<value><n.n>)$",
    tax_included=True,
)

SWISS_RECEIPT = Layout(
    document_type="receipt",
    mark=r"^Beleg-Nr\.",
    number=r"^Beleg-Nr\. (?P<value>\S+)",
    date=r"^Datum (?P<value>\S+)",
    currency=r"^SUMME (?P<value>[A-Z]{3})",
    item=r"^(?P<description>\S.*)\n +(?P<quantity>\d+) x +(?P<price><n.n>) +(?P<amount><n.n>)$",
    tax=r"^inkl\. (?P<rate>[\d.]+) % MWST +(?P<value><n.n>)$",
    total=r"^SUMME [A-Z]{3} +(?P<value><n.n>)$",
    tax_included=True,
)

LAYOUTS = (ENGLISH_INVOICE, AMERICAN_INVOICE, GERMAN_INVOICE, FRENCH_INVOICE, ENGLISH_RECEIPT, SWISS_RECEIPT)
