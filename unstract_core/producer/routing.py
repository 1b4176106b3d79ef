"""Route each dispatch to one of two transports that a gate chooses.

`RoutingDispatcher` migrates a product from one queue to another, one organisation at a time, and back. It does not
cache the gate's answer: a changed flag applies from the next call, and messages that were sent before stay on their
transport.

If the gate fails, the dispatch goes to `off`, and a WARNING is logged. A gate call takes at most `gate_timeout`
seconds. The arguments are passed on unchanged. A failed dispatch is not repeated on the other side, because the task
could run twice.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from unstract_core.errors import ConfigurationError, GateFailed, NotSupported, TransportError
from unstract_core.observability.log_events import LogThrottle, emit
from unstract_core.producer.dispatch import DispatchHandle
from unstract_core.producer.executor import ExecutionContext, ExecutionResult
from unstract_core.signature import Callback
from unstract_core.transport import Reply
from unstract_core.values import type_name

logger = logging.getLogger("unstract_wire.producer")

Gate: TypeAlias = Callable[[ExecutionContext], bool]
"""Returns True for `on` and False for `off`. It is called for each dispatch, on any thread."""

MOST_STUCK = 8
"""The highest number of gate calls that may hang at once; with more, the gate is only tried at intervals."""

QUIET = 60.0
"""Seconds between two warnings about one kind of failure, and between two probes."""

P = ParamSpec("P")
R = TypeVar("R")


class Side(Protocol):
    """One side of a route: the product's three methods, and the status of a dispatch."""

    def dispatch(
        self, context: ExecutionContext, timeout: float | None = None, headers: Mapping[str, Any] | None = None
    ) -> ExecutionResult:
        """Execute, wait, and return the result; every failure is an `ExecutionResult.failure`. Never raises.

        Args:
            context: The execution.
            timeout: The longest wait in seconds; None, the default, takes EXECUTOR_RESULT_TIMEOUT, else 3600.
            headers: The product's headers; None by default.
        """

    def dispatch_async(
        self, context: ExecutionContext, headers: Mapping[str, Any] | None = None, within: object | None = None
    ) -> str:
        """Execute without waiting and without callbacks.

        Args:
            context: The execution.
            headers: The product's headers; None by default.
            within: The caller's open DB-API cursor, whose transaction the dispatch joins; None, the default, for none.

        Returns:
            The id of the dispatch.

        Raises:
            NotSupported: This side cannot join a transaction; nothing was sent.
            ContractError: The enqueue failed; the failure is logged first.
        """

    def dispatch_with_callback(
        self,
        context: ExecutionContext,
        on_success: Callback | None = None,
        on_error: Callback | None = None,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        within: object | None = None,
    ) -> DispatchHandle:
        """Execute, then run a callback.

        Args:
            context: The execution.
            on_success: The callback after a result; None, the default, for none.
            on_error: The callback after an exception; None, the default, for none.
            task_id: The id of the dispatch; None, the default, for a new one.
            headers: The product's headers; None by default.
            within: The caller's open DB-API cursor, whose transaction the dispatch joins; None, the default, for none.

        Returns:
            The handle of the dispatch.

        Raises:
            NotSupported: This side cannot join a transaction; nothing was sent.
            ContractError: The enqueue failed; the failure is logged first.
        """

    def status(self, task_id: str) -> Reply | None:
        """Return the status of a dispatch; None if it is not finished or not known.

        Args:
            task_id: The id of the dispatch.

        Raises:
            NotSupported: This side stores no statuses.
            TransportError: The statuses cannot be read now.
        """


METHODS = ("dispatch", "dispatch_async", "dispatch_with_callback", "status")


