"""How values are made to fit the wire: strictly at dispatch, leniently for a task's result.

`normalise` is strict at dispatch, where the caller can still mend a value, and lenient for a task's result, where
the money is spent and the callback must arrive. Both convert by named rules; neither ever falls back on `str`.
Deliberately absent: typed decoding. A UUID arrives as a string.
"""

from __future__ import annotations

from typing import Any

from unstract_core.errors import PayloadError
from unstract_core.values.lenient import Lenient
from unstract_core.values.limits import UNFIT, JSONValue
from unstract_core.values.strict import Strict

ERROR_LIMIT = 4000
"""Characters of an error text; a longer one is cut, and the cut is marked."""


def normalise(value: object, *, lenient: bool = False, path: str = "$", replaced: list[str] | None = None) -> JSONValue:
    """Return a copy of `value` made of plain JSON values, inside the domain of limits.py.

    Rules, strict and lenient alike: UUID and Decimal become str; datetime, date and time become RFC 3339 text with
    `T`; an Enum its value; tuple and set a list (a set in sorted order); an integral float from 1e16 on an int where
    it fits; -0.0 becomes 0.0; int keys become str; attrs and dataclass instances become dicts; subclasses of the
    plain types become the plain type.

    Strict raises PayloadError for anything else, its `path` below `path`. Lenient never raises: NaN and Infinity
    become null, NUL and surrogates U+FFFD, bytes base64, other objects their `repr`, what is too deep or too large a
    marked stub; the path of each such replacement, of the first MAX_REPLACED, is appended to `replaced`.
    """
    if not lenient:
        return _strictly(value, path, 0)
    walk = Lenient(path, replaced if replaced is not None else [])
    try:
        return walk.value(value, 0)
    except BaseException:  # lenient never raises
        walk.keys.clear()
        return walk.foreign(value)


def normalise_members(
    container: list[Any] | tuple[Any, ...] | dict[Any, Any], *, path: str = "$", lenient: bool = False
) -> Any:
    """Normalise the members of `args` or `kwargs`; the container itself does not count as a level."""
    if not container:
        return {} if isinstance(container, dict) else []
    return Lenient(path, []).value(container, -1) if lenient else _strictly(container, path, -1)


def error_text(exc: BaseException) -> str:
    """Write an exception as `Type: message`, inside the domain and at most `ERROR_LIMIT` characters. Never raises."""
    name, message = error_parts(exc)
    return cut(f"{name}: {message}" if message else name)


def error_parts(exc: BaseException) -> tuple[str, str]:
    """Return the name of an exception's type and the exception's own text. Never raises."""
    try:
        message = str.__str__(str(exc))
    except BaseException:  # a hostile __str__ may even exit
        message = "<its message cannot be printed>"
    return type_name(exc), message


def type_name(exc: BaseException) -> str:
    """Return the name of an exception's type. Never raises, whatever its metaclass does."""
    try:
        return str.__str__(type(exc).__name__)
    except BaseException:
        return "Exception"


def cut(text: str) -> str:
    """Make an error text fit: inside the domain, and cut at `ERROR_LIMIT` with the cut marked."""
    if len(text) > ERROR_LIMIT:
        mark = f" [cut: {len(text)} characters in all]"
        text = text[: ERROR_LIMIT - len(mark)] + mark
    return UNFIT.sub("\ufffd", text)


def _strictly(value: object, path: str, depth: int) -> JSONValue:
    try:
        return Strict(path).value(value, depth)
    except RecursionError as exc:
        raise PayloadError("nested too deep for what is left of the stack", path=path) from exc
