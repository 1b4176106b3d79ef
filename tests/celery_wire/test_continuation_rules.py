"""A worker's options for results and callbacks over a broker."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery_wire.support import Pipe

from transports.celery import CeleryTransport
from unstract_core import Consumer

FAILURE = {"success": False, "data": {"pages": 3}, "metadata": {}, "error": "no text found"}
HEADERS = {"id": "the-id", "task": "t"}


def consume(transport: CeleryTransport, queue: str, **options: Any) -> list[Any]:
    ran: list[Any] = []

    def run() -> Any:
        ran.append(1)
        return FAILURE

    Consumer(transport, {"t": run}, [queue], **options).drain(timeout=20)
    return ran


def body(queue: str, *, callbacks: list[str], errbacks: list[str]) -> str:
    links = {
        kind: [{"task": task, "kwargs": {}, "options": {"queue": queue}} for task in tasks]
        for kind, tasks in (("callbacks", callbacks), ("errbacks", errbacks))
    }
    return json.dumps([[], {}, links])


@pytest.mark.parametrize(
    "options", [{}, {"status_payload": "none", "returned_failure": "failed"}], ids=["default", "all"]
)
def test_the_answer_beside_a_link_has_the_result(
    transport: CeleryTransport, pipe: Pipe, queue: str, options: dict[str, Any]
) -> None:
    """A client that waits for a result and has a link gets the whole result, with any option for statuses."""
    outcome_queue = pipe.declare(f"{queue}-cb")
    pipe.put(
        pipe.declare(queue),
        body(outcome_queue, callbacks=["done"], errbacks=["failed"]),
        HEADERS,
        reply_to=outcome_queue,
    )
    assert consume(transport, queue, **options) == [1]
    messages = pipe.take(outcome_queue, 2)
    (answer,) = [message.json for message in messages if isinstance(message.json, dict)]
    (callback,) = [message for message in messages if not isinstance(message.json, dict)]
    assert (answer["status"], answer["result"]) == ("SUCCESS", FAILURE)
    assert (callback.headers["task"], callback.args) == ("done", [FAILURE])


@pytest.mark.parametrize(
    ("allowed", "sent"),
    [
        (["done", "also done", "failed", "also failed"], ["also done", "done"]),
        (["done", "failed", "also failed"], ["also failed", "failed"]),
        (["done", "also done", "failed"], []),
    ],
    ids=["all", "not the second link", "not the second errback"],
)
def test_every_link_must_be_allowed(
    transport: CeleryTransport, pipe: Pipe, queue: str, allowed: list[str], sent: list[str]
) -> None:
    """A message with a forbidden link is not run, and its errbacks are sent only if all of them are allowed."""
    outcome_queue = pipe.declare(f"{queue}-cb")
    links = body(outcome_queue, callbacks=["done", "also done"], errbacks=["failed", "also failed"])
    pipe.put(pipe.declare(queue), links, HEADERS)
    ran = consume(transport, queue, allow_continuations=[f"{outcome_queue}:{task}" for task in allowed])
    assert sorted(message.headers["task"] for message in pipe.take(outcome_queue, len(sent))) == sent
    assert pipe.left(outcome_queue) == []
    assert ran == ([1] if "done" in sent else [])
    if not ran:
        assert "ContinuationNotAllowed" in pipe.buried(queue).headers["x-dead-reason"]
