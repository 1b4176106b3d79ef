"""The texts in `argsrepr` and `kwargsrepr` equal Celery's, for every value of the wire."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import strategies as some
from celery.utils.saferepr import saferepr as celerys
from hypothesis import example, given
from hypothesis import strategies as st

from transports.celery.saferepr import saferepr

AWKWARD = "ab '\"\\\n\t\x1b\x85\u2028é\u0301漢😀,:{}[]()."
REQUEST = {
    "request": {
        "document_id": "3a7d32de-0c4e-4a57-9f5e-6a2f0f3c9b11",
        "operation": "ide_index",
        "executor_params": {"outputs": [{"name": "total", "required": True}], "retries": 3, "temperature": 0.1},
    },
    "note": "it's the 1st of 7",
    "parent": None,
}

awkward_texts = st.text(st.sampled_from(AWKWARD), max_size=30)
long_texts = st.builds(lambda text, times: text * times, awkward_texts, st.integers(1, 200))
leaves = some.scalars | awkward_texts | long_texts


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(some.keys | awkward_texts, inner, max_size=4),
        st.builds(lambda item, times: [item] * times, inner, st.integers(0, 60)),
        st.builds(lambda item, times: (item, {"x": item}) * times, inner, st.integers(0, 20)),
        st.builds(lambda item, times: {f"k{n}": item for n in range(times)}, inner, st.integers(0, 60)),
        st.builds(some.nest, st.integers(1, 6), inner, st.sampled_from([list, dict])),
    )


values = st.recursive(leaves, _containers, max_leaves=12)
"""Values of the wire and tuples: long texts, wide and deep containers, repeated objects."""

depths = st.builds(some.nest, st.integers(0, 64), leaves, st.sampled_from([list, dict]))
limits = st.integers(-1, 150) | st.integers(0, 4000) | st.just(1024)
levels = st.sampled_from([3, 0, 1, 2, 4, 64])


def _outermost(value: Any) -> Iterator[Any]:
    yield value
    yield (value,)
    yield [value, value]
    yield {"request": value}


@given(value=values, limit=limits, depth=levels)
@example(value=REQUEST, limit=1024, depth=3)
def test_every_text_equals_celerys(value: Any, limit: int, depth: int) -> None:
    """For every value, limit and number of levels the text equals Celery's."""
    for part in _outermost(value):
        assert saferepr(part, limit, depth) == celerys(part, maxlen=limit, maxlevels=depth)


@given(args=some.json_arrays, kwargs=some.json_objects)
def test_the_default_text_equals_celerys(args: list[Any], kwargs: dict[str, Any]) -> None:
    """With the default limit and levels the text equals the one in Celery's messages."""
    for container in (args, tuple(args), kwargs):
        assert saferepr(container) == celerys(container, 1024, maxlevels=3)


@given(value=some.json_values | values, depth=levels)
@example(value=REQUEST, depth=0)
@example(value=(REQUEST, (), {}, [], ((1,),)), depth=3)
def test_every_limit_cuts_as_celery(value: Any, depth: int) -> None:
    """Each limit within the text, and just beyond its end, cuts it where Celery does."""
    whole = len(celerys(value, maxlen=300, maxlevels=depth))
    for limit in range(whole + 4):
        assert saferepr(value, limit, depth) == celerys(value, maxlen=limit, maxlevels=depth)


@given(value=depths, limit=limits, depth=st.integers(-1, 70))
@example(value=some.nest(64, kind=dict), limit=4000, depth=0)
def test_the_deepest_value_equals_celerys(value: Any, limit: int, depth: int) -> None:
    """A value of 64 nested containers has Celery's text at any number of levels."""
    assert saferepr(value, limit, depth) == celerys(value, maxlen=limit, maxlevels=depth)


