"""Lenient normalisation: a result always becomes a value of the domain, and what was lost on the way is listed."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import strategies as some
from hypothesis import example, given
from hypothesis import strategies as st

from unstract_core import PayloadError, normalise
from unstract_core.values.lenient import MAX_REPLACED
from unstract_core.values.limits import MAX_SIZE

HUGE = 300 * 1024 * 1024


def made_to_fit(value: object, *, path: str = "$") -> tuple[Any, list[str]]:
    """Normalise leniently, and see that the outcome is inside the domain and passes the strict walk unchanged."""
    replaced: list[str] = []
    normal = normalise(value, lenient=True, path=path, replaced=replaced)
    reason = some.outside(normal)
    assert reason is None
    assert some.same(normalise(normal), normal)
    return normal, replaced


@given(some.anything)
def test_lenient_always_returns_a_value_of_the_domain(value: Any) -> None:
    """Whatever a task returns, the outcome is inside the domain, passes strictly, and survives JSON text."""
    normal, _ = made_to_fit(value)
    assert some.same(json.loads(json.dumps(normal, allow_nan=False)), normal)


@given(some.anything)
def test_lenient_replaces_exactly_what_strict_refuses(value: Any) -> None:
    """A value that strict accepts comes out the same with nothing replaced; for any other, something is listed."""
    strict = some.attempt(normalise, value)
    normal, replaced = made_to_fit(value)
    assert bool(replaced) == isinstance(strict, PayloadError)
    assert replaced or some.same(normal, strict)


@given(some.burying(some.unfit_scalars))
def test_each_replacement_is_listed_with_its_path(found: some.Planted) -> None:
    """One value that does not fit is listed once, under its exact path."""
    assert made_to_fit(found.whole)[1] == [found.path]


@given(some.burying(some.unfit_scalars))
def test_replacements_are_listed_below_the_path_that_was_given(found: some.Planted) -> None:
    """The caller's own path is the root of those listed."""
    assert made_to_fit(found.whole, path="$.result")[1] == ["$.result" + found.path[1:]]


@given(st.lists(some.scalars | st.floats(), max_size=6))
def test_nan_and_infinity_become_null(items: list[Any]) -> None:
    """What JSON has no number for becomes null; its siblings stay."""
    lost = [isinstance(item, float) and not math.isfinite(item) for item in items]
    normal, replaced = made_to_fit(items)
    assert [f"$[{index}]" for index, is_lost in enumerate(lost) if is_lost] == [
        path for path in replaced if normal[int(path[2:-1])] is None
    ]
    assert all((item is None) >= is_lost for item, is_lost in zip(normal, lost, strict=True))


@given(some.unfit_texts)
def test_nul_and_lone_surrogates_become_the_replacement_character(text: str) -> None:
    """Each character that no store takes becomes U+FFFD, in values and in keys, and every other one stays."""
    mended = "".join("\ufffd" if char == "\x00" or "\ud800" <= char <= "\udfff" else char for char in text)
    normal, replaced = made_to_fit({"a": text, text: 1})
    assert normal == {"a": mended, mended: 1}
    assert len(replaced) == 2
    assert replaced[0] == "$.a"


@given(st.binary(max_size=30))
def test_bytes_become_base64(data: bytes) -> None:
    """bytes, bytearray and memoryview become base64 text, so that nothing of them is lost."""
    normal, replaced = made_to_fit([data, bytearray(data), memoryview(data)])
    assert [base64.b64decode(text, validate=True) for text in normal] == [data] * 3
    assert replaced == ["$[0]", "$[1]", "$[2]"]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1j, 1e19, object, len, range(2), NotImplemented, int | None])
def test_another_object_becomes_its_repr(value: object) -> None:
    """What no rule knows is described by its repr."""
    assert made_to_fit({"a": value}) == ({"a": repr(value)}, ["$.a"])


def test_a_generator_becomes_its_repr_and_is_not_consumed() -> None:
    """A result that is a generator is described; running it is not this package's business."""
    numbers = (number for number in range(3))
    normal, replaced = made_to_fit(numbers)
    assert "generator" in normal
    assert replaced == ["$"]
    assert list(numbers) == [0, 1, 2]