def _routed(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[RoutingDispatcher, P], R]:
    """Return a method with the same signature that passes its arguments to the side that the gate chooses."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def passed_on(self: RoutingDispatcher, /, *args: P.args, **kwargs: P.kwargs) -> R:
        context = signature.bind(self, *args, **kwargs).arguments["context"]  # raises TypeError for a wrong call
        made: R = getattr(self._side(context), method.__name__)(*args, **kwargs)
        return made

    return passed_on


class RoutingDispatcher:
    """Calls the product's three methods on the side that the gate chooses. Thread-safe if both sides are.

    The methods have the signatures of `Side`. Arguments that the caller omits are not passed on.
    """

    def __init__(self, *, gate: Gate, on: Side, off: Side, gate_timeout: float | None = 1.0) -> None:
        """Create a dispatcher for two sides.

        With a limit, the gate runs on a new thread for each call, which takes about 0.1 ms. The thread has the caller's
        contextvars, but not its thread-locals.

        Args:
            gate: Called with the context of each dispatch; only the value True chooses `on`.
            on: The side for an open gate.
            off: The side for a closed gate, a failed gate, and a gate that exceeds its limit.
            gate_timeout: The limit of a gate call in seconds; 1 by default. None calls the gate on the caller's thread
                without a limit, and KeyboardInterrupt, SystemExit and GeneratorExit of the gate are raised.

        Raises:
            ConfigurationError: The gate, a side or the limit has the wrong type.
        """
        for name, side in (("on", on), ("off", off)):
            _check_side(name, side)
        self.on = on
        self.off = off
        self._gate_runner = _GateRunner(gate, gate_timeout)

    dispatch = _routed(Side.dispatch)
    dispatch_async = _routed(Side.dispatch_async)
    dispatch_with_callback = _routed(Side.dispatch_with_callback)

    def status(self, task_id: str) -> Reply | None:
        """Return the status of a dispatch from either side, because the gate may have changed since.

        Args:
            task_id: The id of the dispatch.

        Returns:
            The status from `on`, or else from `off`. None if no side has a status: the dispatch is not finished, was
            never sent, has expired, or went to a side that stores no statuses.

        Raises:
            NotSupported: Neither side stores statuses.
            TransportError: One side cannot be asked, and the other has no status.
            ContractError: Any other error of a side, such as PayloadError for an invalid id.
        """
        unavailable: list[TransportError] = []
        unsupported: list[NotSupported] = []
        for side in (self.on, self.off):
            try:
                reply = side.status(task_id)
            except TransportError as exc:
                unavailable.append(exc)
            except NotSupported as exc:
                unsupported.append(exc)
            else:
                if reply is not None:
                    return reply
        if unavailable:
            raise unavailable[0]
        if len(unsupported) == 2:
            raise NotSupported(
                f"neither side stores the status of a task (on: {unsupported[0]}; off: {unsupported[1]}): "
                "use a transport that keeps statuses, or a Celery result backend that every process can read"
            ) from unsupported[-1]
        return None

    def _side(self, context: ExecutionContext) -> Side:
        return self.on if self._gate_runner.is_open(context) else self.off


class _GateFailure(Exception):
    """A failure of the gate.

    Attributes:
        reason: The kind of failure.
        error_type: The name of the type that the gate raised or returned; "" for none.
        code: The provider's error code; "" for none.
    """

    def __init__(self, reason: str, error_type: str = "", code: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.error_type = error_type
        self.code = code


class _GateRunner:
    """Calls the gate within its time limit."""

    def __init__(self, gate: Gate, timeout: float | None) -> None:
        _check_gate(gate)
        _check_timeout(timeout)
        self._gate = gate
        self._timeout = timeout
        self._stuck: set[threading.Thread] = set()  # without a lock, which a forked child could inherit locked
        self._excused = 0
        self._asked_at = -math.inf
        self._warnings = _WarningThrottle()

    def is_open(self, context: ExecutionContext) -> bool:
        """Return whether the gate is open now; False if it fails. Exits of the caller's thread are raised."""
        asked = _gates_being_asked.get()
        token = _gates_being_asked.set((*asked, self))
        try:
            if self in asked:
                raise _GateFailure("asked_within")
            return _ask(self._gate, context) if self._timeout is None else self._ask_on_a_thread(context, self._timeout)
        except _GateFailure as failure:
            self._warnings.warn(failure)
            return False
        finally:
            _gates_being_asked.reset(token)

    def _ask_on_a_thread(self, context: ExecutionContext, timeout: float) -> bool:
        """Call the gate on a new thread, so that no state remains between two calls or across a fork."""
        is_probe = self._has_too_many_stuck()
        if is_probe and not self._may_probe():
            raise _GateFailure("hung")
        self._asked_at = monotonic()
        answers: SimpleQueue[bool | _GateFailure] = SimpleQueue()
        thread = threading.Thread(
            target=copy_context().run,
            args=(_ask_into, self._gate, context, answers),
            name="unstract-gate",
            daemon=True,  # a gate that hangs must not delay the interpreter's exit
        )
        try:
            thread.start()
        except RuntimeError as exc:
            raise _GateFailure("no_thread", type_name(exc)) from exc
        try:
            answer = answers.get(timeout=timeout)
        except BaseException as exc:  # the time limit, or an interrupt of the caller
            self._stuck.add(thread)
            if isinstance(exc, Empty):
                raise _GateFailure("timed_out") from None
            raise
        if is_probe:  # the gate answers again; earlier calls may still hang
            self._excused = len(self._stuck)
        if isinstance(answer, _GateFailure):
            raise answer
        return answer

    def _has_too_many_stuck(self) -> bool:
        """Return whether too many calls of the gate hang to start another one."""
        for thread in tuple(self._stuck):
            if not thread.is_alive():  # as in the child of a fork
                self._stuck.discard(thread)
        self._excused = min(self._excused, len(self._stuck))
        return len(self._stuck) >= self._excused + MOST_STUCK

    def _may_probe(self) -> bool:
        """Return whether to try the gate again; the interval grows with the number of calls that hang."""
        return monotonic() - self._asked_at >= QUIET * (1 + len(self._stuck) - MOST_STUCK)


