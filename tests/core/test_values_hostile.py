"""Values whose own code misbehaves: the strict mode rejects them, the lenient mode replaces only them."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import strategies as some
from hypothesis import given, settings
from hypothesis import strategies as st

from unstract_core import PayloadError, normalise


class Trick(str):
    """A str whose methods return wrong values."""

    __slots__ = ()

    def isascii(self) -> bool:
        return True

    def __contains__(self, part: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return True


def fails(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("hostile")


def exits(*_: object, **__: object) -> NoReturn:
    raise SystemExit(3)


def made(base: type[Any], *args: Any, **members: Any) -> Callable[[], Any]:
    """Return a function that makes instances of a subclass of `base` with these members."""
    return lambda: type("Hostile", (base,), members)(*args)


@dataclasses.dataclass
class Loaded:
    """A record whose second field runs code when it is read."""

    first: int
    second: Callable[[], Any] = dataclasses.field(repr=False)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return found() if name == "second" else found


class Lazy(enum.Enum):
    MEMBER = 1

    @property
    def value(self) -> int:
        raise RuntimeError("hostile")


def _half_a_list(self: object) -> Iterator[int]:
    yield 1
    raise RuntimeError("hostile")


def _released() -> memoryview:
    view = memoryview(b"gone")
    view.release()
    return view


NOT_TEXT = {"__repr__": lambda self: 5}

HOSTILE: dict[str, Callable[[], Any]] = {
    "repr raises": made(object, __repr__=fails),
    "repr exits": made(object, __repr__=exits),
    "repr is no text": made(object, **NOT_TEXT),
    "repr has NUL and a surrogate": made(object, __repr__=lambda self: "a\x00\ud800b"),
    "repr is a lying str": made(object, __repr__=lambda self: Trick("a\x00b")),
    "repr is recursive": made(object, __repr__=lambda self: repr([self])),
    "class raises": made(object, __class__=property(fails)),
    "class pretends to be str": made(object, __class__=property(lambda self: str)),
    "class pretends to be dict": made(object, __class__=property(lambda self: dict)),
    "field raises": lambda: Loaded(1, fails),
    "enum value raises": lambda: Lazy.MEMBER,
    "iterator raises": made(list, [1, 2], __iter__=fails),
    "iterator raises half way": made(list, [1, 2], __iter__=_half_a_list),
    "tuple iterator raises": made(tuple, [1, 2], __iter__=fails),
    "set iterator raises": made(frozenset, [1, 2], __iter__=fails),
    "items raises": made(dict, {"a": 1}, items=fails),
    "items are no pairs": made(dict, {"a": 1}, items=lambda self: [1, 2]),
    "isoformat raises": made(datetime.date, 2026, 1, 2, isoformat=fails),
    "isoformat is no text": made(datetime.date, 2026, 1, 2, isoformat=lambda self: None),
    "isoformat is a lying str": made(datetime.date, 2026, 1, 2, isoformat=lambda self: Trick("a\x00b")),
    "decimal str raises": made(decimal.Decimal, 1, __str__=fails),
    "uuid str is a lying str": made(uuid.UUID, "7" * 32, __str__=lambda self: Trick("a\x00b")),
    "released memoryview": _released,
    "memoryview with gaps": lambda: memoryview(b"abcdef")[::2],
}

HARMLESS_AFTER_ALL: dict[str, Callable[[], Any]] = {
    "a lying str": lambda: Trick("held"),
    "an int that will not be converted": made(int, 5, __int__=fails, __repr__=fails, __index__=fails),
    "a float that will not be converted": made(float, 5.5, __float__=fails, __repr__=fails),
    "a list of no length": made(list, [1], __len__=fails, __repr__=fails),
    "a dict that will not be looked into": made(dict, {"a": 1}, __getitem__=fails, __contains__=fails, keys=fails),
}


@pytest.mark.parametrize("name", HOSTILE)
@settings(max_examples=15)
@given(data=st.data())
def test_strict_rejects_a_hostile_value_at_its_path(name: str, data: st.DataObject) -> None:
    """For any error of a value's own code, strict raises PayloadError with the path, or returns a valid value."""
    found = data.draw(some.planted(HOSTILE[name]))
    normal = some.attempt(normalise, found.whole)
    if isinstance(normal, PayloadError):
        assert normal.path.startswith(found.path)
    else:
        assert some.outside(normal) is None


@pytest.mark.parametrize("name", HOSTILE)
@settings(max_examples=15)
@given(data=st.data())
def test_lenient_replaces_only_the_hostile_value(name: str, data: st.DataObject) -> None:
    """Lenient replaces the hostile value, lists its path, and keeps every other value."""
    found = data.draw(some.planted(HOSTILE[name]))
    innocent = data.draw(some.json_values)
    replaced: list[str] = []
    normal: Any = normalise({"paid": innocent, "hostile": found.whole}, lenient=True, replaced=replaced)
    assert some.outside(normal) is None
    assert some.same(normal["paid"], innocent)
    assert all(path.startswith("$.hostile" + found.path[1:]) for path in replaced)


@pytest.mark.parametrize("name", HOSTILE)
def test_lenient_never_raises_for_a_hostile_value(name: str) -> None:
    """A task that returns only a hostile value has a valid result."""
    assert some.outside(normalise(HOSTILE[name](), lenient=True)) is None


