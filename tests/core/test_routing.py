"""RoutingDispatcher: the side of each call, unchanged arguments, and the cost of a failing gate."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import attrs
import pytest
import strategies as some
from core.recording import RecordingTransport
from hypothesis import given
from hypothesis import strategies as st

import unstract_core
from unstract_core import (
    ConfigurationError,
    Dispatcher,
    DispatchHandle,
    ExecutionResult,
    ExecutorDispatcher,
    FairnessKey,
    GateFailed,
    NotSupported,
    PayloadError,
    Reply,
    RoutingDispatcher,
    TransportError,
    TransportRefused,
    TransportUnavailable,
)
from unstract_core.producer import routing

CONTENT = "the contents of the document"
METHODS = ["dispatch", "dispatch_async", "dispatch_with_callback"]


@attrs.frozen
class Context:
    """An execution context like the product's."""

    executor_name: str = "legacy"
    organization_id: str | None = None
    run_id: str = "run-1"

    def to_dict(self) -> dict[str, Any]:
        return {"executor_params": {"text": CONTENT}}


class Spy:
    """A side that records each call and returns an object of its own."""

    def __init__(self, status: Any = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answer: Any = object()
        self._status = status

    def _called(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((method, args, kwargs))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    dispatch = functools.partialmethod(_called, "dispatch")
    dispatch_async = functools.partialmethod(_called, "dispatch_async")
    dispatch_with_callback = functools.partialmethod(_called, "dispatch_with_callback")

    def status(self, task_id: str) -> Reply | None:
        if isinstance(self._status, BaseException):
            raise self._status
        return self._status  # type: ignore[no-any-return]


def routed(gate: Any, *, on: Any = None, off: Any = None, **options: Any) -> tuple[RoutingDispatcher, Any, Any]:
    """Return a dispatcher over two spies, or over the given sides."""
    on, off = on or Spy(), off or Spy()
    return RoutingDispatcher(gate=gate, on=on, off=off, **options), on, off


def is_off(gate: Any, **options: Any) -> bool:
    """Return whether a call goes to the side `off`, and only there."""
    dispatcher, on, off = routed(gate, **options)
    dispatcher.dispatch_async(Context())
    assert len(on.calls) + len(off.calls) == 1
    return len(off.calls) == 1


@contextlib.contextmanager
def warnings_of(count: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """Collect the fields of the router's events, each of which must be a WARNING without content."""
    found: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert (record.levelno, vars(record)["wire.event"]) == (logging.WARNING, "gate_failed")
            assert CONTENT not in f"{record.getMessage()}{vars(record)}"
            found.append({key.removeprefix("wire."): v for key, v in vars(record).items() if key.startswith("wire.")})

    logger, handler = logging.getLogger("unstract_wire.producer"), Handler()
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
    assert count is None or len(found) == count


def answers(*given_answers: Any) -> Callable[[Any], Any]:
    """Return a gate that gives these answers in turn."""
    left = iter(given_answers)
    return lambda context: next(left)


def is_open(context: Any) -> bool:
    return True


def raises(*_: object) -> NoReturn:
    raise RuntimeError(CONTENT)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Return an event on which gates hang; it is set at the end, so that no thread outlives the test."""
    event = threading.Event()
    yield event
    event.set()


# Unchanged calls.


@pytest.mark.parametrize("method", [*METHODS, "status"])
def test_router_has_the_signatures_of_the_product(method: str) -> None:
    """The router's methods have the signatures of a dispatcher's, also for `inspect`."""
    signature = inspect.signature(getattr(RoutingDispatcher, method))
    assert signature == inspect.signature(getattr(ExecutorDispatcher, method))


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Draw a call of one of the three methods, with arguments by position, by name or omitted."""
    method = draw(st.sampled_from(METHODS))
    names = list(inspect.signature(getattr(ExecutorDispatcher, method)).parameters)[1:]
    positional = draw(st.integers(0, len(names)))
    named = draw(st.lists(st.sampled_from(names[positional:]), unique=True)) if names[positional:] else []
    if not positional and "context" not in named:
        named.append("context")
    values = {name: draw(st.just(None) | st.builds(object)) for name in names}
    return method, tuple(values[name] for name in names[:positional]), {name: values[name] for name in named}


@given(calls(), st.booleans(), st.sampled_from([1.0, None]))
def test_call_reaches_its_side_unchanged(
    call: tuple[str, tuple[Any, ...], dict[str, Any]], answer: bool, gate_timeout: float | None
) -> None:
    """The side gets the same objects in the same form, and no argument that the caller omitted."""
    method, args, kwargs = call
    asked: list[Any] = []

    def gate(context: Any) -> bool:
        asked.append(context)
        return answer

    dispatcher, on, off = routed(gate, gate_timeout=gate_timeout)
    taken, other = (on, off) if answer else (off, on)
    assert getattr(dispatcher, method)(*args, **kwargs) is taken.answer
    ((got_method, got_args, got_kwargs),) = taken.calls
    assert (got_method, len(got_args), list(got_kwargs)) == (method, len(args), list(kwargs))
    assert all(got is sent for got, sent in zip(got_args, args, strict=True))
    assert all(got_kwargs[name] is sent for name, sent in kwargs.items())
    assert other.calls == []
    assert len(asked) == 1
    assert asked[0] is (args[0] if args else kwargs["context"])


@given(st.lists(st.booleans(), max_size=12), st.sampled_from([1.0, None]))
def test_gate_is_called_for_every_dispatch(said: list[bool], gate_timeout: float | None) -> None:
    """The gate's answer is not cached, so that a changed flag applies from the next call."""
    dispatcher, on, off = routed(answers(*said), gate_timeout=gate_timeout)
    order = []
    for number, _ in enumerate(said):
        before = len(on.calls)
        getattr(dispatcher, METHODS[number % 3])(Context())
        order.append(len(on.calls) > before)
    assert order == said
    assert (len(on.calls), len(off.calls)) == (sum(said), len(said) - sum(said))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("failure", [TransportRefused("no"), PayloadError("no"), KeyboardInterrupt()], ids=repr)
def test_error_of_a_side_is_not_retried_elsewhere(method: str, answer: bool, failure: BaseException) -> None:
    """A failed dispatch may have taken effect, so the other side is not called."""
    dispatcher, on, off = routed(lambda context: answer)
    on.answer = off.answer = failure
    with warnings_of(0), pytest.raises(type(failure)) as caught:
        getattr(dispatcher, method)(Context())
    assert caught.value is failure
    assert len(on.calls) + len(off.calls) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((Context(),), {"nope": 1}), (range(9), {})], ids=repr)
def test_wrong_call_is_a_type_error(method: str, args: Any, kwargs: Any) -> None:
    """A call with wrong arguments raises TypeError before the gate is called."""
    dispatcher, on, off = routed(lambda context: pytest.fail("asked"), gate_timeout=None)
    with pytest.raises(TypeError):
        getattr(dispatcher, method)(*args, **kwargs)
    assert on.calls == off.calls == []


def test_router_can_be_a_side_of_a_router() -> None:
    """A router has the methods of a side."""
    inner, on, off = routed(is_open)
    RoutingDispatcher(gate=is_open, on=inner, off=off).dispatch(Context(), timeout=3)
    assert on.calls == [("dispatch", (Context(),), {"timeout": 3})]


# Failures of the gate.

not_bools = st.one_of(
    some.anything.filter(lambda value: type(value) is not bool),
    st.sampled_from([1, 0, 1.0, "true", "True", b"1", [True], (True,), None, NotImplemented, bool, is_open]),
)


@given(not_bools, st.sampled_from([1.0, None]))
def test_only_true_opens_the_gate(answer: Any, gate_timeout: float | None) -> None:
    """Any answer that is not a bool means off, and a WARNING names its type."""
    with warnings_of(1) as found:
        assert is_off(lambda context: answer, gate_timeout=gate_timeout)
    assert found[0]["reason"] == "no_bool"
    assert found[0]["error_type"] == type(answer).__name__


def test_answer_of_an_unnameable_type_means_off() -> None:
    """A type that raises when its name is read means off."""

    class Meta(type):
        __name__ = property(raises)

        def __instancecheck__(cls, instance: object) -> bool:
            raise RuntimeError(CONTENT)

    class Hostile(metaclass=Meta):
        __bool__ = __eq__ = __hash__ = raises
        __class__ = property(raises)

    with warnings_of(1):
        assert is_off(lambda context: Hostile())


class Oddity(Exception):
    __str__ = __repr__ = raises


@pytest.mark.parametrize("gate_timeout", [1.0, None])
@pytest.mark.parametrize(
    "error",
    [ValueError(CONTENT), ConnectionError(CONTENT), TimeoutError(), StopIteration(), Oddity(CONTENT), RecursionError()],
    ids=lambda error: type(error).__name__,
)
def test_gate_that_raises_means_off(error: Exception, gate_timeout: float | None) -> None:
    """The WARNING has the error's type and not its text."""

    def gate(context: Any) -> bool:
        raise error

    with warnings_of(1) as found:
        assert is_off(gate, gate_timeout=gate_timeout)
    assert found[0] == {
        "event": "gate_failed", "reason": "raised", "error_type": type(error).__name__, "code": "",
        "suppressed": 0, "side": "off",
    }  # fmt: skip


def test_warning_has_the_code_of_gate_failed() -> None:
    """The WARNING has the provider's error code of a GateFailed."""

    def gate(context: Any) -> bool:
        raise GateFailed(CONTENT, code="FLAG_NOT_FOUND")

    with warnings_of(1) as found:
        assert is_off(gate)
    assert (found[0]["error_type"], found[0]["code"]) == ("GateFailed", "FLAG_NOT_FOUND")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exit_on_the_callers_thread_is_raised(error: type[BaseException]) -> None:
    """Without a limit the gate runs on the caller's thread, and its interrupts and exits are raised."""

    def gate(context: Any) -> bool:
        raise error

    dispatcher, on, off = routed(gate, gate_timeout=None)
    with warnings_of(0), pytest.raises(error):
        dispatcher.dispatch(Context())
    assert on.calls == off.calls == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exit_on_the_gates_thread_means_off(error: type[BaseException]) -> None:
    """On its own thread, every exception of the gate is a failure of the gate."""

    def gate(context: Any) -> bool:
        raise error

    with warnings_of(1) as found:
        assert is_off(gate)
    assert found[0]["error_type"] == error.__name__


class Interrupted(Exception):
    """An exception of a signal handler, such as Celery's soft time limit."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_interrupt_of_the_caller_is_raised(error: type[BaseException], released: threading.Event) -> None:
    """An interrupt of the caller's thread while the gate hangs is raised, and nothing is dispatched."""

    def interrupt(*_: object) -> NoReturn:
        raise error

    dispatcher, on, off = routed(lambda context: released.wait(), gate_timeout=30.0)
    main = threading.main_thread().ident or 0
    usual = signal.signal(signal.SIGUSR1, interrupt)
    alarm = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGUSR1))
    try:
        alarm.start()
        with warnings_of(0), pytest.raises(error):
            dispatcher.dispatch(Context())
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR1, usual)
    assert on.calls == off.calls == []


