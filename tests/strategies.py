"""Hypothesis strategies of the tests, and an independent definition of the wire's domain.

The strategies generate convertible values, values outside the domain, and deliveries. The kit's strategies for values
and payloads can be imported from here, too. `outside` and `same` are oracles: they share no code with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import json
import math
import operator
import string
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attrs
from hypothesis import strategies as st

from contract_tests.strategies import AWAITS as AWAITS  # an explicit re-export, for mypy
from contract_tests.strategies import continuations as continuations
from contract_tests.strategies import fairness_keys as fairness_keys
from contract_tests.strategies import floats as floats
from contract_tests.strategies import integers as integers
from contract_tests.strategies import json_arrays as json_arrays
from contract_tests.strategies import json_objects as json_objects
from contract_tests.strategies import json_values as json_values
from contract_tests.strategies import keys as keys
from contract_tests.strategies import names as names
from contract_tests.strategies import objects
from contract_tests.strategies import payloads as payloads
from contract_tests.strategies import scalars as scalars
from contract_tests.strategies import texts as texts
from unstract_core import Delivery, PayloadError, to_wire
from unstract_core.values import limits

ENVELOPE = {"__type__", "__value__"}
UNFIT_CHARACTERS = "\x00\ud800\udbff\udc00\udfff"
UNFIT_KEYS: list[Any] = [None, True, 1.5, (1,), b"k", 2**63, -(2**63) - 1, "a\x00", "\ud800", "é\udfff"]

unfit_texts = st.builds(lambda a, bad, b: a + bad + b, texts, st.sampled_from(UNFIT_CHARACTERS), texts)

_row_ids = st.integers(1, 10**6).map(str)
_attempts = st.integers(1, 9)
_organisations = st.just("") | names
_priorities = st.integers(1, 10)


@st.composite
def deliveries(
    draw: st.DrawFn,
    awaits: str | None = None,
    *,
    task_id: bool | None = None,
    attempts: st.SearchStrategy[int] | None = None,
) -> Delivery:
    """Generate a delivery of a readable message."""
    payload = draw(payloads(awaits, task_id))
    return Delivery(
        id=draw(_row_ids),
        queue=payload.queue,
        attempt=draw(_attempts if attempts is None else attempts),
        payload=payload,
        raw=to_wire(payload),
        org_id=draw(_organisations),
        priority=draw(_priorities),
    )


class Colour(enum.Enum):
    PLAIN = "red"
    TUPLE = (1, "two")
    UUID = uuid.UUID(int=7)


class Word(str, enum.Enum):  # noqa: UP042 - the older form is what the product's own enums use
    YES = "yes"


class Number(enum.IntEnum):
    SEVEN = 7


class Text(str):
    """A subclass of str that hides its value."""

    __slots__ = ()

    def __str__(self) -> str:
        return "hidden"

    def __repr__(self) -> str:
        return "hidden"


class Count(int):
    def __repr__(self) -> str:
        return "hidden"


class Amount(float):
    def __repr__(self) -> str:
        return "hidden"


class Row(dict[Any, Any]):
    """A subclass of dict."""


class Rows(list[Any]):
    """A subclass of list."""


class Pair(NamedTuple):
    left: Any
    right: Any


OldPair = namedtuple("OldPair", ["left", "right"])  # noqa: PYI024 - both kinds are met in results


@dataclasses.dataclass
class Record:
    first: Any
    second: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    first: Any


@attrs.define
class Model:
    first: Any
    second: Any = None


datetimes = st.datetimes(
    timezones=st.none()
    | st.just(datetime.UTC)
    | st.builds(lambda m: datetime.timezone(datetime.timedelta(minutes=m)), st.integers(-839, 839))
)
decimals = st.decimals(allow_nan=True) | st.decimals(allow_nan=False, places=2)

_convertible_leaves = st.one_of(
    st.uuids(),
    datetimes,
    st.dates(),
    st.times(),
    decimals,
    st.sampled_from([*Colour, *Word, *Number]),
    st.integers(10**16, 2**62).map(float),
    st.just(-0.0),
    texts.map(Text),
    integers.map(Count),
    floats.map(Amount),
)


def _convertible_containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(Rows),
        objects(inner),
        objects(inner).map(Row),
        st.dictionaries(integers, inner, max_size=3),
        st.sets(integers | texts | st.uuids() | st.dates(), max_size=4),
        st.frozensets(integers | texts, max_size=4),
        st.builds(Pair, inner, inner),
        st.builds(OldPair, inner, inner),
        st.builds(Record, inner, inner),
        st.builds(Model, inner, inner),
    )


convertibles = st.recursive(scalars | _convertible_leaves, _convertible_containers, max_leaves=10)
"""Values that normalisation converts without loss."""


def _generator() -> Iterator[int]:
    yield 1


unfit_scalars = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 2**63, -(2**63) - 1, 10**4000, 1e19, -1e300]),
    unfit_texts,
    unfit_texts.map(Text),
    st.binary(max_size=8),
    st.binary(max_size=8).map(bytearray),
    st.binary(max_size=8).map(lambda data: memoryview(data)),
    st.just({"__type__": "uuid", "__value__": 1}),
    st.builds(object),
    st.builds(_generator),
    st.complex_numbers(),
    st.timedeltas(),
    st.sampled_from([int, len, range(3), ..., NotImplemented, ValueError("x"), Colour]),
)
"""Values that strict normalisation refuses."""

_unfit_keys = st.one_of(
    st.none(), st.booleans(), st.floats(), st.tuples(st.integers()), st.binary(max_size=3), unfit_texts, st.just(2**63)
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _convertible_containers(inner) | st.dictionaries(
        _unfit_keys | integers | keys | st.integers(0, 3) | st.integers(0, 3).map(str), inner, max_size=4
    )


anything = st.recursive(scalars | _convertible_leaves | unfit_scalars, _containers, max_leaves=12)
"""Well-behaved Python values of any kind, inside and outside the domain."""


PLAIN_KEYS = st.text(string.ascii_letters + "_", min_size=1, max_size=6)
ODD_KEYS = st.sampled_from(["odd key", "1st", "a.b", 'q"', "", "ß-"])


@dataclasses.dataclass
class Planted:
    """A structure of valid values with one invalid value at `path`."""

    whole: Any
    path: str

    def __repr__(self) -> str:
        try:
            return f"Planted({self.whole!r}, {self.path!r})"
        except BaseException:  # the offender may forbid even that
            return f"Planted(<unprintable>, {self.path!r})"


@st.composite
def planted(draw: st.DrawFn, make: Callable[[], Any]) -> Planted:
    """Generate a structure of valid values around the invalid value of `make`, up to six containers deep."""
    whole, path = make(), ""
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["list", "tuple", "dict", "odd dict", "record", "model"]))
        if kind in ("list", "tuple"):
            before, after = draw(st.lists(scalars, max_size=2)), draw(st.lists(scalars, max_size=2))
            items = [*before, whole, *after]
            whole = items if kind == "list" else tuple(items)
            path = f"[{len(before)}]{path}"
        elif kind == "record":
            whole, path = Record(draw(scalars), whole), f".second{path}"
        elif kind == "model":
            whole, path = Model(whole, draw(scalars)), f".first{path}"
        else:
            key = draw(PLAIN_KEYS if kind == "dict" else ODD_KEYS)
            innocent = PLAIN_KEYS.filter(functools.partial(operator.ne, key))
            sibling, other = draw(innocent), draw(innocent)
            whole = {sibling: draw(scalars), key: whole, other: draw(scalars)}
            path = (f".{key}" if kind == "dict" else f"[{json.dumps(key)}]") + path
    return Planted(whole, "$" + path)


def burying(offenders: st.SearchStrategy[Any]) -> st.SearchStrategy[Planted]:
    """Generate structures around one of these invalid values."""
    return offenders.flatmap(lambda offender: planted(lambda: offender))


def nest(depth: int, leaf: object = None, kind: type[list[Any] | dict[str, Any]] = list) -> Any:
    """Return `depth` nested containers around `leaf`."""
    found: Any = leaf
    for _ in range(depth):
        found = [found] if kind is list else {"x": found}
    return found


@contextlib.contextmanager
def size_limit(size: int) -> Iterator[None]:
    """Set `MAX_SIZE` for the block, small enough for a test."""
    usual = limits.MAX_SIZE
    limits.MAX_SIZE = size
    try:
        yield
    finally:
        limits.MAX_SIZE = usual


def attempt(call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of the call, or the PayloadError that it raises. Other errors are raised."""
    try:
        return call(*args)
    except PayloadError as exc:
        return exc


