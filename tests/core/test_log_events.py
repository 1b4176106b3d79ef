"""Log events: a name and fields, for people and for log pipelines."""

from __future__ import annotations

import ast
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contract_tests.messages import message
from tools.check_lock import ROOT
from transports.memory import MemoryTransport
from unstract_core import Consumer
from unstract_core.observability.log_events import LogThrottle, NewNames, emit, frames

logger = logging.getLogger("tests.events")


def test_event_has_a_readable_message_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    """The message is `wire.<event> key=value ...`, and the record has each field under `wire.<key>`."""
    emit(logger, logging.WARNING, "lease_lost", queue="q", attempt=2)
    (record,) = caplog.records
    assert record.getMessage() == "wire.lease_lost queue=q attempt=2"
    fields = {name: value for name, value in vars(record).items() if name.startswith("wire.")}
    assert fields == {"wire.event": "lease_lost", "wire.queue": "q", "wire.attempt": 2}
    assert (record.levelno, record.funcName) == (logging.WARNING, "test_event_has_a_readable_message_and_fields")


def test_percent_sign_in_a_field_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    """A field may contain any character of a name."""
    emit(logger, logging.WARNING, "odd", task="100%s%(x)d")
    assert caplog.records[0].getMessage() == "wire.odd task=100%s%(x)d"