# The limit.


def test_hanging_gate_means_off_after_its_limit(released: threading.Event) -> None:
    """After `gate_timeout` seconds the call goes off with a WARNING, and a later answer is ignored."""
    dispatcher, on, off = routed(lambda context: released.wait(), gate_timeout=0.05)
    started = time.monotonic()
    with warnings_of(1) as found:
        dispatcher.dispatch(Context())
        assert 0.05 <= time.monotonic() - started < 5
        released.set()
        time.sleep(0.05)
    assert found[0]["reason"] == "timed_out"
    assert (len(on.calls), len(off.calls)) == (0, 1)


def test_gate_is_not_called_while_many_calls_hang(released: threading.Event) -> None:
    """While eight calls exceed the limit, the next ones go off at once; after they end, the gate is called again."""
    asked = itertools.count()

    def gate(context: Any) -> bool:
        next(asked)
        return released.wait()

    dispatcher, on, off = routed(gate, gate_timeout=0.02)
    before = threading.active_count()
    with warnings_of(2) as found:
        for _ in range(routing.MOST_STUCK):
            dispatcher.dispatch_async(Context())
        started = time.monotonic()
        for _ in range(1000):
            dispatcher.dispatch_async(Context())
    assert time.monotonic() - started < 1000 * 0.02
    assert threading.active_count() - before <= routing.MOST_STUCK
    assert next(asked) == routing.MOST_STUCK
    assert [each["reason"] for each in found] == ["timed_out", "hung"]
    assert (len(on.calls), len(off.calls)) == (0, routing.MOST_STUCK + 1000)
    released.set()
    deadline = time.monotonic() + 10
    while not on.calls and time.monotonic() < deadline:
        dispatcher.dispatch_async(Context())
    assert on.calls


