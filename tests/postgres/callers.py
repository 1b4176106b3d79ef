"""The cursors that `send(within=...)` joins, each with its caller's transaction around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import psycopg
import psycopg2
import psycopg2.extras
from psycopg import rows


@attrs.frozen
class Caller:
    """An application in the middle of its own transaction. `pid` is the process id of its backend."""

    cursor: Any
    commit: Callable[[], object]
    rollback: Callable[[], object]
    pid: int


Open = Callable[[str], contextlib.AbstractContextManager[Caller]]


@attrs.frozen
class Customer:
    """The class of a caller's row factory, which must not be used for rows of the package."""

    name: str


def _psycopg(row_factory: Any, cursor_factory: Any = psycopg.Cursor, *, pipeline: bool = False) -> Open:
    @contextlib.contextmanager
    def open_(url: str) -> Iterator[Caller]:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(
                contextlib.closing(psycopg.connect(url, row_factory=row_factory, cursor_factory=cursor_factory))
            )
            pid = connection.info.backend_pid
            if pipeline:
                stack.enter_context(_pipeline(connection))
            yield Caller(connection.cursor(), connection.commit, connection.rollback, pid)

    return open_


@contextlib.contextmanager
def _pipeline(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Pipeline mode, which fails at its end after the connection was lost."""
    pipeline = connection.pipeline()
    pipeline.__enter__()
    try:
        yield
    finally:
        if not connection.broken:
            pipeline.__exit__(None, None, None)


def _psycopg2(cursor_factory: Any) -> Open:
    @contextlib.contextmanager
    def open_(url: str) -> Iterator[Caller]:
        with contextlib.closing(psycopg2.connect(url, cursor_factory=cursor_factory)) as connection:
            yield Caller(connection.cursor(), connection.commit, connection.rollback, connection.info.backend_pid)

    return open_


CALLERS: dict[str, Open] = {
    "psycopg": _psycopg(rows.tuple_row),
    "psycopg-dict_row": _psycopg(rows.dict_row),
    "psycopg-namedtuple_row": _psycopg(rows.namedtuple_row),
    "psycopg-class_row": _psycopg(rows.class_row(Customer)),
    "psycopg-args_row": _psycopg(rows.args_row(Customer)),
    "psycopg-kwargs_row": _psycopg(rows.kwargs_row(Customer)),
    "psycopg-scalar_row": _psycopg(rows.scalar_row),
    "psycopg-client-side-binding": _psycopg(rows.tuple_row, psycopg.ClientCursor),
    "psycopg-raw-query": _psycopg(rows.tuple_row, psycopg.RawCursor),
    "psycopg-pipeline": _psycopg(rows.tuple_row, pipeline=True),
    "psycopg2": _psycopg2(psycopg2.extensions.cursor),
    "psycopg2-RealDictCursor": _psycopg2(psycopg2.extras.RealDictCursor),
    "psycopg2-DictCursor": _psycopg2(psycopg2.extras.DictCursor),
    "psycopg2-NamedTupleCursor": _psycopg2(psycopg2.extras.NamedTupleCursor),
}
