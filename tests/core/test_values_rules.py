"""The named rules of normalisation; each holds strictly and leniently alike."""

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
    """Normalise strictly, and see that the lenient walk agrees and replaces nothing."""
    replaced: list[str] = []
    strict = normalise(value)
    assert some.same(normalise(value, lenient=True, replaced=replaced), strict)
    assert replaced == []
    return strict


@given(some.json_values)
def test_a_value_of_the_domain_comes_back_equal_with_its_exact_types(value: Any) -> None:
    """Normalising a value that fits returns an equal one, of the same types and in the same order."""
    assert some.same(normal(value), value)


@given(some.convertibles)
def test_the_result_shares_no_container_with_the_value(value: Any) -> None:
    """The result is a copy: none of its lists and dicts is one of the caller's."""
    assert not some.containers_of(normal(value)) & some.containers_of(value)


@given(some.convertibles)
def test_normalising_twice_is_normalising_once(value: Any) -> None:
    """A normalised value is inside the domain, and normalising it again returns it."""
    once = normal(value)
    assert some.outside(once) is None
    assert some.same(normal(once), once)


@given(some.convertibles)
def test_a_normalised_value_survives_json(value: Any) -> None:
    """What is normalised comes back from strict JSON text as it was."""
    once = normal(value)
    assert some.same(json.loads(json.dumps(once, allow_nan=False)), once)


@given(st.uuids())
def test_a_uuid_becomes_its_text(value: uuid.UUID) -> None:
    """A UUID becomes the str from which it can be made again."""
    text = normal(value)
    assert type(text) is str
    assert uuid.UUID(text) == value
    assert len(text) == 36


@given(some.datetimes)
def test_a_datetime_becomes_rfc_3339_with_t(value: datetime.datetime) -> None:
    """A datetime becomes text with `T`, its offset where it has one, and nothing lost."""
    text = normal(value)
    assert RFC_3339.match(text)
    assert datetime.datetime.fromisoformat(text) == value
    assert (datetime.datetime.fromisoformat(text).tzinfo is None) == (value.tzinfo is None)


@given(st.dates(), st.times())
def test_a_date_or_time_becomes_its_part_of_rfc_3339(date: datetime.date, time: datetime.time) -> None:
    """A date becomes yyyy-mm-dd, a time hh:mm:ss with its fraction, each readable again."""
    assert datetime.date.fromisoformat(normal(date)) == date
    assert re.match(r"\d{4}-\d\d-\d\d\Z", normal(date))
    assert datetime.time.fromisoformat(normal(time)) == time
    assert re.match(r"\d\d:\d\d:\d\d(\.\d{6})?\Z", normal(time))


@given(some.decimals)
def test_a_decimal_becomes_its_text(value: decimal.Decimal) -> None:
    """A Decimal becomes str, every digit and its exponent kept; special values too."""
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
def test_an_enum_becomes_its_value(member: object, expected: object) -> None:
    """An Enum member, of str, of int or of neither, becomes its value, which the other rules then convert."""
    assert some.same(normal(member), expected)


@given(st.lists(some.json_values, max_size=4))
def test_a_tuple_becomes_a_list(items: list[Any]) -> None:
    """A tuple becomes a list of its members in order."""
    assert some.same(normal(tuple(items)), items)


@given(some.json_values, some.json_values)
def test_a_named_tuple_becomes_a_list(left: Any, right: Any) -> None:
    """A named tuple is a tuple."""
    assert some.same(normal(some.Pair(left, right)), [left, right])
    assert some.same(normal(some.OldPair(left, right)), [left, right])


@given(st.frozensets(some.integers) | st.frozensets(some.texts) | st.frozensets(st.uuids().map(str)))
def test_a_set_becomes_a_sorted_list(items: frozenset[Any]) -> None:
    """A set or frozenset whose members can be compared becomes the list of them in ascending order."""
    assert some.same(normal(items), sorted(items))
    assert some.same(normal(set(items)), sorted(items))


@given(st.lists(st.none() | some.integers | some.texts | st.frozensets(st.integers(0, 3)), unique=True), st.randoms())
def test_a_set_that_cannot_be_sorted_still_has_one_order(items: list[Any], random: Any) -> None:
    """Members that cannot be compared come in an order that does not depend on how the set was built."""
    shuffled = list(items)
    random.shuffle(shuffled)
    assert some.same(normal(set(items)), normal(set(shuffled)))
    assert sorted(map(repr, normal(set(items)))) == sorted(repr(normal(item)) for item in items)


def test_the_order_of_a_set_is_the_same_in_every_process() -> None:
    """Two processes that hash strings differently write the same set alike."""
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
def test_an_integral_float_from_1e16_on_becomes_an_int(value: float) -> None:
    """Where readers would disagree about a float that is whole, the int of the same value is written."""
    assert some.same(normal(value), int(value))
    assert some.same(normal(-value), -int(value))


def test_an_integral_float_below_1e16_stays_a_float() -> None:
    """The rule begins at exactly 1e16, on both sides."""
    below = 9999999999999998.0
    assert some.same(normal([below, -below, 1e16, -1e16]), [below, -below, 10**16, -(10**16)])
    assert some.same(normal(-(2.0**63)), -(2**63))


def test_minus_zero_becomes_zero() -> None:
    """-0.0 becomes 0.0, because not every reader keeps its sign."""
    assert some.outside(normal([-0.0, some.Amount(-0.0)])) is None


@given(st.dictionaries(some.integers, some.json_values, max_size=5))
def test_an_int_key_becomes_its_text(value: dict[int, Any]) -> None:
    """An int key becomes its decimal digits."""
    assert some.same(normal(value), {str(key): item for key, item in value.items()})


@given(some.json_values)
def test_an_enum_key_becomes_its_value(item: Any) -> None:
    """An Enum member as key becomes its value, where that is a str or an int."""
    keyed = {some.Word.YES: item, some.Number.SEVEN: item, some.Colour.PLAIN: item}
    assert some.same(normal(keyed), {"yes": item, "7": item, "red": item})


@given(some.json_values, some.json_values)
def test_an_attrs_or_dataclass_instance_becomes_a_dict(first: Any, second: Any) -> None:
    """A record becomes the dict of its fields, in their order; what they hold is normalised too."""
    expected = {"first": first, "second": second}
    assert some.same(normal(some.Record(first, second)), expected)
    assert some.same(normal(some.Model(first, second)), expected)
    assert some.same(normal(some.Record(some.Model(first, second))), {"first": expected, "second": None})


@given(some.texts, some.integers, some.floats, some.json_arrays, some.json_objects)
def test_a_subclass_of_a_plain_type_becomes_the_plain_type(
    text: str, count: int, amount: float, items: list[Any], members: dict[str, Any]
) -> None:
    """What a subclass holds is written, not what it shows, and the exact plain type comes back."""
    subclasses = [
        some.Text(text),
        some.Count(count),
        some.Amount(amount),
        some.Rows(items),
        some.Row(members),
        {some.Text(text): some.Count(count)},
    ]
    assert some.same(normal(subclasses), [text, count, amount, items, members, {text: count}])