def test_repaired_gate_is_called_despite_hanging_calls(released: threading.Event) -> None:
    """After a minute a probe is let through; if it is answered, the gate is called as before."""
    mended = threading.Event()
    dispatcher, on, _ = routed(lambda context: mended.is_set() or released.wait(), gate_timeout=0.02)
    clock = types.SimpleNamespace(now=1000.0)
    with warnings_of(), mock.patch.object(routing, "monotonic", side_effect=lambda: clock.now):
        for _ in range(routing.MOST_STUCK):
            dispatcher.dispatch_async(Context())
        mended.set()
        dispatcher.dispatch_async(Context())
        assert not on.calls
        clock.now += routing.QUIET
        dispatcher.dispatch_async(Context())
        dispatcher.dispatch_async(Context())
    assert len(on.calls) == 2


def test_broken_gate_is_probed_at_growing_intervals(released: threading.Event) -> None:
    """Each hanging probe keeps a thread, so the interval between probes grows."""
    asked = itertools.count()

    def gate(context: Any) -> bool:
        next(asked)
        return released.wait()

    dispatcher, _, _ = routed(gate, gate_timeout=0.01)
    clock = types.SimpleNamespace(now=1000.0)
    with warnings_of(), mock.patch.object(routing, "monotonic", side_effect=lambda: clock.now):
        for _ in range(24 * 60):
            dispatcher.dispatch_async(Context())
            clock.now += routing.QUIET
    assert routing.MOST_STUCK < next(asked) < 100


