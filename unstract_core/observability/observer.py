"""Observers of each send, run and settlement: metrics, traces, and an application's own.

An observer cannot change how a message is processed. If it raises, the error is logged and ignored. An observer gets
whole messages and settlements, and must not store their payload content, as logs do not.
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
"""The exceptions of signal handlers, which are raised in any code of the main thread."""

End: TypeAlias = Literal["returned", "raised", "retry_asked", "rejected", "ignored"]
"""How a task ended. "retry_asked": the task will be run again because it asked for it. "rejected": the task raised
Celery's Reject, or the message was not started."""

_HOOKS = ("sending", "running", "task_failed", "rejected", "settled", "dead_lettered")
_RENAMED = {"on_heartbeat": "turned", "on_task_finished": "ran", "on_lease_lost": "lost"}
"""The hooks that take an event record, and the earlier names under which existing observers override them."""


@attrs.frozen
class WorkerHeartbeat:
    """The state of a consumer at the end of one iteration of its loop.

    Attributes:
        in_flight: Messages that are claimed and not yet settled.
        running: Those of them whose task is running on a thread.
        unavailable: True while the transport cannot be reached.
    """

    in_flight: int
    running: int
    unavailable: bool


@attrs.frozen
class TaskFinished:
    """The end of a task's run, or of the wait for a task that exceeded its deadline.

    Attributes:
        delivery: The message that was run.
        end: How the run ended.
        error_type: The name of the exception's type; None if the task returned.
        seconds: How long the task ran.
        replaced: How many parts of the result were replaced because the wire cannot carry them.
    """

    delivery: Delivery
    end: End
    error_type: str | None
    seconds: float
    replaced: int


@attrs.frozen
class LeaseLostEvent:
    """The loss of a lease: the result of its task is not written.

    Attributes:
        delivery: The message whose lease was lost.
    """

    delivery: Delivery


@attrs.frozen
class Turn:
    """The argument of `turned`, the earlier name of `on_heartbeat`: a WorkerHeartbeat with other field names."""

    held: int
    running: int
    away: bool


class Observer:
    """The base class of observers: each hook does nothing, and a subclass overrides those that it needs.

    Each hook is called on one of these threads:

    - `sending`: the thread that sends.
    - `running`, `task_failed` and `on_task_finished`: the task's thread.
    - `rejected`: the task's thread or the consumer's I/O thread.
    - Every other hook: the consumer's I/O thread, which renews leases. A hook must return within a few seconds.

    `on_heartbeat`, `on_task_finished` and `on_lease_lost` were called `turned`, `ran` and `lost`. The earlier names
    still work. Each hook is called once, under the name that the more derived class overrides. If one class overrides
    both names, the new name is called.
    """

    def sending(self, message: Message) -> AbstractContextManager[Message]:
        """Surround the send of a message.

        Args:
            message: The message that is about to be sent.

        Returns:
            A context manager that is entered before the send and exited after it. The transport sends the message that
            it yields; only the `headers` of that message may differ.
        """
        return contextlib.nullcontext(message)

    def running(self, delivery: Delivery) -> AbstractContextManager[dict[str, str] | None]:
        """Surround the run of a task.

        Args:
            delivery: The message that is about to be run.

        Returns:
            A context manager that is entered before the task and exited after it. It yields the `headers` of the task's
            continuation; None keeps those of the message.
        """
        return contextlib.nullcontext(None)

    def task_failed(self, delivery: Delivery, end: End, exception: BaseException) -> None:
        """Called when a task ended with an exception, inside `running`, while the exception is being handled.

        If a task exceeds its deadline, this hook is called on the I/O thread at that moment, with DeadlineExceeded.

        Args:
            delivery: The message that was run, with its payload.
            end: "raised" for a failure, "retry_asked" if the task will be run again, "rejected" or "ignored" for
                Celery's Reject and Ignore.
            exception: The exception, with its traceback. Its text may quote the payload.
        """

    def on_task_finished(self, event: TaskFinished) -> None:
        """Called when a task ended, inside `running`.

        If a task exceeds its deadline, this hook is called on the I/O thread at that moment, not when its thread ends.

        Args:
            event: The message, how its task ended, and how long it ran.
        """

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        """Called when a message will not be run.

        Args:
            delivery: The message; its payload is None if it cannot be read.
            error_type: The reason: "MalformedPayload", "UnknownTask", "TooManyAttempts" or another error of this
                package.
        """

    def settled(self, settlement: Settlement, seconds: float) -> None:
        """Called when a settlement took effect.

        Args:
            settlement: The settlement as it was written.
            seconds: The time between the end of the task and the settlement.
        """

    def dead_lettered(self, settlement: Settlement) -> None:
        """Called after the commit by which a message became a dead letter.

        If the worker is killed between the commit and this call, the hook is not called. Work that must not be missed
        belongs in the `on_error` callback, which is part of the commit.

        Args:
            settlement: The settlement as it was written. `settlement.delivery.payload` is the message's payload; if the
                message could not be read it is None, and `settlement.delivery.raw` is the stored message.
                `settlement.reason` is the error text.
        """

    def on_lease_lost(self, event: LeaseLostEvent) -> None:
        """Called when a lease was lost: the result of its task is not written.

        Args:
            event: The message whose lease was lost.
        """

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        """Called by a running consumer at least once in about five seconds.

        Args:
            event: The number of messages in flight, and whether the transport is available.
        """

    def ran(self, delivery: Delivery, end: End, error_type: str | None, seconds: float, replaced: int) -> None:
        """The earlier name of `on_task_finished`, with the record's fields as arguments."""
        self.on_task_finished(TaskFinished(delivery, end, error_type, seconds, replaced))

    def lost(self, delivery: Delivery) -> None:
        """The earlier name of `on_lease_lost`."""
        self.on_lease_lost(LeaseLostEvent(delivery))

    def turned(self, turn: Turn) -> None:
        """The earlier name of `on_heartbeat`."""
        self.on_heartbeat(WorkerHeartbeat(turn.held, turn.running, turn.away))


