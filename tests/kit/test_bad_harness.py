"""Faulty harnesses and transports: the kit fails and names the transport, the call and the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kit.bad_runs import USAGE, Case, Runs

pytestmark = pytest.mark.timeout(400)
"""Seconds. The first test waits for runs of the whole kit, and the machine may be busy."""

SLOWEST = 120.0
"""Seconds that a run may take beside three others. Each hanging test is interrupted after a second."""


def given(*arguments: str, expected: str = "", only: str = "", limit: str = "30") -> Case:
    return Case(arguments=arguments, expected=expected, only=only, limit=limit)


FACTORIES = {
    "raises": Case(
        code="def Bad(): raise ValueError('no tables')",
        expected="the factory of the harness raised ValueError: no tables",
    ),
    "exits": Case(code="def Bad(): raise SystemExit(7)", expected="could not be loaded: SystemExit: 7"),
    "gives a transport": Case(code="Bad = MemoryTransport", expected="looks like a transport: name its harness"),
    "gives nothing": Case(code="def Bad(): return None", expected="returned a NoneType, not a harness: it has no name"),
    "is a number": Case(code="Bad = 7", expected="is a int, not a harness"),
    "has no name": Case(code="def Bad(): return ComposedHarness('')", expected="must be a non-empty string, not ''"),
    "claims a dict": Case(
        code="Bad = ComposedHarness('bad'); Bad.capabilities = {'delay': True}",
        expected="`capabilities` of a harness must be a Capabilities, not a dict",
    ),
    "claims what raises": Case(
        code="class Bad(Bad):\n    def __init__(self): pass\n    name = property(lambda self: 1 / 0)",
        expected="ZeroDivisionError",
    ),
    "fails on import": Case(code="raise RuntimeError('half')", expected="could not be loaded: RuntimeError: half"),
    "is no Python": Case(code="def (", expected="could not be loaded: SyntaxError"),
    "exits on import": Case(
        code="raise SystemExit('not today')", expected="could not be loaded: SystemExit: not today"
    ),
    "misses a module": Case(code="import no_such_driver", expected="no_such_driver"),
}

USES = {
    "no transport": given(expected="give --transport module:factory"),
    "a missing module": given("--transport=no_such_module:harness", expected="no_such_module"),
    "a missing factory": given("--transport=bad_harness:Nobody", expected="has no 'Nobody'"),
    "half a name": given("--transport=bad_harness:", expected="is not of the form module:name"),
    "an unknown name": given("--transport=oracle", expected="is installed for 'oracle' (installed: "),
    "an unknown scheme": given("--transport=oracle://u:hush-hush@h/db", expected="for 'oracle' (installed: "),
    "an empty name": given("--transport=", expected="no harness is installed for ''"),
    "two of a name": given("--transport=memory", "--transport=memory", expected="two harnesses are named memory"),
    "an unknown profile": given("--transport=memory", "--kit-profile=weekly", expected="invalid choice: 'weekly'"),
    "a limit in words": given(
        "--transport=memory", limit="soon", expected="--kit-time-limit: a time limit is a number"
    ),
    "a negative limit": given("--transport=memory", limit="-1", expected="above 0, not '-1'"),
    "no limit": given("--transport=memory", limit="inf", expected="above 0, not 'inf'"),
}


def hook(member: str, expected: str, limit: str = "10") -> Case:
    return Case(code=f"class Bad(Bad):\n    {member}", expected=expected, limit=limit)


HOOKS = {
    "__enter__ raises": hook("def __enter__(self): raise OSError('no')", "bad: the harness's __enter__() raised"),
    "__exit__ raises": hook("def __exit__(self, *raised): raise OSError('no')", "bad: the harness's __exit__() raised"),
    "transport raises": hook("def transport(self): raise OSError('no')", "bad: the harness's transport() raised"),
    "transport gives None": hook("def transport(self): return None", "bad: the harness's transport() raised TypeError"),
    "transport gives a number": hook(
        "def transport(self): return contextlib.nullcontext(7)", "a Transport (it has no send"
    ),
    "clean raises": hook("def clean(self, queues): raise OSError('no')", "bad: the harness's clean() raised"),
    "inject raises": hook("def inject(self, *given): raise OSError('no')", "bad: the harness's inject() raised"),
    "inject is missing": hook("def inject(self, *given): raise NotImplementedError", "does not implement inject()"),
    "expire takes nothing": hook("def expire(self): pass", "bad: the harness's expire() raised TypeError"),
    "stored gives a number": hook("def stored(self, *given): return 7", "the harness's stored() returned 7"),
    "leaves its transports open": hook(
        "def transport(self): return contextlib.nullcontext(Composed())",
        "test_the_harness_closes_the_transport_that_it_opened",
    ),
}


def hanging(kind: str, name: str, expected: str, how: str = "hang", only: str = "") -> Case:
    case = Case(code=f"Bad.transport_type = planted({kind}, {name!r}, {how})", expected=expected)
    return Case(code=case.code, expected=expected, only=only or case.only)


RECEIVES = "bad is in receive(limit=1"
HANGS = {
    "send": hanging("Composed", "send", "bad is in send() of 1"),
    "reply": hanging("Composed", "reply", "bad is in reply("),
    "subscribe": hanging("Composed", "subscribe", "bad is in subscribe(lease=60"),
    "capabilities": Case(
        code="""
            T = planted(Composed, "capabilities", property(hang))
            class Bad(Bad):
                transport_type = T
                def __init__(self):
                    self.name, self.capabilities = "bad", MemoryTransport.capabilities
        """,
        expected="bad is in capabilities",
        only="test_transport_and_harness or test_receive_returns_at_most or test_receive_with_limit",
    ),
    "queues": hanging("Composed", "queues", "bad is in queues()"),
    "close": hanging("Composed", "close", "bad is in the end of the harness's transport()"),
    "receive": hanging("MemorySubscription", "receive", RECEIVES),
    "receive in a sleep": hanging("MemorySubscription", "receive", RECEIVES, "lambda *a, **k: time.sleep(1e6)"),
    "receive in a loop": hanging(
        "MemorySubscription", "receive", RECEIVES, "lambda *a, **k: [0 for _ in iter(int, 1)]"
    ),
    "receive in a child": hanging(
        "MemorySubscription", "receive", RECEIVES, "lambda *a, **k: subprocess.run(['sleep', '300'])"
    ),
    "renew": hanging("MemorySubscription", "renew", "bad is in renew() of 0"),
    "settle": hanging("MemorySubscription", "settle", "bad is in settle() of 0"),
    "wake": hanging("MemorySubscription", "wake", "bad is in wake()", only="test_waking"),
    "close of a subscription": hanging("MemorySubscription", "close", "bad is in close() of a subscription"),
    "inside hypothesis": hanging("MemorySubscription", "receive", "bad is in receive(", only="test_ordering"),
    "on a consumer's thread": hanging("MemorySubscription", "settle", "bad is in settle() of 1", only="test_working"),
    "__enter__": hook("__enter__ = hang", "in __enter__() of the harness 'bad'", "1"),
    "__exit__": hook("__exit__ = hang", "in __exit__() of the harness 'bad'", "1"),
    "transport": hook("transport = hang", "bad is in the harness's transport()", "1"),
    "expire": hook("expire = hang", "bad is in the harness's expire()", "1"),
    "clean": hook("clean = hang", "bad is in the harness's clean()", "1"),
}

WRONG = {
    "send": ("Composed", "['send']"),
    "reply": ("Composed", "{'result': 1}"),
    "subscribe": ("Composed", "None"),
    "queues": ("Composed", "[{}]"),
    "receive": ("MemorySubscription", "[{}]"),
    "renew": ("MemorySubscription", "None"),
    "settle": ("MemorySubscription", "True"),
    "find": ("MemoryDeadLetters", "[{}]"),
    "get": ("MemoryDeadLetters", "[None]"),
    "replay": ("MemoryDeadLetters", "[1]"),
    "purge": ("MemoryDeadLetters", "'1'"),
}
"""A value of a wrong type for each method. Wrong `capabilities` make the harness itself invalid."""

RAISES = {name: kind for name, (kind, _) in WRONG.items()} | {"wake": "MemorySubscription"}
PLACES = (
    "test_queues_reports or test_purge_removes or test_a_dead_letter_records or test_a_whole_queue"
    " or test_an_unknown_key or test_many_wakes or test_settling_and or test_a_claimed_message"
)


def each(how: Mapping[str, str]) -> Case:
    """Return a run with one faulty harness for each method."""
    lines = [f"{name} = Bad({name!r}); {name}.transport_type = {code}" for name, code in how.items()]
    names = [part for name in how for part in ("--transport", f"bad_harness:{name}")]
    return Case(code="\n".join(lines), arguments=tuple(names), only=PLACES, limit="2")


OTHERS = {
    "wrong types": each(
        {name: f"planted({kind}, {name!r}, lambda *a, **k: {value})" for name, (kind, value) in WRONG.items()}
    ),
    "foreign errors": each(
        {name: f"planted({kind}, {name!r}, lambda *a, **k: sqlite3.connect('/'))" for name, kind in RAISES.items()}
    ),
    "a password": given("--transport=postgresql://u:hush-hush@127.0.0.1:1/db", only="test_every_flag"),
    "a selection": given("--transport=memory", only="test_wake"),
    "deaf": Case(
        code="""
            def deaf(*given, **options):
                while True:
                    try:
                        time.sleep(1000)
                    except BaseException:
                        pass
            Bad.transport_type = planted(MemorySubscription, "receive", deaf)
        """,
        expected="the call cannot be interrupted, so the run is aborted",
        only="test_receive_returns_at_most or test_receive_with_limit",
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"other": OTHERS, "hang": HANGS, "hook": HOOKS, "use": USES, "factory": FACTORIES}.items()
    for name, case in cases.items()
}


KEPT = {
    *("raises", "gives a transport", "fails on import", "no transport", "an unknown scheme", "a limit in words"),
    *("__enter__ raises", "inject is missing", "leaves its transports open"),
    *("send", "receive in a loop", "inside hypothesis", "on a consumer's thread"),
}
"""The cases of `make test`: at least one of each way in which a harness is wrong."""

REST = pytest.mark.slow(
    variant="tests/kit/test_bad_harness.py, most of the cases",
    reason="Each case is a run of the kit that takes seconds; `make test` has some of each kind.",
)


def some_of(cases: Iterable[str]) -> list[Any]:
    """Return the cases as parameters, of which `make test` runs those in KEPT."""
    return [name if name in KEPT else pytest.param(name, marks=REST) for name in cases]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = {item.callspec.params["name"] for item in ours}
    wanted = [name for name in CASES if name.startswith("other: ") or name.partition(": ")[2] in selected]
    begun = Runs(CASES, tmp_path_factory.mktemp("bad"), wanted)
    yield begun
    begun.close()


@pytest.mark.parametrize("name", some_of(FACTORIES))
def test_an_invalid_harness_factory_is_a_usage_error(runs: Runs, name: str) -> None:
    """The error names the factory and what is missing, before any test; the exit code is 4."""
    ended = runs[f"factory: {name}"]
    assert (ended.code, FACTORIES[name].expected in ended.text) == (USAGE, True), ended.text[-2000:]
    assert "bad_harness" in ended.text
    assert "Traceback" not in ended.text


@pytest.mark.parametrize("name", some_of(USES))
def test_invalid_arguments_are_a_usage_error(runs: Runs, name: str) -> None:
    """The error names what is missing and the choices; no run without tests succeeds; the exit code is 4."""
    ended = runs[f"use: {name}"]
    assert (ended.code, USES[name].expected in ended.text) == (USAGE, True), ended.text[-2000:]
    assert "hush-hush" not in ended.text


def test_pytest_without_the_plugin_is_a_usage_error(tmp_path: Path) -> None:
    """`--pyargs contract_tests` without the plugin names the command to use, instead of missing fixtures."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "contract_tests"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == USAGE
    assert "pytest -p contract_tests.plugin --pyargs contract_tests" in ended.stdout + ended.stderr