@given(st.text() | st.characters(exclude_categories=()))
def test_field_cannot_forge_a_line_or_field(name: str) -> None:
    """The task name of a foreign message cannot add a line or a field, or fill the log; `extra` has the full name."""
    records: list[logging.LogRecord] = []

    def take(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(take)
    try:
        emit(logger, logging.WARNING, "odd", task=name, attempt=1)
        emit(logger, logging.WARNING, "odd", task=name * 1000, attempt=1)
    finally:
        logger.filters.clear()
    for record in records:
        text = record.getMessage()
        assert text.isprintable()
        assert len(text) < 12 * 500 + 100
        shown = text.removeprefix("wire.odd task=").removesuffix(" attempt=1")
        assert " " not in shown or shown.startswith('"')
    assert vars(records[0])["wire.task"] == name


# Tracebacks.


def fail_with(text: str, depth: int) -> None:
    """Raise a ValueError with this text at the given depth, caused by a KeyError with the same text."""
    if depth:
        fail_with(text, depth - 1)
    try:
        dict[str, str]()[text]
    except KeyError as exc:
        raise ValueError(text) from exc


@given(st.text(st.characters(codec="utf-8"), min_size=8), st.integers(0, 100))
def test_frames_have_places_but_no_values(text: str, depth: int) -> None:
    """The frames of a failure and of its causes have file, line and function, and no value of the task."""
    secret = f"secret-{text}"
    with pytest.raises(ValueError, match="secret") as caught:
        fail_with(secret, depth)
    shown = frames(caught.value)
    line = fail_with.__code__.co_firstlineno
    assert shown.startswith(f"{__file__}:{line + 7} fail_with")
    assert f"; caused by KeyError: {__file__}:{line + 5} fail_with" in shown
    assert "secret" not in shown
    assert shown.count(" < ") <= 31


def test_frames_of_cyclic_causes_are_limited() -> None:
    """Exceptions that cause each other are listed a limited number of times."""
    first, second = ValueError("1"), KeyError("2")
    first.__cause__, second.__cause__ = second, first
    assert frames(first).count("caused by") == 5


def test_failure_log_has_its_message_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    """`task_raised` has the type and the frames; `log_errors` adds the text, which may quote the payload."""
    for log_errors in (False, True):
        transport = MemoryTransport()
        transport.send([message("fail", "q", "the payload", 2)])
        Consumer(transport, {"fail": fail_with}, ["q"], max_attempts=1, log_errors=log_errors).drain()
    silent, told = [vars(record) for record in caplog.records if vars(record)["wire.event"] == "task_raised"]
    for record in (silent, told):
        assert record["wire.error_type"] == "ValueError"
        ours = record["wire.traceback"].partition(";")[0].split(" < ")
        assert [frame.rpartition(" ")[2] for frame in ours] == ["fail_with"] * 3
    assert "payload" not in str(silent)
    assert told["wire.error"] == "ValueError: the payload"


def read_logfmt(text: str) -> list[tuple[str, str]]:
    """Parse `key=value ...` like a strict reader of logfmt: an unquoted value has no special character."""
    fields, rest = [], text
    while rest:
        found = re.match(
            r"""(?P<key>[A-Za-z_.]+)=(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<plain>[^\s"'`=\\]*))(?: |$)""", rest
        )
        assert found is not None, rest
        fields.append((found["key"], json.loads(found["quoted"]) if found["quoted"] else found["plain"]))
        rest = rest[found.end() :]
    return fields


@given(st.text(max_size=400) | st.text(st.sampled_from([*"\"'`=\\ \n\t\x1b\x7f", "a", "\u2028", "é"]), max_size=20))
@example('"forged" level=ERROR')
@example("a=b")
@example("'")
@example("")
def test_logfmt_reader_finds_the_logged_fields(name: str) -> None:
    """A reader finds the same fields with the same values, in one printable line."""
    records: list[logging.LogRecord] = []
    logger.addFilter(lambda record: records.append(record) or False)  # type: ignore[func-returns-value]
    try:
        emit(logger, logging.WARNING, "odd", task=name, attempt=1)
    finally:
        logger.filters.clear()
    text = records[0].getMessage()
    assert text.isprintable()
    assert read_logfmt(text.removeprefix("wire.odd ")) == [("task", name), ("attempt", "1")]


@pytest.mark.parametrize("arguments", [[], [1, 2, 3], ["1", 2, "x", 4]])
def test_task_with_wrong_arguments_is_logged_by_file(caplog: pytest.LogCaptureFixture, arguments: list[Any]) -> None:
    """The log names the function that could not be called, not the code that called it."""
    transport = MemoryTransport()
    transport.send([message("fail", "q", *arguments)])
    Consumer(transport, {"fail": fail_with}, ["q"], max_attempts=1).drain()
    (record,) = [vars(one) for one in caplog.records if vars(one)["wire.event"] == "task_raised"]
    place = f"{__file__}:{fail_with.__code__.co_firstlineno}"
    assert record["wire.where"] == place
    assert record["wire.traceback"] == f"{place} fail_with: called with other arguments than it takes"


def test_overdue_task_is_logged_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the place where the task hangs, because its process may be replaced at once."""
    ended = threading.Event()

    def hang() -> None:
        ended.wait(60)

    transport = MemoryTransport()
    transport.send([message("hang", "q")])
    Consumer(transport, {"hang": hang}, ["q"], max_attempts=1, task_deadline=0.2).drain(timeout=30)
    ended.set()
    (record,) = [vars(one) for one in caplog.records if vars(one)["wire.event"] == "task_overdue"]
    assert f"{__file__}:{hang.__code__.co_firstlineno + 1} hang" in record["wire.traceback"]


def test_failing_log_handler_does_not_affect_a_message() -> None:
    """A filter or handler that raises does not change how a message is processed."""

    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("broken")

    broken = Broken()
    logger.addFilter(broken)
    try:
        emit(logger, logging.WARNING, "odd", task="t")
    finally:
        logger.removeFilter(broken)


def test_disabled_level_formats_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Below the logger's level nothing is formatted and nothing is written."""

    class Expensive:
        def __str__(self) -> str:
            raise AssertionError("formatted for nothing")

    with caplog.at_level(logging.ERROR, logger.name):
        emit(logger, logging.DEBUG, "quiet", field=Expensive())
    assert caplog.records == []


def test_document_lists_every_event() -> None:
    """The table of docs/monitoring.md has every event of the package with its levels and logger, and no other."""
    table = (ROOT / "docs" / "monitoring.md").read_text().partition("## Log events")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([A-Z, ]+) \| `([\w.]+)` \| ", table, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", table, re.MULTILINE))
    listed = [(event, level, name) for event, levels, name in rows for level in levels.split(", ")]
    emitted = {
        (event, level, logger_of(source))
        for _, source in modules()
        for call in calls(source, "emit")
        for event, level in events_of(call)
    }
    assert len(listed) == len(set(listed))
    undocumented, unknown = emitted - set(listed), set(listed) - emitted
    assert (undocumented, unknown) == (set(), set()), "correct the table of docs/monitoring.md"


