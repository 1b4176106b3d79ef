"""Fixtures of the tests beside the kit: a file for each test, and transports on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wire_sqlite import SqliteTransport

Open = Callable[..., SqliteTransport]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


@pytest.fixture
def open_transport(path: Path) -> Iterator[Open]:
    """Return a function that opens a transport on the test's file; each is closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_(**options: float) -> SqliteTransport:
            return stack.enter_context(contextlib.closing(SqliteTransport(path, **options)))

        yield open_