def test_a_selection_has_no_verdict(runs: Runs) -> None:
    """A run of selected tests has no verdict on conformance."""
    assert "memory: no verdict on conformance" in runs["other: a selection"].text
    assert runs["other: a selection"].code == 0


def test_an_unreachable_server_shows_no_password(runs: Runs) -> None:
    """Neither errors nor test ids of an unreachable server contain the password of its URL."""
    ended = runs["other: a password"]
    assert ended.code == 1
    assert "hush-hush" not in ended.text


@pytest.mark.parametrize("name", some_of(HOOKS))
def test_a_failing_hook_is_named(runs: Runs, name: str) -> None:
    """Tests that need the hook fail with its name and the transport's; every test is reported, with a verdict."""
    ended = runs[f"hook: {name}"]
    assert (ended.code, HOOKS[name].expected in ended.text) == (1, True), ended.text[-3000:]
    assert "bad: NOT conformant" in ended.text
    assert ended.reported >= 20


@pytest.mark.parametrize("name", some_of(HANGS))
def test_a_hanging_call_is_interrupted_and_named(runs: Runs, name: str) -> None:
    """Each hanging test fails at its time limit and names the call; after three of them the rest is not run."""
    ended = runs[f"hang: {name}"]
    assert (ended.code, HANGS[name].expected in ended.text) == (1, True), ended.text[-3000:]
    assert "not finished after " in ended.text
    assert "bad: NOT conformant" in ended.text
    assert ended.seconds < SLOWEST
    assert ended.reported >= 3


def test_an_uninterruptible_call_aborts_the_run(runs: Runs) -> None:
    """A transport that catches every exception is named, and the process exits."""
    ended = runs["other: deaf"]
    assert (ended.code, OTHERS["deaf"].expected in ended.text) == (1, True), ended.text[-3000:]
    assert "bad is in receive(limit=" in ended.text
    assert ended.seconds < SLOWEST


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_return_type_names_the_call(runs: Runs, name: str) -> None:
    """The failure has the transport, the call, the returned value and the required type."""
    text = runs["other: wrong types"].text
    assert re.search(rf"\b{name}: (dead\.)?{name}\(.*\).* returned .*, where the protocol requires ", text), text[
        -3000:
    ]


@pytest.mark.parametrize("name", RAISES)
def test_a_foreign_error_names_call_and_remedy(runs: Runs, name: str) -> None:
    """The failure has the transport, the call, the driver's error and the remedy."""
    text = runs["other: foreign errors"].text
    expected = rf"\b{name}: (dead\.)?{name}\(.*\).* raised OperationalError: .*; raise an error of "
    assert re.search(expected, text), text[-3000:]
