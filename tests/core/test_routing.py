"""RoutingDispatcher: which side a call goes to, that it goes there as it was made, and what a broken gate costs."""

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
    """An execution context as the product builds it."""

    executor_name: str = "legacy"
    organization_id: str | None = None
    run_id: str = "run-1"

    def to_dict(self) -> dict[str, Any]:
        return {"executor_params": {"text": CONTENT}}


class Spy:
    """A side that writes down each call just as it came, and answers with an object of its own."""

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
    """A dispatcher over two spies, or what is given in their place."""
    on, off = on or Spy(), off or Spy()
    return RoutingDispatcher(gate=gate, on=on, off=off, **options), on, off


def is_off(gate: Any, **options: Any) -> bool:
    """Whether a call goes to the side `off`, and nowhere else."""
    dispatcher, on, off = routed(gate, **options)
    dispatcher.dispatch_async(Context())
    assert len(on.calls) + len(off.calls) == 1
    return len(off.calls) == 1


@contextlib.contextmanager
def warnings_of(count: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """Collect the fields of what the router logs; all of it must be WARNINGs of one event, without content."""
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
    """A gate that gives these answers in turn."""
    left = iter(given_answers)
    return lambda context: next(left)


def is_open(context: Any) -> bool:
    return True


def raises(*_: object) -> NoReturn:
    raise RuntimeError(CONTENT)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What the gates of a test hang on; set at its end, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


# A call reaches one side as it was made.


@pytest.mark.parametrize("method", [*METHODS, "status"])
def test_the_methods_have_the_products_signatures(method: str) -> None:
    """Call sites see no difference between the router and a dispatcher, nor does `inspect`."""
    signature = inspect.signature(getattr(RoutingDispatcher, method))
    assert signature == inspect.signature(getattr(ExecutorDispatcher, method))


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """A call of one of the three methods, its arguments by position, by name or left out."""
    method = draw(st.sampled_from(METHODS))
    names = list(inspect.signature(getattr(ExecutorDispatcher, method)).parameters)[1:]
    positional = draw(st.integers(0, len(names)))
    named = draw(st.lists(st.sampled_from(names[positional:]), unique=True)) if names[positional:] else []
    if not positional and "context" not in named:
        named.append("context")
    values = {name: draw(st.just(None) | st.builds(object)) for name in names}
    return method, tuple(values[name] for name in names[:positional]), {name: values[name] for name in named}


@given(calls(), st.booleans(), st.sampled_from([1.0, None]))
def test_a_call_reaches_its_side_exactly_as_it_was_made(
    call: tuple[str, tuple[Any, ...], dict[str, Any]], answer: bool, gate_timeout: float | None
) -> None:
    """Same objects, by position or by name as the caller wrote them, and nothing that the caller did not pass."""
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
def test_the_gate_is_asked_at_every_call(said: list[bool], gate_timeout: float | None) -> None:
    """Nothing is cached: each call goes where the gate says at that moment, so a flip counts from the next call."""
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
def test_what_a_side_raises_is_let_out_and_not_tried_on_the_other(
    method: str, answer: bool, failure: BaseException
) -> None:
    """A dispatch that failed may have happened; the other side is never asked to do it again."""
    dispatcher, on, off = routed(lambda context: answer)
    on.answer = off.answer = failure
    with warnings_of(0), pytest.raises(type(failure)) as caught:
        getattr(dispatcher, method)(Context())
    assert caught.value is failure
    assert len(on.calls) + len(off.calls) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((Context(),), {"nope": 1}), (range(9), {})], ids=repr)
def test_a_wrong_call_is_a_type_error_and_the_gate_is_not_asked(method: str, args: Any, kwargs: Any) -> None:
    """A call that no side could take is refused as Python refuses it, not routed."""
    dispatcher, on, off = routed(lambda context: pytest.fail("asked"), gate_timeout=None)
    with pytest.raises(TypeError):
        getattr(dispatcher, method)(*args, **kwargs)
    assert on.calls == off.calls == []


def test_a_router_may_be_a_side_of_a_router() -> None:
    """It has the methods that it asks of its sides."""
    inner, on, off = routed(is_open)
    RoutingDispatcher(gate=is_open, on=inner, off=off).dispatch(Context(), timeout=3)
    assert on.calls == [("dispatch", (Context(),), {"timeout": 3})]


# Whatever is wrong with the gate means off.

not_bools = st.one_of(
    some.anything.filter(lambda value: type(value) is not bool),
    st.sampled_from([1, 0, 1.0, "true", "True", b"1", [True], (True,), None, NotImplemented, bool, is_open]),
)


