"""The short text of a task's arguments that Celery's messages carry for logs and monitors (`argsrepr`, `kwargsrepr`).

The text is equal to Celery's, character for character, and differs from `repr`:

- Strings have single quotes, and only these are escaped.
- A scalar that would fill the remaining space without its quotes is cut there, at its last space; "..." follows.
- A container inside `levels` others is written as `{...}`.
- At the end of the space, ", ..." replaces the rest, and open containers are closed. The last token may exceed it.

Nothing is read beyond the space, and nothing recurses. Cycles, which the wire cannot carry, are not detected: they are
written until the levels or the space end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Final, TypeAlias

_Member: TypeAlias = tuple[object, object]

_NO_KEY: Final = object()


def saferepr(value: object, limit: int = 1024, levels: int = 3) -> str:
    """Return the text of a value.

    Args:
        value: The value.
        limit: The space in characters; 1024 by default.
        levels: The depth of containers that are written; 3 by default, 0 for any depth.
    """
    text = _Text(limit, levels)
    try:
        text.write(value)
        text.write_members()
    except _RoomUsedUp:
        text.break_off()
    return "".join(text.parts)


class _RoomUsedUp(Exception):
    """The value has a rest that does not fit into the space."""


class _Text:
    """The text so far, the remaining space, and the open containers, outermost first."""

    __slots__ = ("levels", "opened", "parts", "room", "separator")

    def __init__(self, room: int, levels: int) -> None:
        self.room = room
        self.levels = levels
        self.parts: list[str] = []
        self.opened: list[tuple[Iterator[_Member], str]] = []
        self.separator = ""

    def write(self, value: object) -> bool:
        """Write a scalar, or open a container; return whether one was opened."""
        if isinstance(value, dict):
            return self._open("{", value.items(), "}")
        if isinstance(value, list):
            return self._open("[", _keyless(value), "]")
        if isinstance(value, tuple):
            return self._open("(", _keyless(value), ",)" if len(value) == 1 else ")")
        self._add_scalar(value)
        return False

    def write_members(self) -> None:
        """Write the members of open containers and close them."""
        while self.opened:
            members, closing = self.opened[-1]
            if not self._write_until_opened(members):
                self.opened.pop()
                self.parts.append(closing)
                self.room -= len(closing)
                self.separator = ", "

    def break_off(self) -> None:
        """Omit the rest, and close open containers."""
        self.parts.append(", ...")
        self.parts += [closing for _, closing in reversed(self.opened)]

    def _write_until_opened(self, members: Iterator[_Member]) -> bool:
        for key, value in members:
            if self.separator:
                self._add(self.separator)
            if key is not _NO_KEY:
                self._add_scalar(key)
                self._add(": ")
            self.separator = ", "
            if self.write(value):
                return True
        return False

    def _open(self, opening: str, members: Iterable[_Member], closing: str) -> bool:
        if self.levels and len(self.opened) >= self.levels:
            self._add(f"{opening}...{closing}")
            return False
        self._add(opening)
        self.opened.append((iter(members), closing))
        self.separator = ""
        return True

    def _add_scalar(self, value: object) -> None:
        if isinstance(value, str):
            self._add("'" + _cut(value, self.room).replace("'", "\\'") + "'")
        else:
            self._add(_cut(repr(value), self.room))

    def _add(self, token: str) -> None:
        if self.room <= 0:
            raise _RoomUsedUp
        self.parts.append(token)
        self.room -= len(token)


def _keyless(items: Iterable[object]) -> Iterator[_Member]:
    return zip(repeat(_NO_KEY), items, strict=False)


def _cut(text: str, room: int) -> str:
    if len(text) < room:
        return text
    return text[: max(room, 0)].rsplit(" ", 1)[0] + "..."