def test_an_int_too_long_to_be_printed_is_described() -> None:
    """An int of 10,000 digits, which Python refuses to print, costs neither the result nor its siblings."""
    normal, replaced = made_to_fit({"paid": 1, "n": 10**10_000, "m": -(10**10_000)})
    assert normal["paid"] == 1
    assert "int" in normal["n"]
    assert replaced == ["$.n", "$.m"]


@given(st.lists(st.none() | st.booleans() | st.floats() | st.tuples(st.integers()) | some.integers | some.texts))
@example([1, "1", "1~2", 1.0])
@example([math.nan, float("nan"), "nan", "nan~2"])
def test_keys_that_do_not_fit_or_collide_lose_no_member(found: list[Any]) -> None:
    """Every member of a dict survives, in order: unfit keys are written out, and colliding ones are told apart."""
    members = {key: position for position, key in enumerate(found)}
    normal, replaced = made_to_fit(members)
    assert list(normal.values()) == list(members.values())
    kept = [key for key in members if type(key) in (str, int)]
    assert len(replaced) >= len(members) - len(kept)
    if len({str(key) for key in members}) == len(members):
        assert set(map(str, kept)) <= set(normal)
        assert len(replaced) == len(members) - len(kept)


@given(some.burying(st.sampled_from(some.UNFIT_KEYS).map(lambda key: {"innocent": 1, key: 2, "other": 3})))
def test_a_replaced_key_is_listed_under_its_own_dict(found: some.Planted) -> None:
    """The path listed for a key is its dict's or its own, never an innocent sibling's."""
    (path,) = made_to_fit(found.whole)[1]
    assert path.startswith(found.path)
    assert "innocent" not in path


@given(some.json_values, some.json_values)
def test_an_envelope_of_kombu_is_opened(kind: Any, value: Any) -> None:
    """A dict of exactly __type__ and __value__ keeps both, and gets company, so that kombu leaves it alone."""
    normal, replaced = made_to_fit([{"__type__": kind, "__value__": value}])
    assert len(normal[0]) > 2
    assert some.same(normal[0]["__type__"], kind)
    assert some.same(normal[0]["__value__"], value)
    assert replaced == ["$[0]"]


@given(st.integers(65, 200), st.sampled_from([list, dict]))
def test_what_is_too_deep_becomes_a_marked_stub(depth: int, kind: type[Any]) -> None:
    """64 levels are kept; the 65th is a text that says so."""
    normal, replaced = made_to_fit(some.nest(depth, 1, kind))
    assert replaced == ["$" + ("[0]" if kind is list else ".x") * 64]
    for _ in range(64):
        (normal,) = normal if kind is list else normal.values()
    assert "deeper than 64" in normal
    assert normal.startswith("<unstract-wire: ")


def test_a_cycle_becomes_64_levels_and_a_stub() -> None:
    """A value that holds itself is written as deep as the wire goes."""
    items: list[Any] = [1]
    items.append(items)
    normal, replaced = made_to_fit(items)
    assert normal[0] == normal[1][0] == 1
    assert replaced == ["$" + "[1]" * 64]


def test_a_shared_structure_that_would_explode_is_cut_off() -> None:
    """A graph of 60 lists that stands for 2^60 elements is written up to the limit, in seconds."""
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with some.size_limit(100_000):
        reason = some.outside(normalise(value, lenient=True), max_size=100_000)
    assert reason is None


def test_a_string_of_300_mb_becomes_a_stub_and_its_siblings_survive() -> None:
    """What is too large alone is replaced alone: what stands beside it, before and after, is kept."""
    huge = "x" * HUGE
    used = time.process_time()
    normal, replaced = made_to_fit({"before": [1], "text": huge, "rows": [huge, 2], "after": {"paid": True}})
    assert time.process_time() - used < 5
    assert normal["before"] == [1]
    assert normal["after"] == {"paid": True}
    assert normal["rows"][1] == 2
    assert normal["text"].startswith("<unstract-wire: str")
    assert replaced == ["$.text", "$.rows[0]"]