@given(not_bools, st.sampled_from([1.0, None]))
def test_only_a_plain_true_lets_on(answer: Any, gate_timeout: float | None) -> None:
    """Anything that is not exactly a bool, however true it looks, means off, and a WARNING names its type."""
    with warnings_of(1) as found:
        assert is_off(lambda context: answer, gate_timeout=gate_timeout)
    assert found[0]["reason"] == "no_bool"
    assert found[0]["error_type"] == type(answer).__name__


def test_an_answer_whose_type_cannot_be_named_means_off() -> None:
    """Even a type that raises when it is looked at is no reason for a caller to see an error."""

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
def test_a_gate_that_raises_means_off(error: Exception, gate_timeout: float | None) -> None:
    """Any Exception means off; the WARNING has the error's type and never its text."""

    def gate(context: Any) -> bool:
        raise error

    with warnings_of(1) as found:
        assert is_off(gate, gate_timeout=gate_timeout)
    assert found[0] == {
        "event": "gate_failed", "reason": "raised", "error_type": type(error).__name__, "code": "",
        "suppressed": 0, "side": "off",
    }  # fmt: skip


def test_the_warning_has_the_code_of_a_failed_gate() -> None:
    """GateFailed brings its provider's own name for what is wrong: that is what an operator looks up."""

    def gate(context: Any) -> bool:
        raise GateFailed(CONTENT, code="FLAG_NOT_FOUND")

    with warnings_of(1) as found:
        assert is_off(gate)
    assert (found[0]["error_type"], found[0]["code"]) == ("GateFailed", "FLAG_NOT_FOUND")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exit_in_the_callers_own_thread_passes(error: type[BaseException]) -> None:
    """Asked without a limit the gate runs on the caller's thread, whose interrupts and exits are the caller's."""

    def gate(context: Any) -> bool:
        raise error

    dispatcher, on, off = routed(gate, gate_timeout=None)
    with warnings_of(0), pytest.raises(error):
        dispatcher.dispatch(Context())
    assert on.calls == off.calls == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exit_on_the_gates_own_thread_means_off(error: type[BaseException]) -> None:
    """A gate cannot end the caller: on its own thread, what it raises is its failure, whatever it is."""

    def gate(context: Any) -> bool:
        raise error

    with warnings_of(1) as found:
        assert is_off(gate)
    assert found[0]["error_type"] == error.__name__


class Interrupted(Exception):
    """What a signal handler raises in the caller's thread, as Celery's soft time limit does."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_an_interrupt_of_the_caller_passes_while_the_gate_hangs(
    error: type[BaseException], released: threading.Event
) -> None:
    """What interrupts the caller's own thread is not the gate's failure: it is let out, and nothing is dispatched."""

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


def test_a_gate_that_hangs_costs_its_limit_and_means_off(released: threading.Event) -> None:
    """After `gate_timeout` seconds the call goes off, with a WARNING; an answer that comes later counts for nothing."""
    dispatcher, on, off = routed(lambda context: released.wait(), gate_timeout=0.05)
    started = time.monotonic()
    with warnings_of(1) as found:
        dispatcher.dispatch(Context())
        assert 0.05 <= time.monotonic() - started < 5
        released.set()
        time.sleep(0.05)
    assert found[0]["reason"] == "timed_out"
    assert (len(on.calls), len(off.calls)) == (0, 1)


def test_while_too_many_gates_hang_none_is_asked(released: threading.Event) -> None:
    """With eight calls past the limit no other is made, and means off at once. Once they end, it counts again."""
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


def test_a_gate_that_was_mended_is_asked_again_although_its_old_calls_hang_on(released: threading.Event) -> None:
    """A probe is let through after a minute; when it is answered the gate is asked as before."""
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


def test_a_gate_that_stays_broken_is_probed_ever_more_seldom(released: threading.Event) -> None:
    """Each probe that hangs is one thread more: there are few, however long it lasts."""
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
def test_a_gate_that_dispatches_through_its_own_router_means_off(gate_timeout: float | None) -> None:
    """It is asked once, and the inner dispatch goes off; the outer one goes where the gate says."""
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
    """What a provider may raise that is written in another language."""


@pytest.mark.parametrize("gate_timeout", [1.0, None])
def test_whatever_a_gate_raises_means_off(gate_timeout: float | None) -> None:
    """Even what is no Exception, on a thread of its own or on the caller's."""

    def gate(context: Any) -> bool:
        raise Panic

    dispatcher, on, off = routed(gate, gate_timeout=gate_timeout)
    with warnings_of(1) as found:
        dispatcher.dispatch_async(Context())
    assert (len(on.calls), len(off.calls)) == (0, 1)
    assert (found[0]["reason"], found[0]["error_type"]) == ("raised", "Panic")


