"""Bad input: the consumer goes on, the next message is run, and a sender that can be reached gets the failure."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from celery_wire.support import Bench

PICKLE = "application/x-python-serialize"
TASK = {"task": "note", "id": "the-id"}


class Opens:
    """A value whose unpickling creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def deep(levels: int) -> str:
    return f"[[{'[' * levels}{']' * levels}], {{}}, {{}}]"


HEADERS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no id": ({"task": "note"}, "no header 'id'"),
    "no task": ({"id": "the-id"}, "no header 'task'"),
    "no headers at all": (None, "no header 'id'"),
    "an id that is a number": (TASK | {"id": 7}, "no header 'id'"),
    "an id of no length": (TASK | {"id": ""}, "no header 'id'"),
    "an id that is too long": (TASK | {"id": "x" * 1000}, "no header 'id'"),
    "an id with NUL": (TASK | {"id": "a\0b"}, "no header 'id'"),
    "a task that is a table": (TASK | {"task": {}}, "no header 'task'"),
    "an unknown task": (TASK | {"task": "odd"}, "UnknownTask: no task 'odd'"),
    "an eta that is no moment": (TASK | {"eta": "soon"}, "the header 'eta' is no ISO 8601 moment"),
    "an eta that is a number": (TASK | {"eta": 7}, "the header 'eta' is no ISO 8601 moment"),
    "an expires that is no moment": (TASK | {"expires": []}, "the header 'expires' is no ISO 8601 moment"),
    "time limits that are a text": (TASK | {"timelimit": "9"}, "time limits"),
    "retries without end": (TASK | {"retries": 2**30}, "TooManyAttempts"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers_are_dead_lettered(bench: Bench, case: str) -> None:
    """A message with bad headers is dead-lettered with the reason, and its errback gets the sender's id."""
    headers, reason = HEADERS[case]
    known = headers is not None and headers.get("id") == "the-id"
    embed = {"errbacks": [{"task": "failed", "kwargs": {"k": 1}, "options": {"queue": bench.outcome_queue}}]}
    bench.put(json.dumps([[], {}, embed]), headers, correlation_id="the-correlation-id")
    bench.the_next_one_runs()
    assert reason in bench.reason()
    outcome = bench.pipe.one(bench.outcome_queue)
    assert (outcome.args, outcome.kwargs) == (["the-id" if known else "the-correlation-id"], {"k": 1})


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers_are_answered(bench: Bench, case: str) -> None:
    """A sender that waits for an answer gets a failure with the reason."""
    headers, reason = HEADERS[case]
    bench.put("[[], {}, {}]", headers, correlation_id="the-key", reply_to=bench.outcome_queue)
    bench.the_next_one_runs()
    assert reason in bench.reason()
    outcome = bench.pipe.one(bench.outcome_queue)
    assert outcome.properties["correlation_id"] == "the-key"
    assert outcome.json["status"] == "FAILURE"
    failure = outcome.json["result"]
    assert reason.removeprefix("UnknownTask: ") in f"{failure['exc_type']}: {failure['exc_message'][0]}"


BODIES: dict[str, tuple[bytes | str, dict[str, Any], str]] = {
    "two elements": ("[[], {}]", {}, "but has or is 2 elements"),
    "four elements": ("[[], {}, {}, {}]", {}, "but has or is 4 elements"),
    "no elements": ("[]", {}, "but has or is 0 elements"),
    "an object": ("{}", {}, "but has or is dict"),
    "a number": ("7", {}, "but has or is int"),
    "null": ("null", {}, "but has or is NoneType"),
    "nothing": (b"", {}, "but has or is str"),
    "not JSON": ("[[], {}, {}", {}, "not JSON that can be read"),
    "not UTF-8": (b'[["\xff"], {}, {}]', {}, "not JSON that can be read"),
    "no content type": ("[[], {}, {}]", {"content_type": None}, "the content type is None"),
    "YAML": ("[[], {}, {}]", {"content_type": "application/x-yaml"}, "only application/json is read"),
    "MessagePack": (b"\x93\x90\x80\x80", {"content_type": "application/x-msgpack"}, "only application/json is read"),
    "plain text": ("[[], {}, {}]", {"content_type": "text/plain"}, "only application/json is read"),
    "kwargs null": ("[[], null, {}]", {}, "expected an object, got null @ $.kwargs"),
    "kwargs an array": ("[[], [], {}]", {}, "expected an object, got list @ $.kwargs"),
    "args an object": ("[{}, {}, {}]", {}, "expected an array, got dict @ $.args"),
    "args null": ("[null, {}, {}]", {}, "expected an array, got null @ $.args"),
    "embed a text": ('[[], {}, "x"]', {}, "expected an object, got str @ $.embed"),
    "callbacks an object": ('[[], {}, {"callbacks": {}}]', {}, "expected an array of signatures"),
    "callbacks a text": ('[[], {}, {"callbacks": "x"}]', {}, "expected an array of signatures"),
    "a link without a task": ('[[], {}, {"callbacks": [{"args": []}]}]', {}, "a link without a task @ $.callbacks[0]"),
    "a link that is null": ('[[], {}, {"callbacks": [null]}]', {}, "a link without a task @ $.callbacks[0]"),
    "a link whose args are an object": (
        '[[], {}, {"callbacks": [{"task": "t", "args": {}}]}]',
        {},
        "expected an array, got dict @ $.callbacks[0].args",
    ),
    "a link whose options are a list": (
        '[[], {}, {"callbacks": [{"task": "t", "options": [1]}]}]',
        {},
        "expected an object, got list @ $.callbacks[0].options",
    ),
    "a link to a queue of no name": (
        '[[], {}, {"callbacks": [{"task": "t", "options": {"queue": 7}}]}]',
        {},
        "$.callbacks[0].options.queue",
    ),
    "a link to a queue of too long a name": (
        json.dumps([[], {}, {"callbacks": [{"task": "t", "options": {"queue": "q" * 300}}]}]),
        {},
        "$.callbacks[0].options.queue",
    ),
    "a link with an id that is none": (
        '[[], {}, {"callbacks": [{"task": "t", "options": {"queue": "q", "task_id": 7}}]}]',
        {},
        "$.callbacks[0].options.task_id",
    ),
    "a link with a countdown that is none": (
        '[[], {}, {"callbacks": [{"task": "t", "options": {"queue": "q", "countdown": "soon"}}]}]',
        {},
        "$.callbacks[0].options.countdown",
    ),
    "a link with a countdown without end": (
        '[[], {}, {"callbacks": [{"task": "t", "options": {"queue": "q", "countdown": 1e300}}]}]',
        {},
        "$.callbacks[0].options.countdown",
    ),
    "an unknown envelope": ('[[{"__type__": "x", "__value__": 1}], {}, {}]', {}, "not JSON that can be read"),
    "NaN": ("[[NaN], {}, {}]", {}, "$.args[0]"),
    "Infinity": ('[[], {"x": -Infinity}, {}]', {}, "$.kwargs.x"),
    "an int beyond 64 bits": (f"[[{2**70}], {{}}, {{}}]", {}, "$.args[0]"),
    "a number of 5000 digits": (f"[[{'9' * 5000}], {{}}, {{}}]", {}, "not JSON that can be read"),
    "NUL": ('[["a\\u0000b"], {}, {}]', {}, "$.args[0]"),
    "a lone surrogate": ('[["\\ud800"], {}, {}]', {}, "$.args[0]"),
    "too deep": (deep(65), {}, "$.args[0]"),
    "far too deep": (deep(100_000), {}, "not JSON that can be read"),
    "broken zlib": (b"nonsense", {"headers": {"compression": "application/x-gzip"}}, "cannot be decompressed"),
    "an unknown compression": ("[[], {}, {}]", {"headers": {"compression": "odd"}}, "cannot be decompressed"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_bad_body_is_dead_lettered_and_answered(bench: Bench, case: str) -> None:
    """A message with a bad body is dead-lettered with the reason, and a waiting sender gets it as a failure."""
    body, properties, reason = BODIES[case]
    headers = TASK | properties.get("headers", {})
    rest = {name: value for name, value in properties.items() if name != "headers"}
    bench.put(body, headers, correlation_id="the-id", reply_to=bench.outcome_queue, **rest)
    bench.the_next_one_runs()
    assert reason in bench.reason()
    outcome = bench.pipe.one(bench.outcome_queue)
    assert (outcome.properties["correlation_id"], outcome.json["status"]) == ("the-id", "FAILURE")
    assert reason in outcome.json["result"]["exc_message"][0]


def test_a_pickle_is_never_opened(bench: Bench, tmp_path: Path) -> None:
    """A body that would create a file when unpickled creates none, under any content type."""
    trap = tmp_path / "opened"
    opens = pickle.dumps(([Opens(str(trap))], {}, {}))
    reply = {"correlation_id": "the-id", "reply_to": bench.outcome_queue}
    for content_type in (PICKLE, "application/json", None, "pickle", "application/data"):
        bench.put(opens, TASK, content_type=content_type, content_encoding="binary", **reply)
        wrapped = json.dumps([[base64.b64encode(opens).decode()], {}, {}])
        bench.put(wrapped, TASK, content_type=content_type, content_encoding="base64", **reply)
    bench.the_next_one_runs()
    assert not trap.exists()
    outcome = bench.pipe.take(bench.outcome_queue, 10)
    assert "nothing is ever unpickled" in outcome[0].json["result"]["exc_message"][0]
    assert [message.json["status"] for message in outcome].count(
        "FAILURE"
    ) == 9  # the base64 text in JSON is just a text
    bench.pipe.take(f"{bench.queue}.dead", 9)