@given(texts=st.lists(awkward_texts | long_texts, max_size=6), limit=limits)
def test_strings_are_quoted_and_cut_as_celery(texts: list[str], limit: int) -> None:
    """Keys and values with quotes, backslashes, newlines, spaces and characters beyond the BMP have Celery's text."""
    container = ({text: text for text in texts}, *texts)
    assert saferepr(container, limit) == celerys(container, maxlen=limit)


@given(item=some.scalars, times=st.integers(0, 3000), limit=limits)
def test_wide_containers_break_off_as_celery(item: Any, times: int, limit: int) -> None:
    """Members that do not fit are left out where Celery leaves them out."""
    for container in ([item] * times, {f"k{n}": [item] for n in range(times)}):
        assert saferepr(container, limit) == celerys(container, maxlen=limit)


NAMED = {
    "no_arguments": ((), 1024, 3, "()"),
    "no_keywords": ({}, 1024, 3, "{}"),
    "one_argument": ((1,), 1024, 3, "(1,)"),
    "scalars": ([None, True, -(2**63), 0.1, 1e-300], 1024, 3, "[None, True, -9223372036854775808, 0.1, 1e-300]"),
    "only_single_quotes_are_escaped": (["it's", '"', "\\", "\n", "😀"], 1024, 3, "['it\\'s', '\"', '\\', '\n', '😀']"),
    "below_the_levels_is_a_hint": ({"a": {"b": {"c": {}}}}, 1024, 3, "{'a': {'b': {'c': {...}}}}"),
    "a_hint_of_a_tuple_of_one": ([(1,), (), [1]], 1024, 1, "[(...,), (...), [...]]"),
    "no_levels_are_all": ([[[[[1]]]]], 1024, 0, "[[[[[1]]]]]"),
    "a_text_is_cut_at_its_last_space": (["one two three"], 10, 3, "['one two...']"),
    "a_text_that_just_fills_the_room_is_cut_too": (["abc"], 4, 3, "['abc...']"),
    "a_number_is_cut": ([1234567], 4, 3, "[123...]"),
    "a_text_may_go_over_by_its_quotes": (["abc"], 5, 3, "['abc']"),
    "what_is_left_is_three_dots": ({"a": ["bcd", 2], "e": 4}, 11, 3, "{'a': ['bcd', ...]}"),
    "a_separator_that_was_written_stays": ([1, 2], 4, 3, "[1, , ...]"),
    "what_is_not_opened_is_not_closed": ([1, [2]], 4, 3, "[1, , ...]"),
    "nothing_is_left_after_the_last": ([[1234]], 4, 3, "[[12...]]"),
    "no_room_at_all": ({"a": 1}, 0, 3, ", ..."),
    "a_shared_list_is_no_cycle": ([shared := [1], shared, [shared]], 1024, 3, "[[1], [1], [[1]]]"),
}


@pytest.mark.parametrize(("value", "limit", "depth", "text"), NAMED.values(), ids=NAMED)
def test_a_known_value_has_its_known_text(value: Any, limit: int, depth: int, text: str) -> None:
    """Each rule of the text has an example with Celery's result."""
    assert saferepr(value, limit, depth) == text == celerys(value, maxlen=limit, maxlevels=depth)


def test_nothing_is_read_beyond_the_limit() -> None:
    """The members of a wide dict behind the limit are not read."""

    class Watched(dict[str, int]):
        def items(self) -> Any:
            for number, pair in enumerate(super().items()):
                assert number < 10
                yield pair

    assert saferepr(Watched({f"key {n}": n for n in range(1000)}), 40).endswith(", ...}")


def test_depth_is_not_limited_by_the_stack() -> None:
    """Containers deeper than Python's recursion limit are written while there is room."""
    depth = 3 * sys.getrecursionlimit()
    assert saferepr(some.nest(depth), 10 * depth, 0) == "[" * depth + "None" + "]" * depth
    assert saferepr(some.nest(depth), depth // 2, 0) == "[" * (depth // 2) + ", ..." + "]" * (depth // 2)
