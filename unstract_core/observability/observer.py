"""Who looks on: metrics, traces, and whatever else wants to know of each send, run and settlement.

An observer learns of things where they happen and decides nothing: one that raises is passed over, and that is logged.
It gets messages and settlements as they are, and has to leave payload content alone as logs do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import attrs

from unstract_core.codec import check_headers
from unstract_core.errors import ConfigurationError, PayloadError
from unstract_core.forking import Stopped
from unstract_core.observability.log_events import LogThrottle, emit, frames
from unstract_core.transport import Delivery, Message, Settlement

logger = logging.getLogger("unstract_wire.observer")

Value = TypeVar("Value")

_BETWEEN_REPORTS = 60.0
_RAISED_BY_SIGNALS = (KeyboardInterrupt, Stopped)
"""What a signal raises, wherever the thread is at that moment."""

End: TypeAlias = Literal["returned", "raised", "retry_asked", "rejected", "ignored"]
"""How a task ended: "retry_asked" where it will be run again, and else "raised"; "rejected" also stands for a message
that was never started."""

_HOOKS = ("sending", "running", "task_failed", "ran", "rejected", "settled", "dead_lettered", "lost", "turned")


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

    `sending` is called on the thread that sends, `running`, `task_failed` and `ran` on that of the task; everything
    else on the consumer's one I/O thread, but `rejected` on either of the two. The I/O thread renews leases: a hook on
    it should return within a few seconds.
    """

    def sending(self, message: Message) -> AbstractContextManager[Message]:
        """Stand around the send of a message; what is yielded is sent, and may have other `headers`."""
        return contextlib.nullcontext(message)

    def running(self, delivery: Delivery) -> AbstractContextManager[dict[str, str] | None]:
        """Stand around a task; what is yielded becomes the `headers` of its continuation, None leaving its own."""
        return contextlib.nullcontext(None)

    def task_failed(self, delivery: Delivery, end: End, exception: BaseException) -> None:
        """Called when a task ended with an exception, inside of `running`, while the exception is being handled.

        If a task exceeds its deadline, this hook is called on the I/O thread at that moment, with DeadlineExceeded.

        Args:
            delivery: The message that was run, with its payload.
            end: "raised" for a failure, "retry_asked" where the task will be run again, "rejected" or "ignored" for
                Celery's Reject and Ignore.
            exception: What the task raised, with its traceback. Its text may quote the payload.
        """

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        """Note that a task ended, inside of `running`: with what type of error, after how many seconds, and how many
        parts of its result had to be made to fit. Of a task that was given up it is told when that happens, on the
        I/O thread, and not when its thread ends."""

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        """Note that a message will not be run: malformed, unknown, too often or too late delivered."""

    def settled(self, settlement: Settlement, seconds: float) -> None:
        """Note that a settlement took effect, this many seconds after its outcome was known."""

    def dead_lettered(self, settlement: Settlement) -> None:
        """Called when a message has become a dead letter, after that was committed.

        A worker that is killed between the commit and this call makes none: what has to happen for sure is the work of
        `on_error`, which is part of the commit.

        Args:
            settlement: What was written. `settlement.delivery.payload` is the message's payload; it is None where the
                message could not be read, and then `settlement.delivery.raw` is the stored message.
                `settlement.reason` is the error text.
        """

    def lost(self, delivery: Delivery) -> None:
        """Note that a lease was lost: nothing of what its task did is written."""

    def turned(self, turn: Turn) -> None:
        """Note that the consumer lives: at least once in some five seconds."""


