"""Errbacks with unsupported options are sent without these options."""

from __future__ import annotations

import json
import logging
from typing import Any

import kombu
import pytest
from celery import chain, chord, group, signature
from celery_wire.support import ALIVE, Bench
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.kit import wait_until
from transports.celery.decode import read_message

OPTIONS: dict[str, Any] = {
    "priority": 7,
    "countdown": "soon",
    "eta": "2030-01-01T00:00:00+00:00",
    "expires": 60,
    "reply_to": "secret-address",
    "routing_key": "elsewhere",
    "exchange": "elsewhere",
    "serializer": "pickle",
    "compression": "bzip2",
    "headers": {"tenant": "secret-tenant"},
    "task_id": 7,
    "group_id": "g",
    "chord": {"task": "t"},
    "chain": [{"task": "t"}],
    "retry": True,
    "retry_policy": {"max_retries": 1},
    "time_limit": 9,
    "shadow": "another name",
    "ignore_result": True,
    "stamped_headers": ["s"],
    "of-no-one": 1,
}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def errback(queue: str, task: str = "failed", **options: Any) -> dict[str, Any]:
    return dict(signature(task, queue=queue, **options))


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if getattr(record, "wire.event", "") == "errback_options_dropped"]
    return [getattr(record, "wire.dropped") for record in records]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_errback_loses_an_unsupported_option(bench: Bench, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The errback of a failed task is sent once, and the log names the dropped option without its value."""
    embed = {"errbacks": [errback(bench.outcome_queue, **{name: OPTIONS[name]})]}
    bench.put(json.dumps([[], {}, embed]), {"task": "odd", "id": "the-id"})
    sent = bench.pipe.one(bench.outcome_queue)
    assert (sent.headers["task"], sent.args) == ("failed", ["the-id"])
    assert dropped(caplog) == [f"$.errbacks[0].options.{name}"]
    assert "secret" not in caplog.text
    assert bench.reason().startswith("UnknownTask")


def test_any_errback_option_lets_the_task_run(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A task whose errback has an unsupported option runs, and a success drops nothing."""
    caplog.set_level(logging.WARNING)
    embed = {"errbacks": [errback(bench.outcome_queue, **OPTIONS), group(signature("a"), signature("b"))]}
    bench.put(json.dumps([["with an errback"], {}, embed]), {"task": "note", "id": "the-id"})
    wait_until(lambda: "with an errback" in bench.ran, timeout=ALIVE, what="the task to run")
    bench.the_next_one_runs()
    assert dropped(caplog) == []
    assert bench.pipe.left(bench.outcome_queue) == []


CANVASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "chain": (lambda a, b: chain(a, b), ["a"], ["$.errbacks[0].kwargs.tasks[1:]"]),
    "group": (lambda a, b: group(a, b), ["a", "b"], []),
    "chord": (lambda a, b: chord([a], b), ["a"], ["$.errbacks[0].kwargs.body"]),
    "chain in a group": (lambda a, b: group(chain(a, b)), ["a"], ["$.errbacks[0].kwargs.tasks[0].kwargs.tasks[1:]"]),
}


@pytest.mark.parametrize("case", CANVASES)
def test_a_canvas_errback_is_sent(bench: Bench, caplog: pytest.LogCaptureFixture, case: str) -> None:
    """The first task of a chain, all of a group and a chord's header are sent, and the log names the rest."""
    make, tasks, left_out = CANVASES[case]
    canvas = make(signature("a", queue=bench.outcome_queue), signature("b", queue=bench.outcome_queue))
    body = kombu.serialization.dumps([[], {}, {"errbacks": [canvas]}], "json")[2]
    bench.put(body, {"task": "odd", "id": "the-id"})
    assert [
        (message.headers["task"], message.args) for message in bench.pipe.take(bench.outcome_queue, len(tasks))
    ] == [(task, ["the-id"]) for task in tasks]
    assert ", ".join(dropped(caplog)) == ", ".join(left_out)
    bench.reason()


def test_an_errback_has_normalised_values(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An errback with values that the wire cannot carry is sent with normalised ones."""
    link = {
        "task": "failed",
        "args": ["a\0b"],
        "kwargs": {"x": [1, float("nan")]},
        "options": {"queue": bench.outcome_queue},
    }
    bench.put(json.dumps([[], {}, {"errbacks": [link]}]), {"task": "odd", "id": "the-id"})
    sent = bench.pipe.one(bench.outcome_queue)
    assert (sent.args[0], sent.kwargs) == ("the-id", {"x": [1, None]})
    assert dropped(caplog) == ["$.errbacks[0].args[0], $.errbacks[0].kwargs.x[1]"]
    bench.reason()


@given(st.dictionaries(st.sampled_from([*OPTIONS, "link", "link_error"]), json_values, max_size=6), st.booleans())
def test_any_option_leaves_the_errback(options: dict[str, Any], is_list: bool) -> None:
    """An errback with any options is read, with its queue."""
    link = {"task": "failed", "options": {**options, "queue": "q"}}
    body = json.dumps([[], {}, {"errbacks": [link, link] if is_list else [link]}]).encode()
    message = kombu.Message(body=body, content_type="application/json", content_encoding="utf-8")
    message.headers = {"task": "t", "id": "the-id"}
    envelope = read_message(message, "q", default_queue="celery")
    assert envelope.problem is None
    assert [one["options"]["queue"] for one in envelope.errbacks] == ["q"] * (2 if is_list else 1)
