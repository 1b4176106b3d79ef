"""Close every connection before the process forks.

A forked child must neither use nor close a connection of its parent. A connection of its own would share SQLite's lock
book-keeping with inherited ones. So no connection is open during a fork.
"""

from __future__ import annotations

import os
import weakref
from functools import cache
from typing import Protocol


class Forked(Protocol):
    def before_fork(self) -> None:
        """Close every connection, and block new ones."""

    def after_fork(self, *, in_child: bool) -> None:
        """Allow connections again; in the child, no other thread exists."""


_all: weakref.WeakSet[Forked] = weakref.WeakSet()
_paused: list[Forked] = []


def call_around_forks(one: Forked) -> None:
    """Call the methods of `one` around every fork, for as long as it exists."""
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
