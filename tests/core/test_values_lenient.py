"""Lenient normalisation: any result becomes a valid value, and each replacement is listed."""

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
    """Normalise leniently, and check that the result is valid and that strict returns it unchanged."""
    replaced: list[str] = []
    normal = normalise(value, lenient=True, path=path, replaced=replaced)
    reason = some.outside(normal)
    assert reason is None
    assert some.same(normalise(normal), normal)
    return normal, replaced


@given(some.anything)
def test_lenient_always_returns_a_valid_value(value: Any) -> None:
    """Any result of a task becomes a value that is valid, passes the strict mode, and round-trips through JSON."""
    normal, _ = made_to_fit(value)
    assert some.same(json.loads(json.dumps(normal, allow_nan=False)), normal)


@given(some.anything)
def test_lenient_replaces_only_what_strict_rejects(value: Any) -> None:
    """A value that strict accepts is returned without replacements; any other value has at least one."""
    strict = some.attempt(normalise, value)
    normal, replaced = made_to_fit(value)
    assert bool(replaced) == isinstance(strict, PayloadError)
    assert replaced or some.same(normal, strict)


@given(some.burying(some.unfit_scalars))
def test_each_replacement_is_listed_with_its_path(found: some.Planted) -> None:
    """One invalid value is listed once, with its exact path."""
    assert made_to_fit(found.whole)[1] == [found.path]


@given(some.burying(some.unfit_scalars))
def test_listed_paths_begin_with_the_given_path(found: some.Planted) -> None:
    """The caller's path is the root of the listed paths."""
    assert made_to_fit(found.whole, path="$.result")[1] == ["$.result" + found.path[1:]]


@given(st.lists(some.scalars | st.floats(), max_size=6))
def test_nan_and_infinity_become_null(items: list[Any]) -> None:
    """Numbers that JSON cannot represent become null, and their siblings are kept."""
    lost = [isinstance(item, float) and not math.isfinite(item) for item in items]
    normal, replaced = made_to_fit(items)
    assert [f"$[{index}]" for index, is_lost in enumerate(lost) if is_lost] == [
        path for path in replaced if normal[int(path[2:-1])] is None
    ]
    assert all((item is None) >= is_lost for item, is_lost in zip(normal, lost, strict=True))


@given(some.unfit_texts)
def test_nul_and_surrogates_become_the_replacement_character(text: str) -> None:
    """Each NUL and lone surrogate becomes U+FFFD, in values and in keys, and every other character is kept."""
    mended = "".join("\ufffd" if char == "\x00" or "\ud800" <= char <= "\udfff" else char for char in text)
    normal, replaced = made_to_fit({"a": text, text: 1})
    assert normal == {"a": mended, mended: 1}
    assert len(replaced) == 2
    assert replaced[0] == "$.a"


@given(st.binary(max_size=30))
def test_bytes_become_base64(data: bytes) -> None:
    """bytes, bytearray and memoryview become base64 text."""
    normal, replaced = made_to_fit([data, bytearray(data), memoryview(data)])
    assert [base64.b64decode(text, validate=True) for text in normal] == [data] * 3
    assert replaced == ["$[0]", "$[1]", "$[2]"]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1j, 1e19, object, len, range(2), NotImplemented, int | None])
def test_other_object_becomes_its_repr(value: object) -> None:
    """An object without a rule becomes its repr."""
    assert made_to_fit({"a": value}) == ({"a": repr(value)}, ["$.a"])


def test_generator_becomes_its_repr_unconsumed() -> None:
    """A generator becomes its repr and is not run."""
    numbers = (number for number in range(3))
    normal, replaced = made_to_fit(numbers)
    assert "generator" in normal
    assert replaced == ["$"]
    assert list(numbers) == [0, 1, 2]


def test_unprintable_int_is_replaced() -> None:
    """An int of 10,000 digits, which Python does not print, loses neither the result nor its siblings."""
    normal, replaced = made_to_fit({"paid": 1, "n": 10**10_000, "m": -(10**10_000)})
    assert normal["paid"] == 1
    assert "int" in normal["n"]
    assert replaced == ["$.n", "$.m"]


@given(st.lists(st.none() | st.booleans() | st.floats() | st.tuples(st.integers()) | some.integers | some.texts))
@example([1, "1", "1~2", 1.0])
@example([math.nan, float("nan"), "nan", "nan~2"])
def test_invalid_or_colliding_keys_keep_every_member(found: list[Any]) -> None:
    """Every member of a dict is kept in order: invalid keys are replaced, and equal keys get a suffix."""
    members = {key: position for position, key in enumerate(found)}
    normal, replaced = made_to_fit(members)
    assert list(normal.values()) == list(members.values())
    kept = [key for key in members if type(key) in (str, int)]
    assert len(replaced) >= len(members) - len(kept)
    if len({str(key) for key in members}) == len(members):
        assert set(map(str, kept)) <= set(normal)
        assert len(replaced) == len(members) - len(kept)


