"""The rules of normalisation, which are the same in the strict and the lenient mode."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import re
import subprocess
import sys
import uuid
from typing import Any

import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import normalise

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?([+-]\d\d:\d\d)?\Z")


def normal(value: object) -> Any:
    """Normalise strictly, and check that lenient returns the same without a replacement."""
    replaced: list[str] = []
    strict = normalise(value)
    assert some.same(normalise(value, lenient=True, replaced=replaced), strict)
    assert replaced == []
    return strict


@given(some.json_values)
def test_valid_value_is_returned_equal(value: Any) -> None:
    """A valid value is returned equal, with the same types and in the same order."""
    assert some.same(normal(value), value)


@given(some.convertibles)
def test_result_shares_no_container_with_the_value(value: Any) -> None:
    """The result is a copy without any list or dict of the caller."""
    assert not some.containers_of(normal(value)) & some.containers_of(value)


@given(some.convertibles)
def test_normalisation_is_idempotent(value: Any) -> None:
    """A normalised value is valid, and normalising it again returns it."""
    once = normal(value)
    assert some.outside(once) is None
    assert some.same(normal(once), once)


@given(some.convertibles)
def test_normalised_value_round_trips_through_json(value: Any) -> None:
    """A normalised value is the same after encoding to and decoding from strict JSON."""
    once = normal(value)
    assert some.same(json.loads(json.dumps(once, allow_nan=False)), once)


@given(st.uuids())
def test_uuid_becomes_its_text(value: uuid.UUID) -> None:
    """A UUID becomes the str from which it can be created again."""
    text = normal(value)
    assert type(text) is str
    assert uuid.UUID(text) == value
    assert len(text) == 36


@given(some.datetimes)
def test_datetime_becomes_rfc_3339_with_t(value: datetime.datetime) -> None:
    """A datetime becomes text with `T`, and keeps its offset and its precision."""
    text = normal(value)
    assert RFC_3339.match(text)
    assert datetime.datetime.fromisoformat(text) == value
    assert (datetime.datetime.fromisoformat(text).tzinfo is None) == (value.tzinfo is None)


@given(st.dates(), st.times())
def test_date_or_time_becomes_rfc_3339(date: datetime.date, time: datetime.time) -> None:
    """A date becomes yyyy-mm-dd, and a time hh:mm:ss with its fraction; both can be parsed again."""
    assert datetime.date.fromisoformat(normal(date)) == date
    assert re.match(r"\d{4}-\d\d-\d\d\Z", normal(date))
    assert datetime.time.fromisoformat(normal(time)) == time
    assert re.match(r"\d\d:\d\d:\d\d(\.\d{6})?\Z", normal(time))


@given(some.decimals)
def test_decimal_becomes_its_text(value: decimal.Decimal) -> None:
    """A Decimal becomes str with every digit and its exponent, also for special values."""
    text = normal(value)
    assert type(text) is str
    assert decimal.Decimal(text).compare_total(value) == 0


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (some.Colour.PLAIN, "red"),
        (some.Colour.TUPLE, [1, "two"]),
        (some.Colour.UUID, "00000000-0000-0000-0000-000000000007"),
        (some.Word.YES, "yes"),
        (some.Number.SEVEN, 7),
    ],
)
def test_enum_becomes_its_value(member: object, expected: object) -> None:
    """An Enum member becomes its value, which the other rules then convert."""
    assert some.same(normal(member), expected)


@given(st.lists(some.json_values, max_size=4))
def test_tuple_becomes_a_list(items: list[Any]) -> None:
    """A tuple becomes a list of its members in order."""
    assert some.same(normal(tuple(items)), items)


@given(some.json_values, some.json_values)
def test_named_tuple_becomes_a_list(left: Any, right: Any) -> None:
    """A named tuple becomes a list like any tuple."""
    assert some.same(normal(some.Pair(left, right)), [left, right])
    assert some.same(normal(some.OldPair(left, right)), [left, right])


@given(st.frozensets(some.integers) | st.frozensets(some.texts) | st.frozensets(st.uuids().map(str)))
def test_set_becomes_a_sorted_list(items: frozenset[Any]) -> None:
    """A set or frozenset of comparable members becomes a list in ascending order."""
    assert some.same(normal(items), sorted(items))
    assert some.same(normal(set(items)), sorted(items))


@given(st.lists(st.none() | some.integers | some.texts | st.frozensets(st.integers(0, 3)), unique=True), st.randoms())
def test_unsortable_set_has_a_stable_order(items: list[Any], random: Any) -> None:
    """Members that cannot be compared have an order that does not depend on how the set was built."""
    shuffled = list(items)
    random.shuffle(shuffled)
    assert some.same(normal(set(items)), normal(set(shuffled)))
    assert sorted(map(repr, normal(set(items)))) == sorted(repr(normal(item)) for item in items)


def test_order_of_a_set_is_independent_of_hashing() -> None:
    """Two processes with different string hashing write a set in the same order."""
    script = (
        "import datetime, json, unstract_core; "
        "mixed = {1, 'b', 'a', None, (2, 'c'), ('d',), frozenset({'e', 'f', 3}), datetime.date(2026, 1, 2)}; "
        "print(json.dumps(unstract_core.normalise(mixed)))"
    )
    written = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(written) == 1
    assert len(json.loads(written.pop())) == 8


@given(st.integers(10**16, 2**63 - 2**10).map(float))
def test_integral_float_from_1e16_becomes_an_int(value: float) -> None:
    """An integral float that readers would interpret differently is written as an int."""
    assert some.same(normal(value), int(value))
    assert some.same(normal(-value), -int(value))


def test_integral_float_below_1e16_stays_a_float() -> None:
    """The rule begins at exactly 1e16, for both signs."""
    below = 9999999999999998.0
    assert some.same(normal([below, -below, 1e16, -1e16]), [below, -below, 10**16, -(10**16)])
    assert some.same(normal(-(2.0**63)), -(2**63))


def test_minus_zero_becomes_zero() -> None:
    """-0.0 becomes 0.0, because not every reader keeps its sign."""
    assert some.outside(normal([-0.0, some.Amount(-0.0)])) is None


@given(st.dictionaries(some.integers, some.json_values, max_size=5))
def test_int_key_becomes_its_text(value: dict[int, Any]) -> None:
    """An int key becomes its decimal digits."""
    assert some.same(normal(value), {str(key): item for key, item in value.items()})


@given(some.json_values)
def test_enum_key_becomes_its_value(item: Any) -> None:
    """An Enum key becomes its value if that is a str or an int."""
    keyed = {some.Word.YES: item, some.Number.SEVEN: item, some.Colour.PLAIN: item}
    assert some.same(normal(keyed), {"yes": item, "7": item, "red": item})


@given(some.json_values, some.json_values)
def test_attrs_or_dataclass_instance_becomes_a_dict(first: Any, second: Any) -> None:
    """A record becomes a dict of its fields in order, with normalised values."""
    expected = {"first": first, "second": second}
    assert some.same(normal(some.Record(first, second)), expected)
    assert some.same(normal(some.Model(first, second)), expected)
    assert some.same(normal(some.Record(some.Model(first, second))), {"first": expected, "second": None})


@given(some.texts, some.integers, some.floats, some.json_arrays, some.json_objects)
def test_subclass_of_a_plain_type_becomes_plain(
    text: str, count: int, amount: float, items: list[Any], members: dict[str, Any]
) -> None:
    """The value of a subclass instance is written as exactly the plain type."""
    subclasses = [
        some.Text(text),
        some.Count(count),
        some.Amount(amount),
        some.Rows(items),
        some.Row(members),
        {some.Text(text): some.Count(count)},
    ]
    assert some.same(normal(subclasses), [text, count, amount, items, members, {text: count}])