def test_a_thread_that_cannot_be_started_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the system's limit of threads, or while the interpreter ends, a dispatch still goes somewhere."""

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
def test_the_gate_sees_the_callers_context_variables(gate_timeout: float | None) -> None:
    """A request's own state, such as OpenFeature's transaction context, reaches the gate."""

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
def test_the_limit_alone_needs_a_thread(gate_timeout: float | None, aside: bool) -> None:
    """With a limit the gate runs on a daemon thread, a new one for each call; without one, on the caller's own."""
    ran: list[threading.Thread] = []

    def gate(context: Any) -> bool:
        ran.append(threading.current_thread())
        return True

    dispatcher, _, _ = routed(gate, gate_timeout=gate_timeout)
    for _ in range(3):
        dispatcher.dispatch(Context())
    assert len({*ran, threading.current_thread()}) == (4 if aside else 1)
    assert all(thread.daemon for thread in ran) or not aside


def test_a_router_works_on_in_the_child_of_a_fork(released: threading.Event) -> None:
    """What hung before the fork does not hang in the child, where the gate is asked, and warned of, anew."""
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


def test_a_hung_gate_does_not_hold_up_the_exit_of_the_interpreter() -> None:
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
    """The router's clock, to be set by the test."""
    hand = types.SimpleNamespace(now=1000.0)
    with mock.patch.object(routing, "monotonic", side_effect=lambda: hand.now):
        yield hand


@given(st.lists(st.tuples(st.sampled_from(["raised", "no_bool", None]), st.sampled_from([0.0, 1.0, 30.0, 60.0, 61.0]))))
def test_the_warning_comes_once_a_minute_for_each_kind_and_counts_the_rest(
    steps: list[tuple[str | None, float]],
) -> None:
    """At most one a minute for each kind of failure, which says how many were suppressed since the last."""
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


def test_many_threads_together_warn_once() -> None:
    """The limit holds whoever calls; no suppressed warning goes uncounted."""
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


def test_each_router_warns_for_itself() -> None:
    """Two routers, two gates: one's failure does not hide the other's."""
    with warnings_of(2):
        assert is_off(raises)
        assert is_off(raises)


# What cannot work is refused at start.


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
def test_what_cannot_work_is_refused_at_start(name: str) -> None:
    """A ConfigurationError names the argument and what was wrong with it."""
    changed, text = WRONG[name]
    with pytest.raises(ConfigurationError, match=text):
        RoutingDispatcher(**{"gate": is_open, "on": Spy(), "off": Spy(), **changed})


@pytest.mark.parametrize("gate_timeout", [1, 0.001, 3600, threading.TIMEOUT_MAX, None])
def test_every_limit_that_can_be_waited_is_taken(gate_timeout: float | None) -> None:
    """What passes the check works."""
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
def test_the_status_is_whichever_sides_answer_and_never_a_false_none(on: str, off: str, gate: Any) -> None:
    """Work keeps its transport: both sides are asked, whatever the gate says now; the first answer counts."""
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


def test_an_unforeseen_error_of_a_side_is_let_out_at_once() -> None:
    """What is neither "cannot know" nor "away" is the caller's to see, as an id that cannot be one."""
    dispatcher, _, _ = routed(is_open, on=Spy(PayloadError("no id")), off=Spy(DONE))
    with pytest.raises(PayloadError, match="no id"):
        dispatcher.status("t")


@given(some.names)
def test_the_status_of_an_executor_dispatcher_is_its_transports(task_id: str) -> None:
    """ExecutorDispatcher can be a side: it gives what its transport knows, and lets out what it raises."""
    transport = RecordingTransport(answer=DONE)
    assert ExecutorDispatcher(Dispatcher(transport)).status(task_id) == attrs.evolve(DONE, key=task_id)
    assert transport.replies == [{"key": task_id, "timeout": 0, "consume": False}]
    away = TransportUnavailable("away")
    with pytest.raises(TransportUnavailable, match="away"):
        ExecutorDispatcher(Dispatcher(RecordingTransport(reply_failure=away))).status(task_id)


# Celery's headers on the side that has none.


@given(st.none() | some.fairness_keys, st.dictionaries(some.names, some.json_values, max_size=3), st.booleans())
def test_headers_do_not_break_the_side_that_has_none(
    key: FairnessKey | None, others: dict[str, Any], is_on: bool
) -> None:
    """The queue in PostgreSQL takes fairness from the headers and leaves the rest; `off` gets the very same object."""
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
def test_a_malformed_fairness_header_is_told_where_it_counts(headers: Any) -> None:
    """`on`, a blocking dispatch fails with a text and the others raise PayloadError; `off`, it is Celery's to carry."""
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