@given(some.burying(st.sampled_from(some.UNFIT_KEYS).map(lambda key: {"innocent": 1, key: 2, "other": 3})))
def test_replaced_key_is_listed_under_its_dict(found: some.Planted) -> None:
    """The path of a replaced key is that of its dict or its own, never a sibling's."""
    (path,) = made_to_fit(found.whole)[1]
    assert path.startswith(found.path)
    assert "innocent" not in path


@given(some.json_values, some.json_values)
def test_kombu_envelope_gets_another_key(kind: Any, value: Any) -> None:
    """A dict of exactly __type__ and __value__ gets a third key, so that kombu does not decode it."""
    normal, replaced = made_to_fit([{"__type__": kind, "__value__": value}])
    assert len(normal[0]) > 2
    assert some.same(normal[0]["__type__"], kind)
    assert some.same(normal[0]["__value__"], value)
    assert replaced == ["$[0]"]


@given(st.integers(65, 200), st.sampled_from([list, dict]))
def test_deep_value_becomes_a_marked_stub(depth: int, kind: type[Any]) -> None:
    """64 levels are kept, and the 65th is a marked text."""
    normal, replaced = made_to_fit(some.nest(depth, 1, kind))
    assert replaced == ["$" + ("[0]" if kind is list else ".x") * 64]
    for _ in range(64):
        (normal,) = normal if kind is list else normal.values()
    assert "deeper than 64" in normal
    assert normal.startswith("<unstract-wire: ")


def test_cycle_becomes_64_levels_and_a_stub() -> None:
    """A value that contains itself is written to the depth limit."""
    items: list[Any] = [1]
    items.append(items)
    normal, replaced = made_to_fit(items)
    assert normal[0] == normal[1][0] == 1
    assert replaced == ["$" + "[1]" * 64]


def test_exploding_shared_structure_is_cut() -> None:
    """60 shared lists that stand for 2^60 elements are written up to the limit within seconds."""
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with some.size_limit(100_000):
        reason = some.outside(normalise(value, lenient=True), max_size=100_000)
    assert reason is None


def test_huge_string_becomes_a_stub() -> None:
    """Only a string of 300 MB is replaced, and the values before and after it are kept."""
    huge = "x" * HUGE
    used = time.process_time()
    normal, replaced = made_to_fit({"before": [1], "text": huge, "rows": [huge, 2], "after": {"paid": True}})
    assert time.process_time() - used < 5
    assert normal["before"] == [1]
    assert normal["after"] == {"paid": True}
    assert normal["rows"][1] == 2
    assert normal["text"].startswith("<unstract-wire: str")
    assert replaced == ["$.text", "$.rows[0]"]


def test_huge_key_leaves_its_siblings_unchanged() -> None:
    """A dict with a key of 300 MB keeps its other members and becomes valid."""
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
def test_lenient_result_is_within_the_strict_limit(recipe: Any) -> None:
    """The result, with stubs and replacement characters, passes the strict mode's size limit."""
    with some.size_limit(100_000):
        normal = normalise(_built(recipe), lenient=True)
        reason = some.outside(normal, max_size=100_000)
        assert reason is None
        normalise(normal)


def test_invalid_and_large_text_is_listed_once() -> None:
    """One value is one replacement, even for two reasons."""
    replaced: list[str] = []
    with some.size_limit(100_000):
        normalise({"text": "\x00" * 200_000, "\x00" * 200_000: 1}, lenient=True, replaced=replaced)
    assert len(replaced) == 2


def test_list_over_the_limit_ends_with_a_stub() -> None:
    """A list with too many elements keeps its beginning, and ends with a stub."""
    with some.size_limit(100_000):
        replaced: list[str] = []
        normal: Any = normalise({"head": 1, "rows": list(range(20_000))}, lenient=True, replaced=replaced)
    assert normal["head"] == 1
    assert normal["rows"][:100] == list(range(100))
    assert normal["rows"][-1].startswith("<unstract-wire: ")
    assert replaced


def test_colliding_keys_take_linear_time() -> None:
    """The time for colliding keys is proportional to their number."""
    value = {float("nan"): position for position in range(5_000)}
    used = time.process_time()
    normal, _ = made_to_fit(value)
    assert time.process_time() - used < 1
    assert list(normal.values()) == list(range(5_000))


def test_list_of_replacements_is_optional() -> None:
    """Lenient normalisation works without a list of replacements."""
    assert normalise([math.nan, "\x00", MAX_SIZE], lenient=True) == [None, "\ufffd", MAX_SIZE]


def test_list_of_replacements_is_bounded() -> None:
    """The first MAX_REPLACED replacements are listed, and all of them are made."""
    normal, replaced = made_to_fit([math.nan, "\x00"] * MAX_REPLACED)
    assert normal == [None, "\ufffd"] * MAX_REPLACED
    assert replaced == [f"$[{index}]" for index in range(MAX_REPLACED)]


def test_huge_bytes_are_listed_once_as_bytes() -> None:
    """The stub names the bytes, not their base64 text."""
    with some.size_limit(50_000):
        normal, replaced = made_to_fit({"a": b"x" * 60_000})
    assert replaced == ["$.a"]
    assert normal["a"].startswith("<unstract-wire: bytes ")