@pytest.mark.parametrize("gate_timeout", [1.0, None])
def test_recursive_dispatch_of_a_gate_means_off(gate_timeout: float | None) -> None:
    """A gate that dispatches through its own router is called once, and its own dispatch goes off."""
    asked = []

    def gate(context: Any) -> bool:
        asked.append(context)
        dispatcher.dispatch_async(Context())
        return True

    dispatcher, on, off = routed(gate, gate_timeout=gate_timeout)
    with warnings_of(1) as found:
        dispatcher.dispatch_async(Context())
    assert (len(asked), len(on.calls), len(off.calls)) == (1, 1, 1)
    assert found[0]["reason"] == "asked_within"


class Panic(BaseException):
    """An exception of a provider that is written in another language."""


@pytest.mark.parametrize("gate_timeout", [1.0, None])
def test_any_exception_of_a_gate_means_off(gate_timeout: float | None) -> None:
    """A BaseException means off too, on the gate's own thread and on the caller's."""

    def gate(context: Any) -> bool:
        raise Panic

    dispatcher, on, off = routed(gate, gate_timeout=gate_timeout)
    with warnings_of(1) as found:
        dispatcher.dispatch_async(Context())
    assert (len(on.calls), len(off.calls)) == (0, 1)
    assert (found[0]["reason"], found[0]["error_type"]) == ("raised", "Panic")


def test_failed_thread_start_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the system's limit of threads, or at the interpreter's exit, a dispatch goes off."""

    def start(self: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    dispatcher, on, off = routed(is_open)
    with monkeypatch.context() as patched, warnings_of(1) as found:
        patched.setattr(threading.Thread, "start", start)
        dispatcher.dispatch(Context())
    assert (found[0]["reason"], found[0]["error_type"]) == ("no_thread", "RuntimeError")
    assert (len(on.calls), len(off.calls)) == (0, 1)


variable = contextvars.ContextVar("variable", default="default")


@pytest.mark.parametrize("gate_timeout", [1.0, None])
def test_gate_sees_the_context_variables_of_the_caller(gate_timeout: float | None) -> None:
    """The state of a request, such as OpenFeature's transaction context, reaches the gate."""

    def gate(context: Any) -> bool:
        return variable.get() == "the caller's"

    token = variable.set("the caller's")
    try:
        assert not is_off(gate, gate_timeout=gate_timeout)
    finally:
        variable.reset(token)
    with warnings_of(0):
        assert is_off(gate, gate_timeout=gate_timeout)


