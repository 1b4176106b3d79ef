"""Strict normalisation: an invalid value is rejected with its path."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import PayloadError, normalise
from unstract_core.values.limits import MAX_DEPTH, MAX_SIZE

HUGE = 300 * 1024 * 1024


def refusal(value: object, *, path: str = "$") -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        normalise(value, path=path)
    return caught.value


@given(some.anything)
def test_strict_returns_a_valid_value_or_raises(value: Any) -> None:
    """Any value becomes a valid value, or raises PayloadError with a path below the root."""
    normal = some.attempt(normalise, value)
    if isinstance(normal, PayloadError):
        assert normal.path.startswith("$")
        assert str(normal).startswith(f"{normal.path}: ")
    else:
        assert some.outside(normal) is None


@given(some.burying(some.unfit_scalars))
def test_error_has_the_exact_path(found: some.Planted) -> None:
    """One invalid value among valid ones is named by its JSON path."""
    assert refusal(found.whole).path == found.path


@given(some.burying(some.unfit_scalars))
def test_error_path_begins_with_the_given_path(found: some.Planted) -> None:
    """The caller's path is the root of the error's path."""
    assert refusal(found.whole, path="$.on_success.kwargs").path == "$.on_success.kwargs" + found.path[1:]


@given(some.burying(st.sampled_from(some.UNFIT_KEYS).map(lambda key: {"innocent": 1, key: 2, "other": 3})))
def test_invalid_key_is_rejected_under_its_dict(found: some.Planted) -> None:
    """A key that is not a valid str or int is rejected with its dict's path, never a sibling's."""
    path = refusal(found.whole).path
    assert path.startswith(found.path)
    assert "innocent" not in path


@given(some.burying(some.integers.map(lambda number: {"innocent": 0, number: 1, str(number): 2})))
def test_colliding_keys_are_rejected(found: some.Planted) -> None:
    """Two keys that become the same string are rejected with the path of their dict or of the second key."""
    path = refusal(found.whole).path
    assert path.startswith(found.path)
    assert "innocent" not in path


@given(some.json_values, some.json_values)
def test_kombu_envelope_is_rejected(kind: Any, value: Any) -> None:
    """A dict of exactly __type__ and __value__ is rejected in either order; one key more or less is accepted."""
    refusal({"__type__": kind, "__value__": value})
    refusal({"__value__": value, "__type__": kind})
    for passing in ({"__type__": kind}, {"__value__": value}, {"__type__": kind, "__value__": value, "x": 1}):
        assert some.same(normalise(passing), passing)


@pytest.mark.parametrize("kind", [list, dict])
def test_64_levels_pass_and_65_do_not(kind: type[Any]) -> None:
    """A value may have at most 64 levels of containers, and the error names the 65th."""
    assert some.same(normalise(some.nest(64, 1, kind)), some.nest(64, 1, kind))
    step = "[0]" if kind is list else ".x"
    assert refusal(some.nest(65, 1, kind)).path == "$" + step * 64
    assert refusal(some.nest(100_000, 1, kind)).path == "$" + step * 64
    assert MAX_DEPTH == 64


@given(st.integers(60, 70), st.lists(st.sampled_from([list, tuple, dict, "record"]), min_size=70, max_size=70))
def test_every_kind_of_container_counts_as_a_level(depth: int, kinds: list[Any]) -> None:
    """Lists, tuples, dicts and records count alike."""
    value: Any = None
    for kind in kinds[:depth]:
        value = some.Record(value) if kind == "record" else {"k": value} if kind is dict else kind([value])
    if depth <= 64:
        assert some.outside(normalise(value)) is None
    else:
        refusal(value)


def test_cycle_is_rejected() -> None:
    """A list, dict or record that contains itself raises PayloadError, not RecursionError."""
    items: list[Any] = []
    items.append(items)
    members: dict[str, Any] = {"fan": [0, 0]}
    members["fan"][:] = [members, members]
    record = some.Record(None)
    record.first = (record,)
    for cyclic in (items, members, record):
        assert "cyclic" in str(refusal(cyclic))


def test_exploding_shared_structure_is_rejected() -> None:
    """60 shared lists that stand for 2^60 elements are rejected by their size, without being written out."""
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with some.size_limit(4_000_000):
        assert "4000000 bytes" in str(refusal(value))


def test_huge_string_is_rejected_without_being_read() -> None:
    """A huge string is rejected by its length, much faster than it could be copied."""
    huge = "x" * HUGE
    used = time.process_time()
    assert refusal({"args": [1, huge]}).path == "$.args[1]"
    assert time.process_time() - used < 1


@pytest.mark.parametrize("character", ["x", "\x7f", "é", "€", "😀"])
def test_size_of_a_string_is_its_utf_8(character: str) -> None:
    """A string of exactly the limit in bytes of UTF-8 passes, and one more byte does not."""
    with some.size_limit(1200):
        fits = character * (1200 // len(character.encode()))
        assert normalise(fits) == fits
        assert "1200 bytes" in str(refusal(fits + "x"))


@given(st.integers(1000, 5000), some.json_values)
def test_accepted_value_is_within_the_limit(limit: int, value: Any) -> None:
    """The size of a value is that of all strings and keys in UTF-8, and 16 bytes for each element."""
    value = [value] * 40
    with some.size_limit(limit):
        normal = some.attempt(normalise, value)
        if isinstance(normal, PayloadError):
            assert "bytes" in str(normal)
        else:
            assert some.outside(normal, max_size=limit) is None


def test_keys_count_towards_the_size() -> None:
    """A dict is rejected for the size of its keys too."""
    assert "bytes" in str(refusal({"k" * (MAX_SIZE + 1): 1}))
    assert "bytes" in str(refusal({"é" * (MAX_SIZE // 2 + 1): 1}))


def test_names_of_special_numbers_are_plain_text() -> None:
    """The texts "NaN" and "Infinity" are valid strings."""
    assert normalise([repr(math.nan), "Infinity"]) == ["nan", "Infinity"]


def test_generator_is_rejected_unconsumed() -> None:
    """A generator is rejected and not run."""
    numbers = (number for number in range(3))
    refusal(numbers)
    assert list(numbers) == [0, 1, 2]


def test_nearly_exhausted_stack_raises_payload_error() -> None:
    """Strict normalisation raises only PayloadError, also on a nearly exhausted stack."""

    def dig(levels: int) -> None:
        if levels:
            dig(levels - 1)
        else:
            normalise(some.nest(60, {"x": 1}))

    def outcome(levels: int) -> str | None:
        try:
            return str(some.attempt(dig, levels))
        except RecursionError:
            return None

    refused = [text for levels in range(sys.getrecursionlimit()) if (text := outcome(levels)) not in (None, "None")]
    assert refused
    assert all("stack" in str(text) for text in refused)