class Observers(Observer):
    """Calls each observer in order, and logs an observer that raises instead of failing.

    An observer is called for the hooks that it overrides, and for no other.

    Raises:
        ConfigurationError: One of the observers is a class and not an object.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        for observer in observers:
            if isinstance(observer, type):
                raise ConfigurationError(f"observers takes an observer, not the class {observer.__name__}: call it")
        self._all = tuple(observers)
        self._with = {
            hook: [(observer, hook) for observer in self._all if _overrides(observer, hook)] for hook in _HOOKS
        }
        for hook, earlier in _RENAMED.items():
            names = [(observer, _name_to_call(observer, hook, earlier)) for observer in self._all]
            self._with[hook] = [(observer, name) for observer, name in names if name is not None]
        self._reports: LogThrottle[tuple[str, str, str]] = LogThrottle(burst=1, seconds=_BETWEEN_REPORTS)

    def __bool__(self) -> bool:
        return bool(self._all)

    def sending(self, message: Message) -> AbstractContextManager[Message]:
        return self._around("sending", lambda observer, sent: observer.sending(sent), _with_headers, message)

    def running(self, delivery: Delivery) -> AbstractContextManager[dict[str, str] | None]:
        return self._around("running", lambda observer, _: observer.running(delivery), _headers, None)

    def task_failed(self, delivery: Delivery, end: End, exception: BaseException) -> None:
        self._each("task_failed", delivery, end, exception)

    def on_task_finished(self, event: TaskFinished) -> None:
        earlier = (event.delivery, event.end, event.error_type, event.seconds, event.replaced)
        self._each_renamed("on_task_finished", event, *earlier)

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self._each("rejected", delivery, error_type)

    def settled(self, settlement: Settlement, seconds: float) -> None:
        self._each("settled", settlement, seconds)

    def dead_lettered(self, settlement: Settlement) -> None:
        self._each("dead_lettered", settlement)

    def on_lease_lost(self, event: LeaseLostEvent) -> None:
        self._each_renamed("on_lease_lost", event, event.delivery)

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        self._each_renamed("on_heartbeat", event, Turn(event.in_flight, event.running, event.unavailable))

    def _around(
        self,
        hook: str,
        enter: Callable[[Observer, Value], AbstractContextManager[Any]],
        take: Callable[[Any, Value], Value],
        value: Value,
    ) -> AbstractContextManager[Value]:
        observers = [observer for observer, _ in self._with[hook]]
        return _Around(observers, enter, take, value, lambda observer, exc: self._report(observer, exc, hook))

    def _each(self, hook: str, *arguments: object) -> None:
        for observer, _ in self._with[hook]:
            self._call(observer, hook, arguments)

    def _each_renamed(self, hook: str, event: object, *earlier: object) -> None:
        """Call a hook by the name that each observer overrides: with the event record, or the earlier arguments."""
        for observer, name in self._with[hook]:
            self._call(observer, name, (event,) if name == hook else earlier)

    def _call(self, observer: Observer, name: str, arguments: tuple[object, ...]) -> None:
        try:
            getattr(observer, name)(*arguments)
        except _RAISED_BY_SIGNALS:
            raise
        except BaseException as exc:
            self._report(observer, exc, name)

    def _report(self, observer: Observer, exc: BaseException, hook: str) -> None:
        """Log that an observer raised: once a minute for each hook and type of error, with the number of the others."""
        key = type(observer).__name__, hook, type(exc).__name__
        if (suppressed := self._reports.admit(key)) is None:
            return
        fields = {"observer": key[0], "hook": hook, "error_type": key[2], "traceback": frames(exc)}
        emit(logger, logging.ERROR, "observer_failed", **fields, **({"suppressed": suppressed} if suppressed else {}))


class _Around(AbstractContextManager[Value]):
    """Enters the context manager of each observer, and exits them in reverse; raises only the errors of the block.

    Args:
        observers: The observers.
        enter: Returns the context manager of an observer, for the current value.
        take: Returns the next value, for the yielded one and the current one; raises if the yielded one is invalid.
        value: The first value.
        report: Logs the error of an observer.
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
        for observer in self._observers:
            try:
                manager = self._enter(observer, value)
                yielded = manager.__enter__()
                self._entered.append((observer, manager))
                value = self._take(yielded, value)
            except _RAISED_BY_SIGNALS:
                raise
            except BaseException as exc:
                self._report(observer, exc)
        return value

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for observer, manager in reversed(self._entered):
            try:
                manager.__exit__(kind, exc, trace)
            except _RAISED_BY_SIGNALS:
                raise
            except BaseException as raised:
                if raised is not exc:
                    self._report(observer, raised)


