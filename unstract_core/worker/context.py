"""`current_delivery`: the delivery whose task the calling thread runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from unstract_core.transport import Delivery

_current: ContextVar[Delivery | None] = ContextVar("unstract_wire_delivery", default=None)


def current_delivery() -> Delivery | None:
    """Return the message whose task runs in this context, with its id, attempt and payload; None outside a consumer.

    Threads that the task starts itself do not inherit it.
    """
    return _current.get()


@contextlib.contextmanager
def delivering(delivery: Delivery) -> Iterator[None]:
    """Make a delivery the current one inside the block."""
    token = _current.set(delivery)
    try:
        yield
    finally:
        _current.reset(token)
