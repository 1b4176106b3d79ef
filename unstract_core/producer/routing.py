"""Two ways to run an executor, and a gate that says at every call which of them is taken.

`RoutingDispatcher` moves a product from one queue to another, one organisation at a time, and back at once: nothing
about the gate's answer is kept, so a flip counts from the next call, while work in flight stays where it was sent.

It fails closed. Whatever is wrong with the gate means `off`, as if it had said no, and one WARNING tells of it; a gate
can cost a caller its limit and no more. It routes whole calls: the caller's arguments reach the side that is taken as
they are, checked by nobody here, and a failed dispatch is never tried on the other side, which might do it twice.
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
"""Says whether a dispatch goes `on` (True) or `off` (False). It is asked at every call, on any thread."""

MOST_STUCK = 8
"""While so many calls of a gate run on past their limit it is not asked, but for a probe now and then."""

QUIET = 60.0
"""Seconds between two warnings about the same kind of failure."""

P = ParamSpec("P")
R = TypeVar("R")


class Side(Protocol):
    """One way to run an executor: the product's three methods, and what became of a dispatch."""

    def dispatch(
        self, context: ExecutionContext, timeout: float | None = None, headers: Mapping[str, Any] | None = None
    ) -> ExecutionResult:
        """Execute and wait, `timeout` seconds (else EXECUTOR_RESULT_TIMEOUT, else 3600).

        Never raises: whatever goes wrong, the enqueue included, becomes `ExecutionResult.failure`.
        """

    def dispatch_async(
        self, context: ExecutionContext, headers: Mapping[str, Any] | None = None, within: object | None = None
    ) -> str:
        """Execute without waiting or callbacks; returns the id. Lets an enqueue failure out, after logging it.

        `within` is the caller's own open DB-API cursor, whose transaction the dispatch joins; a side that cannot join
        one raises NotSupported, and nothing is sent.
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
        """Execute, then run a callback; `task_id` is the handle's id. Lets an enqueue failure out, after logging it.

        `within` is that of `dispatch_async`.
        """

    def status(self, task_id: str) -> Reply | None:
        """Return what became of a dispatch; None when nothing is known of it (yet).

        Raises NotSupported where that cannot be known here, TransportError where it cannot be asked now.
        """


METHODS = ("dispatch", "dispatch_async", "dispatch_with_callback", "status")


def _routed(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[RoutingDispatcher, P], R]:
    """Make a method of the same signature, whose call is made on the side that the gate names, exactly as it came."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def passed_on(self: RoutingDispatcher, /, *args: P.args, **kwargs: P.kwargs) -> R:
        context = signature.bind(self, *args, **kwargs).arguments["context"]  # refuses a wrong call before the gate
        made: R = getattr(self._side(context), method.__name__)(*args, **kwargs)
        return made

    return passed_on