def test_a_key_of_300_mb_costs_its_siblings_nothing() -> None:
    """A dict whose key is too large keeps its other members and comes out inside the domain."""
    normal, replaced = made_to_fit({"before": 1, "x" * HUGE: 2, "after": 3})
    assert normal["before"] == 1
    assert normal["after"] == 3
    assert replaced


_PIECES: dict[str, Callable[[int], Any]] = {
    "x": lambda count: "x" * count,
    "é": lambda count: "é" * count,
    "NUL": lambda count: "\x00" * count,
    "surrogates": lambda count: "\ud800" * count,
    "bytes": bytes,
    "nulls": lambda count: [None] * count,
    "texts too large": lambda count: ["x" * 150_000] * (count // 40),
    "lists too deep": lambda count: [some.nest(70)] * (count // 40),
    "envelopes": lambda count: [{"__type__": 1, "__value__": 1}] * (count // 40),
    "colliding keys": lambda count: [{1: 1, "1": 2}] * (count // 40),
    "keys too large": lambda count: {"x" * count: 1, "y" * count: 2},
}
_large = st.recursive(
    st.tuples(st.sampled_from(list(_PIECES)), st.integers(0, 110_000)), lambda inner: st.lists(inner, max_size=4)
)


def _built(recipe: Any) -> Any:
    return [_built(part) for part in recipe] if isinstance(recipe, list) else _PIECES[recipe[0]](recipe[1])


@given(_large)
@example(("texts too large", 80_000))
@example(("lists too deep", 80_000))
@example(("NUL", 70_000))
@example([("x", 99_968), ("x", 10)])
def test_what_lenient_lets_through_is_never_too_large_for_strict(recipe: Any) -> None:
    """The outcome is within the limit, stubs and replacement characters included: it will be normalised strictly."""
    with some.size_limit(100_000):
        normal = normalise(_built(recipe), lenient=True)
        reason = some.outside(normal, max_size=100_000)
        assert reason is None
        normalise(normal)


def test_a_text_both_unfit_and_too_large_is_listed_once() -> None:
    """One value is one replacement, whatever is wrong with it."""
    replaced: list[str] = []
    with some.size_limit(100_000):
        normalise({"text": "\x00" * 200_000, "\x00" * 200_000: 1}, lenient=True, replaced=replaced)
    assert len(replaced) == 2


def test_what_follows_a_value_too_large_is_cut_with_a_mark() -> None:
    """A list with too many elements keeps its head, and ends in a stub that says so."""
    with some.size_limit(100_000):
        replaced: list[str] = []
        normal: Any = normalise({"head": 1, "rows": list(range(20_000))}, lenient=True, replaced=replaced)
    assert normal["head"] == 1
    assert normal["rows"][:100] == list(range(100))
    assert normal["rows"][-1].startswith("<unstract-wire: ")
    assert replaced


def test_thousands_of_colliding_keys_are_told_apart_at_once() -> None:
    """Telling colliding keys apart takes time in proportion to their number."""
    value = {float("nan"): position for position in range(5_000)}
    used = time.process_time()
    normal, _ = made_to_fit(value)
    assert time.process_time() - used < 1
    assert list(normal.values()) == list(range(5_000))


def test_the_list_of_replacements_is_optional() -> None:
    """Without a list to fill, lenient normalisation works as well."""
    assert normalise([math.nan, "\x00", MAX_SIZE], lenient=True) == [None, "\ufffd", MAX_SIZE]


def test_the_list_of_what_was_replaced_is_bounded() -> None:
    """Of a great many replacements the first MAX_REPLACED are listed; every one of them is made."""
    normal, replaced = made_to_fit([math.nan, "\x00"] * MAX_REPLACED)
    assert normal == [None, "\ufffd"] * MAX_REPLACED
    assert replaced == [f"$[{index}]" for index in range(MAX_REPLACED)]


def test_bytes_that_are_too_large_are_listed_once_as_what_they_are() -> None:
    """The stub names the bytes, not the base64 that they would have become."""
    with some.size_limit(50_000):
        normal, replaced = made_to_fit({"a": b"x" * 60_000})
    assert replaced == ["$.a"]
    assert normal["a"].startswith("<unstract-wire: bytes ")
