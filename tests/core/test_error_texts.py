"""Error texts: `Type: message`, always printable, always inside the domain, never longer than stated."""

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
def test_an_error_text_is_of_the_domain_and_within_its_limit(kind: type[BaseException], message: str) -> None:
    """Whatever the message holds, the text is inside the domain, begins with the type, and is at most 4000 long."""
    text = error_text(kind(message))
    assert some.outside(text) is None
    assert text.startswith(kind.__name__)
    assert len(text) <= ERROR_LIMIT == 4000


@given(some.texts.filter(bool))
def test_an_error_text_is_type_and_message(message: str) -> None:
    """A short message is carried word for word behind the type's name."""
    assert error_text(ValueError(message)) == f"ValueError: {message}"


def test_an_error_without_a_message_is_its_type() -> None:
    """An exception that says nothing is named."""
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
def test_an_error_whose_message_cannot_be_printed_is_still_told(method: Any) -> None:
    """An exception whose str raises, exits, recurses or is no text is named, and no exception escapes."""
    text = error_text(_error(__str__=method))
    assert text.startswith("Odd: ")
    assert some.outside(text) is None


def test_a_message_that_lies_about_itself_is_read_as_it_is() -> None:
    """A str subclass as message is taken for the characters that it holds."""
    text = error_text(_error(__str__=lambda self: _Lying("a\x00" + "b" * 5000)))
    assert type(text) is str
    assert text.startswith("Odd: a\ufffdbbb")
    assert len(text) <= 4000


@given(any_texts)
def test_a_text_that_fits_is_not_cut(text: str) -> None:
    """Up to the limit nothing is cut, and only unfit characters are replaced, one for one."""
    short = text[:4000]
    assert len(cut(short)) == len(short)
    if some.outside(short) is None:
        assert cut(short) == short


@given(st.integers(1, 200_000), st.sampled_from("xé\x00\ud800"))
def test_a_longer_text_is_cut_to_the_limit_with_a_mark(more: int, character: str) -> None:
    """What is too long keeps its head and ends in a mark that tells its whole length."""
    text = "head " + character * (3995 + more)
    found = cut(text)
    assert len(found) == 4000
    assert found.startswith("head ")
    assert found.endswith(f" [cut: {len(text)} characters in all]")
    assert some.outside(found) is None


def test_a_huge_message_is_cut() -> None:
    """A message of 100 MB ends as a text of 4000 characters."""
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
def test_a_json_path_is_written_as_one_expects(steps: list[str | int], path: str) -> None:
    """Plain keys follow a dot, others stand quoted in brackets, positions as numbers."""
    assert json_path("$", steps) == path


@given(st.lists(some.texts | some.unfit_texts | st.text(min_size=100, max_size=300) | st.integers(0, 99), max_size=64))
def test_a_json_path_is_itself_printable_and_bounded(steps: list[str | int]) -> None:
    """Any path is inside the domain, and a key in it takes a few hundred characters at most."""
    path = json_path("$", steps)
    assert some.outside(path) is None
    assert len(path) <= 1 + len(steps) * 1000