class _WarningThrottle:
    """Logs each kind of failure at most once in QUIET seconds, with the number of suppressed warnings."""

    def __init__(self) -> None:
        self._reset()

    def warn(self, failure: _GateFailure) -> None:
        """Log a failure, or count it as suppressed."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            suppressed = self._throttle.admit(failure.reason, monotonic())
        if suppressed is not None:
            emit(
                logger,
                logging.WARNING,
                "gate_failed",
                reason=failure.reason,
                error_type=failure.error_type,
                code=failure.code,
                suppressed=suppressed,
                side="off",
            )

    def _reset(self) -> None:
        self._lock = threading.Lock()  # a forked child needs a new one: the old one may stay locked
        self._throttle: LogThrottle[str] = LogThrottle(burst=1, seconds=QUIET)
        self._pid = os.getpid()


_gates_being_asked: ContextVar[tuple[_GateRunner, ...]] = ContextVar("unstract_wire_asking", default=())
"""The gates that this context is calling: a gate that dispatches through its own router would recurse forever."""


def _ask(gate: Gate, context: ExecutionContext) -> bool:
    try:
        answer = gate(context)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exc:  # some providers raise errors that are no Exception
        raise _failure_of(exc) from exc
    if answer is True or answer is False:
        return answer
    raise _GateFailure("no_bool", type_name(answer))


def _ask_into(gate: Gate, context: ExecutionContext, answers: SimpleQueue[bool | _GateFailure]) -> None:
    try:
        answers.put(_ask(gate, context))
    except _GateFailure as failure:
        answers.put(failure)
    except BaseException as exc:  # an exit ends only this thread, not the caller's
        answers.put(_failure_of(exc))


def _failure_of(exc: BaseException) -> _GateFailure:
    return _GateFailure("raised", type_name(exc), exc.code if isinstance(exc, GateFailed) else "")


def _check_gate(gate: object) -> None:
    if isinstance(gate, type) or not callable(gate):
        kind = f"the class {gate.__name__}" if isinstance(gate, type) else f"a {type(gate).__name__}"
        raise ConfigurationError(
            f"gate must be a function that takes an execution context and returns a bool, not {kind}"
        )
    if inspect.iscoroutinefunction(gate) or inspect.iscoroutinefunction(type(gate).__call__):
        raise ConfigurationError("gate is a coroutine function, which is not awaited; pass a plain function")


def _check_side(name: str, side: object) -> None:
    if isinstance(side, type):
        raise ConfigurationError(f"{name} is the class {side.__name__}; pass an instance of it")
    missing = [method for method in METHODS if not callable(getattr(side, method, None))]
    if missing:
        raise ConfigurationError(
            f"{name} is a {type(side).__name__}, which has no {', '.join(missing)}; "
            "pass an ExecutorDispatcher, a CeleryAppDispatcher, or an object with the same methods"
        )


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX:  # type: ignore[operator]  # a number
        raise ConfigurationError(f"gate_timeout must be a positive number of seconds, or None, not {timeout!r}")
