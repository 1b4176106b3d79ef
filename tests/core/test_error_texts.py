"""Error texts: `Type: message`, printable, valid on the wire, and of limited length."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import PayloadError
from unstract_core.values import ERROR_LIMIT, cut, error_text
from unstract_core.values.limits import json_path

any_texts = (
    some.texts | some.unfit_texts | st.builds(lambda text, n: (text or "x") * n, some.texts, st.integers(0, 9000))
)


@given(st.sampled_from([ValueError, KeyError, OSError, SystemExit, KeyboardInterrupt, PayloadError]), any_texts)
def test_error_text_is_valid_and_limited(kind: type[BaseException], message: str) -> None:
    """Any error text is valid on the wire, begins with the type, and has at most 4000 characters."""
    text = error_text(kind(message))
    assert some.outside(text) is None
    assert text.startswith(kind.__name__)
    assert len(text) <= ERROR_LIMIT == 4000


@given(some.texts.filter(bool))
def test_error_text_is_type_and_message(message: str) -> None:
    """A short message follows the name of the type unchanged."""
    assert error_text(ValueError(message)) == f"ValueError: {message}"


def test_error_without_message_is_its_type() -> None:
    """The text of an exception without a message is the name of its type."""
    assert error_text(ValueError()) == "ValueError"
    assert error_text(SystemExit()) == "SystemExit"


def _error(**members: Any) -> Exception:
    kind: type[Exception] = type("Odd", (Exception,), members)
    return kind("said")


def _fails(self: object) -> NoReturn:
    raise RuntimeError("no")


def _exits(self: object) -> NoReturn:
    raise SystemExit(1)


def _interrupts(self: object) -> NoReturn:
    raise KeyboardInterrupt


class _Lying(str):
    __slots__ = ()

    def __len__(self) -> int:
        return 0

    def __getitem__(self, key: object) -> NoReturn:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "method",
    [_fails, _exits, _interrupts, lambda self: 5, lambda self: None, lambda self: str(self)],
    ids=["raises", "exits", "interrupts", "an int", "None", "recurses"],
)
def test_unprintable_error_has_a_text(method: Any) -> None:
    """An exception whose `str` raises, exits, recurses or returns no text still has an error text."""
    text = error_text(_error(__str__=method))
    assert text.startswith("Odd: ")
    assert some.outside(text) is None


def test_str_subclass_message_is_read_as_its_characters() -> None:
    """The methods of a str subclass do not change the text."""
    text = error_text(_error(__str__=lambda self: _Lying("a\x00" + "b" * 5000)))
    assert type(text) is str
    assert text.startswith("Odd: a\ufffdbbb")
    assert len(text) <= 4000


@given(any_texts)
def test_short_text_is_not_cut(text: str) -> None:
    """A text within the limit is not cut, and each invalid character is replaced by one character."""
    short = text[:4000]
    assert len(cut(short)) == len(short)
    if some.outside(short) is None:
        assert cut(short) == short


@given(st.integers(1, 200_000), st.sampled_from("xé\x00\ud800"))
def test_long_text_is_cut_with_a_mark(more: int, character: str) -> None:
    """A long text keeps its beginning and ends with a mark that has its full length."""
    text = "head " + character * (3995 + more)
    found = cut(text)
    assert len(found) == 4000
    assert found.startswith("head ")
    assert found.endswith(f" [cut: {len(text)} characters in all]")
    assert some.outside(found) is None


def test_huge_message_is_cut() -> None:
    """A message of 100 MB becomes a text of 4000 characters."""
    assert len(error_text(ValueError("x" * 100_000_000))) == 4000


@pytest.mark.parametrize(
    ("steps", "path"),
    [
        ([], "$"),
        (["kwargs", "x", 0, 17], "$.kwargs.x[0][17]"),
        (["a b", "1st", ""], '$["a b"]["1st"][""]'),
        (['say "x"', "é"], '$["say \\"x\\""].é'),
        (["a\x00", "\ud800"], '$["a\\u0000"]["\\ud800"]'),
    ],
)
def test_json_path_has_its_usual_form(steps: list[str | int], path: str) -> None:
    """A plain key follows a dot, another one is quoted in brackets, and a position is a number."""
    assert json_path("$", steps) == path


@given(st.lists(some.texts | some.unfit_texts | st.text(min_size=100, max_size=300) | st.integers(0, 99), max_size=64))
def test_json_path_is_valid_and_bounded(steps: list[str | int]) -> None:
    """Any path is valid on the wire, and a key in it has at most a few hundred characters."""
    path = json_path("$", steps)
    assert some.outside(path) is None
    assert len(path) <= 1 + len(steps) * 1000
