"""No connection is open while the process forks.

A forked child must not use a connection of its parent, nor even close it; and one that it opens itself shares SQLite's
book-keeping of locks with those that it inherited. So nothing is inherited: before a fork every file is let go of.
"""

from __future__ import annotations

import os
import weakref
from functools import cache
from typing import Protocol


class Forked(Protocol):
    def before_fork(self) -> None:
        """Let go of everything, and keep others from taking it up again."""

    def after_fork(self, *, in_child: bool) -> None:
        """Go on; in the child there is no other thread any more, whatever it held."""


_all: weakref.WeakSet[Forked] = weakref.WeakSet()
_paused: list[Forked] = []


def look_after(one: Forked) -> None:
    """Call the methods of `one` around every fork, for as long as it lives."""
    _register()
    _all.add(one)


@cache
def _register() -> None:
    os.register_at_fork(
        before=_before, after_in_parent=lambda: _after(in_child=False), after_in_child=lambda: _after(in_child=True)
    )


def _before() -> None:
    for one in list(_all):
        _paused.append(one)
        one.before_fork()


def _after(*, in_child: bool) -> None:
    while _paused:
        _paused.pop().after_fork(in_child=in_child)