@pytest.mark.parametrize("name", HARMLESS_AFTER_ALL)
def test_subclass_is_read_without_its_own_code(name: str) -> None:
    """A subclass of a plain type is read by the methods of the plain type."""
    value = HARMLESS_AFTER_ALL[name]()
    assert some.outside(normalise(value)) is None
    assert some.same(normalise(value), normalise(value, lenient=True))
    assert normalise(Trick("held")) == "held"


def _hashable(make: Callable[[], Any]) -> bool:
    try:
        hash(make())
    except (TypeError, ValueError):
        return False
    return True


HOSTILE_KEYS = [name for name, make in HOSTILE.items() if _hashable(make)]


@pytest.mark.parametrize("name", HOSTILE_KEYS)
def test_lenient_replaces_only_the_hostile_key(name: str) -> None:
    """A key that cannot be read loses neither its own value nor another one."""
    normal: Any = normalise({"paid": 1, HOSTILE[name](): 2, "more": 3}, lenient=True)
    assert some.outside(normal) is None
    assert list(normal.values()) == [1, 2, 3]
    assert normal["paid"] == 1


@pytest.mark.parametrize("name", HOSTILE_KEYS)
def test_strict_rejects_a_hostile_key(name: str) -> None:
    """Strict raises only PayloadError for a key whose own code raises."""
    normal = some.attempt(normalise, {"paid": 1, HOSTILE[name](): 2})
    if isinstance(normal, PayloadError):
        assert normal.path.startswith("$")
    else:
        assert some.outside(normal) is None


EXITING: dict[str, Callable[[], Any]] = {
    "field": lambda: Loaded(1, exits),
    "iterator": made(list, [1], __iter__=exits),
    "items": made(dict, {"a": 1}, items=exits),
    "isoformat": made(datetime.date, 2026, 1, 2, isoformat=exits),
    "str": made(decimal.Decimal, 1, __str__=exits),
    "class": made(object, __class__=property(exits)),
}


@pytest.mark.parametrize("name", EXITING)
def test_lenient_survives_an_exit_in_a_result(name: str) -> None:
    """sys.exit in a property or an iterator of a result does not lose the result."""
    replaced: list[str] = []
    normal: Any = normalise({"paid": 1, "bad": EXITING[name]()}, lenient=True, replaced=replaced)
    assert normal["paid"] == 1
    assert some.outside(normal) is None
    assert replaced == ["$.bad"]


def _self_changing() -> dict[str, Any]:
    members: dict[str, Any] = {"paid": 1}
    members["loaded"] = Loaded(1, lambda: members.__setitem__("new", 2))
    members["after"] = 3
    return members


def test_strict_rejects_a_changing_dict() -> None:
    """A dict that changes while it is read raises PayloadError."""
    with pytest.raises(PayloadError):
        normalise(_self_changing())


def test_lenient_replaces_a_changing_dict() -> None:
    """A dict that changes while it is read is replaced by a valid value, and is listed."""
    replaced: list[str] = []
    normal: Any = normalise({"paid": 1, "changing": _self_changing()}, lenient=True, replaced=replaced)
    assert some.outside(normal) is None
    assert any("$" in path for path in replaced)


def test_changing_dict_leaves_its_siblings_unchanged() -> None:
    """Only the changing dict is replaced, and the result around it is kept."""
    normal: Any = normalise({"paid": 1, "changing": _self_changing()}, lenient=True)
    assert isinstance(normal, dict)
    assert normal["paid"] == 1


def test_dict_shared_with_a_thread_becomes_a_result() -> None:
    """While another thread changes a dict, lenient returns a valid value, and strict that or a PayloadError."""
    shared: dict[str, Any] = {str(number): [number] for number in range(200)}
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            shared[f"new {number % 50}"] = number
            shared.pop(f"new {(number + 25) % 50}", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert some.outside(normalise(shared, lenient=True)) is None
            strict = some.attempt(normalise, shared)
            assert isinstance(strict, PayloadError) or some.outside(strict) is None
    finally:
        stop.set()
        thread.join()


def test_endless_iterator_ends_at_the_size_limit() -> None:
    """A list with an endless iterator is rejected by strict and cut by lenient."""

    def endless(self: object) -> Iterator[int]:
        while True:
            yield 1

    endless_list = made(list, [], __iter__=endless)
    with some.size_limit(100_000):
        with pytest.raises(PayloadError, match="bytes"):
            normalise(endless_list())
        normal: Any = normalise(endless_list(), lenient=True)
    assert normal[0] == 1
    assert normal[-1].startswith("<unstract-wire: ")


def test_huge_repr_is_replaced_by_a_stub() -> None:
    """A repr that is too large becomes a stub, and is listed once."""
    replaced: list[str] = []
    with some.size_limit(100_000):
        huge = made(object, __repr__=lambda self: "x" * 200_000)
        normal: Any = normalise({"paid": 1, "huge": huge()}, lenient=True, replaced=replaced)
    assert normal["paid"] == 1
    assert normal["huge"].startswith("<unstract-wire: ")
    assert replaced == ["$.huge"]