class Observers(Observer):
    """All of these as one, in their order, none of which can do harm; one that overrides no hook costs nothing."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        for one in observers:
            if isinstance(one, type):
                raise ConfigurationError(f"observers takes an observer, not the class {one.__name__}: call it")
        self._all = tuple(observers)
        self._with = {hook: [one for one in self._all if _overrides(one, hook)] for hook in _HOOKS}
        self._reports: LogThrottle[tuple[str, str, str]] = LogThrottle(burst=1, seconds=_BETWEEN_REPORTS)

    def __bool__(self) -> bool:
        return bool(self._all)

    def sending(self, message: Message) -> AbstractContextManager[Message]:
        return self._around("sending", lambda one, sent: one.sending(sent), _with_headers, message)

    def running(self, delivery: Delivery) -> AbstractContextManager[dict[str, str] | None]:
        return self._around("running", lambda one, _: one.running(delivery), _headers, None)

    def task_failed(self, delivery: Delivery, end: End, exception: BaseException) -> None:
        self._each("task_failed", delivery, end, exception)

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        self._each("ran", delivery, end, error_type, seconds, replaced)

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self._each("rejected", delivery, error_type)

    def settled(self, settlement: Settlement, seconds: float) -> None:
        self._each("settled", settlement, seconds)

    def dead_lettered(self, settlement: Settlement) -> None:
        self._each("dead_lettered", settlement)

    def lost(self, delivery: Delivery) -> None:
        self._each("lost", delivery)

    def turned(self, turn: Turn) -> None:
        self._each("turned", turn)

    def _around(
        self,
        hook: str,
        enter: Callable[[Observer, Value], AbstractContextManager[Any]],
        take: Callable[[Any, Value], Value],
        value: Value,
    ) -> AbstractContextManager[Value]:
        return _Around(self._with[hook], enter, take, value, lambda one, exc: self._report(one, exc, hook))

    def _each(self, hook: str, *told: object) -> None:
        for one in self._with[hook]:
            try:
                getattr(one, hook)(*told)
            except _RAISED_BY_SIGNALS:
                raise
            except BaseException as exc:
                self._report(one, exc, hook)

    def _report(self, one: Observer, exc: BaseException, hook: str) -> None:
        """Log that an observer raised: once a minute for each hook and type of error, with the number of the others."""
        key = type(one).__name__, hook, type(exc).__name__
        if (suppressed := self._reports.admit(key)) is None:
            return
        fields = {"observer": key[0], "hook": hook, "error_type": key[2], "traceback": frames(exc)}
        emit(logger, logging.ERROR, "observer_failed", **fields, **({"suppressed": suppressed} if suppressed else {}))


class _Around(AbstractContextManager[Value]):
    """Enters one observer after the other, and leaves them in turn; only what is raised inside gets out.

    `take` makes the next value of what an observer yielded and the value so far; it may refuse it.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        enter: Callable[[Observer, Value], AbstractContextManager[Any]],
        take: Callable[[Any, Value], Value],
        value: Value,
        report: Callable[[Observer, BaseException], None],
    ) -> None:
        self._observers = observers
        self._enter = enter
        self._take = take
        self._value = value
        self._report = report
        self._entered: list[tuple[Observer, AbstractContextManager[Any]]] = []

    def __enter__(self) -> Value:
        value = self._value
        for one in self._observers:
            try:
                manager = self._enter(one, value)
                found = manager.__enter__()
                self._entered.append((one, manager))
                value = self._take(found, value)
            except _RAISED_BY_SIGNALS:
                raise
            except BaseException as exc:
                self._report(one, exc)
        return value

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, manager in reversed(self._entered):
            try:
                manager.__exit__(kind, exc, trace)
            except _RAISED_BY_SIGNALS:
                raise
            except BaseException as raised:
                if raised is not exc:
                    self._report(one, raised)


def _overrides(one: Observer, hook: str) -> bool:
    try:
        return getattr(getattr(one, hook), "__func__", None) is not getattr(Observer, hook)
    except Exception:  # which is told when it is called
        return True


def _with_headers(observed: object, message: Message) -> Message:
    """Take over the headers that an observer has set, where the wire can carry them."""
    if not isinstance(observed, Message):
        raise PayloadError("expected a Message")
    headers = observed.payload.headers
    if headers is message.payload.headers:
        return message
    checked = None if headers is None else check_headers(headers, "$.headers")
    return attrs.evolve(message, payload=attrs.evolve(message.payload, headers=checked))


def _headers(found: object, headers: dict[str, str] | None) -> dict[str, str] | None:
    return headers if found is None else check_headers(found, "$.headers")