def outside(value: object, *, max_size: int = 64 * 1024 * 1024) -> str | None:
    """Return why a value is outside the domain of the wire; None if it is inside."""
    size = 0
    stack: list[tuple[object, int]] = [(value, 0)]
    while stack:
        found, depth = stack.pop()
        if type(found) in (list, dict) and depth == 64:
            return "deeper than 64"
        if type(found) is list:
            size += 16 * len(found)
            stack += [(item, depth + 1) for item in found]
        elif type(found) is dict:
            if set(found) == ENVELOPE:
                return "an envelope"
            size += 16 * len(found)
            for key, item in found.items():
                if type(key) is not str:
                    return f"a key of type {type(key)}"
                stack += [(key, 0), (item, depth + 1)]
        elif type(found) is str:
            try:
                size += len(found.encode())
            except UnicodeEncodeError:
                return "a lone surrogate"
            if "\x00" in found:
                return "NUL"
        elif reason := _unfit_scalar(found):
            return reason
    return f"{size} bytes" if size > max_size else None


def _unfit_scalar(value: object) -> str | None:
    if value is None or type(value) is bool:
        return None
    if type(value) is int:
        return None if -9223372036854775808 <= value <= 9223372036854775807 else "an int beyond 64 bits"
    if type(value) is float:
        if not abs(value) < 10**16:
            return "a float that is not finite or too large"
        return "-0.0" if value == 0 and math.copysign(1, value) < 0 else None
    return f"a {type(value)}"


def same(left: object, right: object) -> bool:
    """Return whether two values are equal, with the same types and the same order of dict keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def containers_of(value: object) -> set[int]:
    """Return the ids of the lists and dicts inside a value."""
    found: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list | dict):
            found.add(id(item))
            stack += item.values() if isinstance(item, dict) else item
    return found
