"""Who looks on: metrics, traces, and whatever else wants to know of each send, run and settlement.

An observer learns of things where they happen and decides nothing: one that raises is passed over, and that is logged
once. It is told of messages and settlements as they are, and has to leave payload content alone as logs do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Literal, TypeAlias, TypeVar

import attrs

from unstract_core.codec import check_headers
from unstract_core.errors import PayloadError
from unstract_core.events import emit
from unstract_core.transport import Delivery, Message, Settlement

logger = logging.getLogger(__name__)

Yielded = TypeVar("Yielded")

End: TypeAlias = Literal["returned", "raised", "retry_asked", "rejected", "ignored"]
"""How a task ended; "rejected" also stands for a message that was never started."""


@attrs.frozen
class Turn:
    """What a consumer holds at the end of a turn of its loop: `held` messages, of which `running` on a thread.

    `away` tells that its transport cannot be used for now.
    """

    held: int
    running: int
    away: bool


class Observer:
    """Does nothing; a subclass overrides what it wants to know.

    `sending` is called on the thread that sends, `running` and `ran` on the thread of the task; everything else on the
    consumer's one I/O thread, but `rejected` on either of the two.
    """

    def sending(self, message: Message) -> AbstractContextManager[Message]:
        """Stand around the send of a message; what is yielded is sent, and may have other `headers`."""
        return contextlib.nullcontext(message)

    def running(self, delivery: Delivery) -> AbstractContextManager[dict[str, str] | None]:
        """Stand around a task; what is yielded becomes the `headers` of its continuation, None leaving its own."""
        return contextlib.nullcontext(None)

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        """Note that a task ended, inside of `running`: with what type of error, after how many seconds, and how many
        parts of its result had to be made to fit."""

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        """Note that a message will not be run: malformed, unknown, too often or too late delivered."""

    def settled(self, settlement: Settlement, seconds: float) -> None:
        """Note that a settlement took effect, this many seconds after its outcome was known."""

    def lost(self, delivery: Delivery) -> None:
        """Note that a lease was lost: nothing of what its task did is written."""

    def turned(self, turn: Turn) -> None:
        """Note that the consumer lives: at least once in some five seconds."""


class Observers(Observer):
    """All of these as one, in their order, none of which can do harm."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)
        self._told: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    @contextlib.contextmanager
    def sending(self, message: Message) -> Iterator[Message]:
        with ExitStack() as stack:
            for one in self._all:
                observed = stack.enter_context(self._around(one, "sending", message, message))
                message = self._checked(one, observed, message)
            yield message

    @contextlib.contextmanager
    def running(self, delivery: Delivery) -> Iterator[dict[str, str] | None]:
        headers: dict[str, str] | None = None
        with ExitStack() as stack:
            for one in self._all:
                found = stack.enter_context(self._around(one, "running", delivery, None))
                with self._harmless(one):
                    headers = headers if found is None else check_headers(found, "$.headers")
            yield headers

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        self._each(lambda one: one.ran(delivery, end, error_type, seconds, replaced))

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self._each(lambda one: one.rejected(delivery, error_type))

    def settled(self, settlement: Settlement, seconds: float) -> None:
        self._each(lambda one: one.settled(settlement, seconds))

    def lost(self, delivery: Delivery) -> None:
        self._each(lambda one: one.lost(delivery))

    def turned(self, turn: Turn) -> None:
        self._each(lambda one: one.turned(turn))

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for one in self._all:
            with self._harmless(one):
                tell(one)

    @contextlib.contextmanager
    def _around(self, one: Observer, hook: str, given: object, instead: Yielded) -> Iterator[Yielded]:
        """Enter and leave with one observer; only what is raised inside gets out."""
        try:
            manager = getattr(one, hook)(given)
            value = manager.__enter__()
        except Exception as exc:
            self._tell(one, exc)
            yield instead
            return
        try:
            yield value
        except BaseException as exc:
            with self._harmless(one):
                manager.__exit__(type(exc), exc, exc.__traceback__)
            raise
        with self._harmless(one):
            manager.__exit__(None, None, None)

    def _checked(self, one: Observer, observed: object, message: Message) -> Message:
        """Take over the headers that an observer has set, where the wire can carry them."""
        try:
            if not isinstance(observed, Message):
                raise PayloadError("expected a Message")
            headers = observed.payload.headers
            checked = None if headers is None else check_headers(headers, "$.headers")
        except Exception as exc:
            self._tell(one, exc)
            return message
        return attrs.evolve(message, payload=attrs.evolve(message.payload, headers=checked))

    @contextlib.contextmanager
    def _harmless(self, one: Observer) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._tell(one, exc)

    def _tell(self, one: Observer, exc: Exception) -> None:
        key = type(one).__name__, type(exc).__name__
        if key not in self._told:
            self._told.add(key)
            emit(logger, logging.ERROR, "observer_failed", observer=key[0], error_type=key[1])