def _overrides(observer: Observer, hook: str) -> bool:
    try:
        return getattr(getattr(observer, hook), "__func__", None) is not getattr(Observer, hook)
    except AttributeError:
        return False
    except Exception:  # reported when the hook is called
        return True


def _name_to_call(observer: Observer, hook: str, earlier: str) -> str | None:
    """Return which of two names of a hook the more derived class overrides; None if neither is overridden."""
    names = [name for name in (hook, earlier) if _overrides(observer, name)]
    return min(names, key=lambda name: _distance(observer, name), default=None)


def _distance(observer: Observer, name: str) -> int:
    """Return how many classes lie between an observer and the class that overrides a name; -1 for the object itself."""
    kinds = type(observer).__mro__
    return (
        -1
        if name in getattr(observer, "__dict__", {})
        else next((n for n, kind in enumerate(kinds) if name in vars(kind)), -1)
    )


def _with_headers(observed: object, message: Message) -> Message:
    """Return the message with the headers that an observer set; raises PayloadError if the wire cannot carry them."""
    if not isinstance(observed, Message):
        raise PayloadError("expected a Message")
    headers = observed.payload.headers
    if headers is message.payload.headers:
        return message
    checked = None if headers is None else check_headers(headers, "$.headers")
    return attrs.evolve(message, payload=attrs.evolve(message.payload, headers=checked))


def _headers(yielded: object, headers: dict[str, str] | None) -> dict[str, str] | None:
    return headers if yielded is None else check_headers(yielded, "$.headers")