def test_package_logs_only_events() -> None:
    """No module of the package logs without `emit`."""
    past = [
        (name, ast.unparse(call))
        for name, source in modules()
        for method in ("debug", "info", "warning", "error", "exception", "critical", "log")
        for call in calls(source, f"logger.{method}")
        if name != "unstract_core.observability.log_events"
    ]
    assert past == []


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the source of each module of the package."""
    for path in (path for package in ("unstract_core", "transports") for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def calls(source: ast.Module, function: str) -> Iterator[ast.Call]:
    """Yield the calls of a function, whether it is named directly or as an attribute of its module."""
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{function}"):
            yield node


def logger_of(source: ast.Module) -> str:
    """Return the name of a module's only logger, which is a literal and not a file name."""
    (name,) = re.findall(r'^logger = logging\.getLogger\("(unstract_wire\.\w+)"\)$', source_lines(source), re.MULTILINE)
    return str(name)


def source_lines(source: ast.Module) -> str:
    return "\n".join(ast.unparse(statement).replace("'", '"') for statement in source.body)


def events_of(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Yield each (event, level) that a call can log; fails if the source does not name them."""
    logger, level, event = call.args
    assert ast.unparse(logger) == "logger"
    for chosen, event_name in branches(event):
        for needed, level_name in branches(level):
            if all(chosen.get(condition, outcome) == outcome for condition, outcome in needed.items()):
                yield str(ast.literal_eval(event_name)), level_name.removeprefix("logging.")


def branches(node: ast.expr) -> Iterator[tuple[dict[str, bool], str]]:
    """Yield the source of each possible value of an expression, with its conditions."""
    if not isinstance(node, ast.IfExp):
        yield {}, ast.unparse(node)
        return
    for outcome, branch in ((True, node.body), (False, node.orelse)):
        for conditions, value in branches(branch):
            yield {ast.unparse(node.test): outcome, **conditions}, value


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 15), st.booleans()), max_size=200), st.integers(1, 5))
def test_log_throttle_logs_or_counts_every_event(steps: list[tuple[str, float, bool]], burst: int) -> None:
    """Each event is logged or counted in a summary; the first of a kind is logged, and few in one interval."""
    now, logged, reported, moments = 0.0, Counter[str](), Counter[str](), dict[str, list[float]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        flood: LogThrottle[str] = LogThrottle(burst=burst, seconds=30)
        for kind, seconds, asks in steps:
            now += seconds
            if flood.passes(kind):
                logged[kind] += 1
                moments.setdefault(kind, []).append(now)
            assert logged[kind]
            if asks:
                reported.update({one: count for one, count, _ in flood.due()})
        reported.update({one: count for one, count, _ in flood.due(at_once=True)})
    assert logged + reported == Counter(kind for kind, _, _ in steps)
    for times in moments.values():
        assert all(len([one for one in times if began <= one < began + 30]) <= 2 * burst for began in times)


def test_rejected_messages_beyond_ten_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Of 500 messages with unknown tasks, ten are logged each, and one event has the number of the others."""
    transport = MemoryTransport()
    transport.send([message(f"unknown-{number}", "q") for number in range(500)])
    Consumer(transport, {"t": print}, ["q"]).drain()
    events = [vars(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert [one["wire.event"] for one in events] == ["message_rejected"] * 10 + ["messages_rejected"]
    assert (events[-1]["wire.count"], events[-1]["wire.queue"]) == (490, "q")
    assert events[-1]["wire.error_type"] == "UnknownTask"


@pytest.mark.parametrize("kinds", [11, 1500])
def test_least_recent_names_become_new_again(kinds: int) -> None:
    """Only the least recent names are reported again, however many there were."""
    names = NewNames(most=10, burst=10_000)
    often = ("often",)
    assert names.are(often)
    for number in range(kinds):
        assert names.are((f"a{number}", "b"))
        assert not names.are((f"a{number}", "b"))
        assert not names.are(often)
    assert names.are(("a0", "b"))
    assert len(names._known) == 10


def test_names_beyond_the_burst_stay_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names beyond the burst are not reported, and are not remembered either."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    names = NewNames(burst=2, seconds=60)
    assert [names.are((name,)) for name in "abcd"] == [True, True, False, False]
    now += 61
    assert [names.are((name,)) for name in "abcd"] == [False, False, True, True]


def test_shown_names_are_limited() -> None:
    """A field has the first twenty names, each of at most 100 characters."""
    shown = NewNames.shown([f"{number:03}" + "x" * 5000 for number in range(300)]).split(", ")
    assert [len(name) for name in shown] == [100] * 20
    assert shown[-1].startswith("019")
