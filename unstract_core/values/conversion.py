"""Normalisation: the conversion of a Python value to one that the wire can carry.

`normalise` is strict at dispatch, where the caller can still correct a value. It is lenient for a task's result,
because the task has run and its callback must be sent. Both modes use the same documented rules and never fall back on
`str`. There is no typed decoding: a UUID arrives as a string.
"""

from __future__ import annotations

from typing import Any

from unstract_core.errors import PayloadError
from unstract_core.values.lenient import Lenient
from unstract_core.values.limits import UNFIT, JSONValue
from unstract_core.values.strict import Strict

ERROR_LIMIT = 4000
"""The longest error text, in characters; a longer one is shortened and marked."""


def normalise(value: object, *, lenient: bool = False, path: str = "$", replaced: list[str] | None = None) -> JSONValue:
    """Return a copy of a value that consists of plain JSON values within the limits of the wire (limits.py).

    Both modes convert by these rules:

    - UUID and Decimal become str; datetime, date and time become RFC 3339 text with `T`.
    - An Enum becomes its value; a tuple a list; a set a sorted list.
    - An attrs or dataclass instance becomes a dict; an int key becomes str.
    - An integral float of 1e16 or more becomes an int of up to 64 bits; -0.0 becomes 0.0.
    - An instance of a subclass of a plain type becomes the plain type.

    Args:
        value: The value to convert.
        lenient: False, the default, raises for any other value. True replaces it and never raises:

            - NaN and Infinity become null; NUL and lone surrogates become U+FFFD.
            - Bytes become base64.
            - A part that is too deep or too large becomes a marked text.
            - Any other object becomes its `repr`.
        path: The JSON path of the value in its message.
        replaced: A list to which the lenient mode appends the path of each replacement, up to MAX_REPLACED of them.
            None for no list.

    Raises:
        PayloadError: The strict mode cannot convert a value; `path` is its JSON path.
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
    """Normalise the members of `args` or `kwargs`; the container itself does not count as a level of nesting."""
    if not container:
        return {} if isinstance(container, dict) else []
    return Lenient(path, []).value(container, -1) if lenient else _strictly(container, path, -1)


def error_text(exc: BaseException) -> str:
    """Return an exception as `Type: message`: valid on the wire, at most `ERROR_LIMIT` characters. Never raises."""
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
    """Return the name of an exception's type. Never raises, even if the metaclass does."""
    try:
        return str.__str__(type(exc).__name__)
    except BaseException:
        return "Exception"


def cut(text: str) -> str:
    """Return an error text that is valid on the wire and at most `ERROR_LIMIT` characters long; a cut is marked."""
    if len(text) > ERROR_LIMIT:
        mark = f" [cut: {len(text)} characters in all]"
        text = text[: ERROR_LIMIT - len(mark)] + mark
    return UNFIT.sub("\ufffd", text)


def _strictly(value: object, path: str, depth: int) -> JSONValue:
    try:
        return Strict(path).value(value, depth)
    except RecursionError as exc:
        raise PayloadError("nested too deep for what is left of the stack", path=path) from exc