class RoutingDispatcher:
    """The product's three methods, each call on the side that the gate names for it. Thread-safe where both sides are.

    The methods have the signatures of `Side` and do what it says; what the caller did not pass is not passed on.
    """

    def __init__(self, *, gate: Gate, on: Side, off: Side, gate_timeout: float | None = 1.0) -> None:
        """Route to `on` where `gate(context)` is exactly True within `gate_timeout` seconds, and else to `off`.

        The limit costs a thread for each call, about 0.1 ms: the gate runs there with the caller's contextvars, and
        with thread-locals of its own. None asks the gate on the caller's thread, for as long as it takes; then
        KeyboardInterrupt, SystemExit and GeneratorExit pass.

        Raises ConfigurationError for what cannot work.
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
        """Return what became of a dispatch, whichever side it went to: the gate may have flipped since.

        `on` is asked, then `off`; the first that has an answer gives it. None means that every side that can know was
        asked, and none knows of an end: the work is not finished, or was never sent, or is forgotten (or it went to
        a side that never knows, where the other does).

        Raises NotSupported when neither side can know, and a side's own TransportError when it could not be asked
        while the other has no answer: the work may have ended there, and None would deny it. Anything else that a
        side raises, such as PayloadError for an id that cannot be one, is let out at once.
        """
        away: list[TransportError] = []
        unable: list[NotSupported] = []
        for side in (self.on, self.off):
            try:
                reply = side.status(task_id)
            except TransportError as exc:
                away.append(exc)
            except NotSupported as exc:
                unable.append(exc)
            else:
                if reply is not None:
                    return reply
        if away:
            raise away[0]
        if len(unable) == 2:
            raise NotSupported(
                f"neither side can tell what became of a task (on: {unable[0]}; off: {unable[1]}): "
                "use a transport that keeps statuses, or a Celery result backend that every process can read"
            ) from unable[-1]
        return None

    def _side(self, context: ExecutionContext) -> Side:
        return self.on if self._gate_runner.is_open(context) else self.off


class _GateFailure(Exception):
    """What is wrong with the gate: the kind, the name of the type that it raised or returned, its provider's code."""

    def __init__(self, reason: str, error_type: str = "", code: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.error_type = error_type
        self.code = code


class _GateRunner:
    """Asks the gate, within its limit, and takes nothing but a plain True for a yes."""

    def __init__(self, gate: Gate, timeout: float | None) -> None:
        _check_gate(gate)
        _check_timeout(timeout)
        self._gate = gate
        self._timeout = timeout
        self._stuck: set[threading.Thread] = set()  # without a lock, which a fork might leave held
        self._excused = 0
        self._asked_at = -math.inf
        self._warnings = _WarningThrottle()

    def is_open(self, context: ExecutionContext) -> bool:
        """Return whether the gate is open now. Raises nothing of the gate's own, but what ends the caller itself."""
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
        """Ask on a thread of its own, new for each call: it keeps nothing between two calls, nor across a fork."""
        is_probe = self._has_too_many_stuck()
        if is_probe and not self._may_probe():
            raise _GateFailure("hung")
        self._asked_at = monotonic()
        answers: SimpleQueue[bool | _GateFailure] = SimpleQueue()
        thread = threading.Thread(
            target=copy_context().run,
            args=(_ask_into, self._gate, context, answers),
            name="unstract-gate",
            daemon=True,  # one that hangs must not hold up the interpreter's exit
        )
        try:
            thread.start()
        except RuntimeError as exc:
            raise _GateFailure("no_thread", type_name(exc)) from exc
        try:
            answer = answers.get(timeout=timeout)
        except BaseException as exc:  # the limit, or whatever interrupts the caller
            self._stuck.add(thread)
            if isinstance(exc, Empty):
                raise _GateFailure("timed_out") from None
            raise
        if is_probe:  # it answers again, and what still hangs is of another time
            self._excused = len(self._stuck)
        if isinstance(answer, _GateFailure):
            raise answer
        return answer

    def _has_too_many_stuck(self) -> bool:
        """Whether too many calls hang to make another."""
        for thread in tuple(self._stuck):
            if not thread.is_alive():  # as it is in the child of a fork
                self._stuck.discard(thread)
        self._excused = min(self._excused, len(self._stuck))
        return len(self._stuck) >= self._excused + MOST_STUCK

    def _may_probe(self) -> bool:
        """Whether it is time to see if the gate has been mended: the more calls hang, the more seldom."""
        return monotonic() - self._asked_at >= QUIET * (1 + len(self._stuck) - MOST_STUCK)


class _WarningThrottle:
    """Warns of each kind of failure at most once in QUIET seconds, and says how many warnings were held back."""

    def __init__(self) -> None:
        self._reset()

    def warn(self, failure: _GateFailure) -> None:
        """Log it, or count it."""
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
        self._lock = threading.Lock()  # a new one in the child of a fork, where the old one may be held for ever
        self._throttle: LogThrottle[str] = LogThrottle(burst=1, seconds=QUIET)
        self._pid = os.getpid()


_gates_being_asked: ContextVar[tuple[_GateRunner, ...]] = ContextVar("unstract_wire_asking", default=())
"""Whose gates are being asked in this context: one that dispatches through its own router would never end."""


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
    except BaseException as exc:  # even an exit is the gate's here: the caller's own thread goes on
        answers.put(_failure_of(exc))


def _failure_of(exc: BaseException) -> _GateFailure:
    return _GateFailure("raised", type_name(exc), exc.code if isinstance(exc, GateFailed) else "")


def _check_gate(gate: object) -> None:
    if isinstance(gate, type) or not callable(gate):
        what = f"the class {gate.__name__}" if isinstance(gate, type) else f"a {type(gate).__name__}"
        raise ConfigurationError(f"gate must be callable with an execution context and return a bool; it is {what}")
    if inspect.iscoroutinefunction(gate) or inspect.iscoroutinefunction(type(gate).__call__):
        raise ConfigurationError("gate is a coroutine function, whose answer nobody would await; pass a plain function")


def _check_side(name: str, side: object) -> None:
    if isinstance(side, type):
        raise ConfigurationError(f"{name} is the class {side.__name__}; pass an object of it")
    missing = [method for method in METHODS if not callable(getattr(side, method, None))]
    if missing:
        raise ConfigurationError(
            f"{name} is a {type(side).__name__}, which has no {', '.join(missing)}; "
            "pass an ExecutorDispatcher, a CeleryAppDispatcher, or what has the same methods"
        )


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX:  # type: ignore[operator]  # a number
        raise ConfigurationError(f"gate_timeout must be a positive number of seconds, or None, not {timeout!r}")