@pytest.mark.parametrize(("gate_timeout", "aside"), [(1.0, True), (None, False)])
def test_only_a_limit_needs_a_thread(gate_timeout: float | None, aside: bool) -> None:
    """With a limit the gate runs on a new daemon thread for each call; without one, on the caller's thread."""
    ran: list[threading.Thread] = []

    def gate(context: Any) -> bool:
        ran.append(threading.current_thread())
        return True

    dispatcher, _, _ = routed(gate, gate_timeout=gate_timeout)
    for _ in range(3):
        dispatcher.dispatch(Context())
    assert len({*ran, threading.current_thread()}) == (4 if aside else 1)
    assert all(thread.daemon for thread in ran) or not aside


def test_router_works_in_a_forked_child(released: threading.Event) -> None:
    """Calls that hung before the fork do not count in the child, and the child logs its own warnings."""
    hanging = [True]
    dispatcher, on, _ = routed(lambda context: released.wait() if hanging else True, gate_timeout=0.25)
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)

    def child() -> None:
        dispatcher.dispatch(Context())
        hanging.append(True)
        with warnings_of() as found:
            dispatcher.dispatch(Context())
        theirs.send((len(on.calls), [each["reason"] for each in found]))

    with mock.patch.object(routing, "MOST_STUCK", 2):
        with warnings_of(2):
            for _ in range(3):
                dispatcher.dispatch(Context())
        hanging.clear()
        process = fork.Process(target=child, daemon=True)
        with dispatcher._gate_runner._warnings._lock:  # as another thread may hold it at that moment
            process.start()
    try:
        assert mine.poll(10), "the child did not answer"
        assert mine.recv() == (1, ["timed_out"])
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_hanging_gate_does_not_delay_the_exit() -> None:
    """A process whose gate hangs ends when its work is done."""
    script = """
import threading
from unstract_core import RoutingDispatcher
class Side:
    def dispatch_async(self, context): return "off"
    dispatch = dispatch_with_callback = status = dispatch_async
side = Side()
router = RoutingDispatcher(gate=lambda c: threading.Event().wait(), on=side, off=side, gate_timeout=0.05)
print(router.dispatch_async("context"))
"""
    root = str(Path(unstract_core.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert ended.stdout == "off\n"
    assert "Traceback" not in ended.stderr


# The warning.


@contextlib.contextmanager
def clock() -> Iterator[types.SimpleNamespace]:
    """Return the router's clock, which the test sets."""
    hand = types.SimpleNamespace(now=1000.0)
    with mock.patch.object(routing, "monotonic", side_effect=lambda: hand.now):
        yield hand


@given(st.lists(st.tuples(st.sampled_from(["raised", "no_bool", None]), st.sampled_from([0.0, 1.0, 30.0, 60.0, 61.0]))))
def test_warning_is_logged_once_a_minute(
    steps: list[tuple[str | None, float]],
) -> None:
    """Each kind of failure is logged at most once a minute, with the number of suppressed warnings."""
    gates: dict[str | None, Callable[[Any], Any]] = {"raised": raises, "no_bool": lambda c: 1, None: is_open}
    kind: str | None = None
    dispatcher, _, _ = routed(lambda context: gates[kind](context), gate_timeout=None)
    last: dict[str, float] = {}
    held_back: dict[str, int] = {}
    with clock() as hand, warnings_of() as found:
        for kind, passes in steps:
            hand.now += passes
            before = len(found)
            dispatcher.dispatch(Context())
            new = found[before:]
            if kind is None or hand.now - last.get(kind, -1e9) < 60:
                assert new == []
                held_back[kind or ""] = held_back.get(kind or "", 0) + 1
            else:
                assert [(each["reason"], each["suppressed"]) for each in new] == [(kind, held_back.get(kind, 0))]
                last[kind], held_back[kind] = hand.now, 0


def test_many_threads_log_one_warning() -> None:
    """The limit holds across threads, and every suppressed warning is counted."""
    dispatcher, _, off = routed(raises, gate_timeout=None)
    with clock() as hand, warnings_of(2) as found:
        threads = [
            threading.Thread(target=lambda: [dispatcher.dispatch_async(Context()) for _ in range(100)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hand.now += 60
        dispatcher.dispatch(Context())
    assert [each["suppressed"] for each in found] == [0, 799]
    assert len(off.calls) == 801


def test_each_router_logs_its_own_warnings() -> None:
    """The failures of one router's gate do not suppress another's."""
    with warnings_of(2):
        assert is_off(raises)
        assert is_off(raises)


# Invalid arguments.


async def coroutine(context: Any) -> bool:
    return True


class AsyncGate:
    async def __call__(self, context: Any) -> bool:
        return True


class Half:
    dispatch = dispatch_async = raises


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no gate": ({"gate": None}, "gate"),
    "gate is a bool": ({"gate": True}, "gate .* a bool"),
    "gate is a class": ({"gate": AsyncGate}, "the class AsyncGate"),
    "gate is a coroutine": ({"gate": coroutine}, "coroutine"),
    "gate's call is a coroutine": ({"gate": AsyncGate()}, "coroutine"),
    "gate is a partial coroutine": ({"gate": functools.partial(coroutine)}, "coroutine"),
    "no on": ({"on": None}, "on is a NoneType.*dispatch, dispatch_async"),
    "no off": ({"off": None}, "off is a NoneType"),
    "off lacks methods": ({"off": Half()}, "off .*no dispatch_with_callback, status"),
    "on is a class": ({"on": Spy}, "on is the class Spy"),
    "off is a dispatcher": ({"off": Dispatcher(RecordingTransport())}, "off is a Dispatcher"),
    "no time at all": ({"gate_timeout": 0}, "gate_timeout .* not 0"),
    "negative": ({"gate_timeout": -1.0}, "gate_timeout"),
    "nan": ({"gate_timeout": float("nan")}, "gate_timeout"),
    "infinite": ({"gate_timeout": float("inf")}, "gate_timeout"),
    "too long": ({"gate_timeout": 1e12}, "gate_timeout"),
    "a bool": ({"gate_timeout": True}, "gate_timeout"),
    "text": ({"gate_timeout": "1"}, "gate_timeout .* not '1'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_router_argument_is_rejected(name: str) -> None:
    """A ConfigurationError names the argument and its fault."""
    changed, text = WRONG[name]
    with pytest.raises(ConfigurationError, match=text):
        RoutingDispatcher(**{"gate": is_open, "on": Spy(), "off": Spy(), **changed})


@pytest.mark.parametrize("gate_timeout", [1, 0.001, 3600, threading.TIMEOUT_MAX, None])
def test_any_valid_limit_is_accepted(gate_timeout: float | None) -> None:
    """Every limit that passes the check works."""
    dispatcher, on, off = routed(is_open, gate_timeout=gate_timeout)
    dispatcher.dispatch(Context())
    assert len(on.calls) + len(off.calls) == 1


# The status.

DONE = Reply("t", "completed", result=1)
FAILED = Reply("t", "failed", error="E: no")
OUTCOMES: dict[str, Any] = {
    "done": DONE,
    "failed": FAILED,
    "nothing": None,
    "unable": NotSupported("keeps no statuses"),
    "away": TransportUnavailable("away"),
    "not ready": TransportError("no table"),
}


@pytest.mark.parametrize("on", OUTCOMES)
@pytest.mark.parametrize("off", OUTCOMES)
@pytest.mark.parametrize("gate", [is_open, raises])
def test_status_is_that_of_either_side(on: str, off: str, gate: Any) -> None:
    """Both sides are asked, independent of the gate; the first status counts, and None is never wrong."""
    dispatcher, _, _ = routed(gate, on=Spy(OUTCOMES[on]), off=Spy(OUTCOMES[off]))
    replies = [OUTCOMES[side] for side in (on, off) if isinstance(OUTCOMES[side], Reply)]
    errors = [OUTCOMES[side] for side in (on, off) if isinstance(OUTCOMES[side], TransportError)]
    with warnings_of(0):
        if replies:
            assert dispatcher.status("t") is replies[0]
        elif errors:
            with pytest.raises(TransportError) as caught:
                dispatcher.status("t")
            assert caught.value is errors[0]
        elif on == off == "unable":
            with pytest.raises(NotSupported, match=r"keeps no statuses.*result backend"):
                dispatcher.status("t")
        else:
            assert dispatcher.status("t") is None


def test_other_error_of_a_status_is_raised() -> None:
    """An error other than NotSupported and TransportError is raised at once, such as that of an invalid id."""
    dispatcher, _, _ = routed(is_open, on=Spy(PayloadError("no id")), off=Spy(DONE))
    with pytest.raises(PayloadError, match="no id"):
        dispatcher.status("t")


@given(some.names)
def test_status_of_an_executor_dispatcher_is_the_transports(task_id: str) -> None:
    """ExecutorDispatcher returns its transport's status and raises its errors."""
    transport = RecordingTransport(answer=DONE)
    assert ExecutorDispatcher(Dispatcher(transport)).status(task_id) == attrs.evolve(DONE, key=task_id)
    assert transport.replies == [{"key": task_id, "timeout": 0, "consume": False}]
    away = TransportUnavailable("away")
    with pytest.raises(TransportUnavailable, match="away"):
        ExecutorDispatcher(Dispatcher(RecordingTransport(reply_failure=away))).status(task_id)


# Headers on the side without Celery.


@given(st.none() | some.fairness_keys, st.dictionaries(some.names, some.json_values, max_size=3), st.booleans())
def test_headers_work_on_both_sides(key: FairnessKey | None, others: dict[str, Any], is_on: bool) -> None:
    """The side `on` takes the fairness from the headers, and the side `off` gets the same object."""
    headers = {**others, **({"x-fairness-key": attrs.asdict(key)} if key else {})}
    before = repr(headers)
    transport = RecordingTransport(answer=Reply("", "completed", result=ExecutionResult(success=True).to_dict()))
    dispatcher, _, off = routed(lambda context: is_on, on=ExecutorDispatcher(Dispatcher(transport)), gate_timeout=None)
    result = dispatcher.dispatch(Context(), headers=headers)
    task_id = dispatcher.dispatch_async(Context(), headers=headers)
    handle = dispatcher.dispatch_with_callback(Context(), headers=headers)
    assert repr(headers) == before
    if is_on:
        assert result == ExecutionResult(success=True)
        assert (type(task_id), type(handle)) == (str, DispatchHandle)
        assert [sent.message.payload.fairness for sent in transport.sent] == [key] * 3
    else:
        assert all(kwargs["headers"] is headers for _, _, kwargs in off.calls)
        assert transport.sent == []


BAD_HEADERS: list[Any] = [{"x-fairness-key": "org"}, {"x-fairness-key": {"pipeline_priority": 11}}]


@pytest.mark.parametrize("headers", BAD_HEADERS, ids=repr)
def test_malformed_fairness_header_fails_on_its_side(headers: Any) -> None:
    """On `on`, a blocking dispatch fails and the others raise PayloadError; on `off`, Celery gets the header."""
    transport = RecordingTransport()
    is_on = True
    dispatcher, _, off = routed(lambda context: is_on, on=ExecutorDispatcher(Dispatcher(transport)))
    result = dispatcher.dispatch(Context(), 1, headers)
    assert (result.success, bool(result.error)) == (False, True)
    for method in ("dispatch_async", "dispatch_with_callback"):
        with pytest.raises(PayloadError):
            getattr(dispatcher, method)(Context(), headers=headers)
    assert transport.sent == off.calls == []
    is_on = False
    for method in METHODS:
        getattr(dispatcher, method)(Context(), headers=headers)
    assert all(kwargs["headers"] is headers for _, _, kwargs in off.calls)
