"""What `dead` promises: letters are found, and each is sent again as new, or gone for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import Harness, message

from unstract_core import Settlement, Subscription, Verdict

Subscribe = Callable[..., Subscription]
pytestmark = pytest.mark.needs("dead_letters")


@pytest.fixture
def bury(harness: Harness, transport: Any, subscribe: Subscribe) -> Callable[..., list[str]]:
    """Send messages to a queue and bury them with a reason; returns the ids of their letters, in order of sending."""

    def bury(queue: str, *args: Any, reason: str = "r") -> list[str]:
        transport.send([message("t", queue, arg) for arg in args])
        subscription = subscribe(queue)
        held = harness.take(subscription, len(args))
        assert len(held) == len(args)
        subscription.settle([Settlement(one, Verdict.BURY, reason=reason, result=one.attempt) for one in held])
        subscription.close()
        return [letter.id for letter in reversed(transport.dead.find(queue=queue, limit=len(args)))]

    return bury


def left(transport: Any, queue: str) -> list[Any]:
    return [letter.message["args"][0] for letter in reversed(transport.dead.find(queue=queue, limit=10_000))]


def test_a_letter_holds_what_was_stored_and_why(transport: Any, queue: str, bury: Callable[..., list[str]]) -> None:
    """Payload, queue, reason, attempts and result are kept as they were."""
    (id,) = bury(queue, "x", reason="because")
    (letter,) = transport.dead.get([id])
    assert (letter.queue, letter.reason, letter.attempts, letter.result) == (queue, "because", 1, 1)
    assert (letter.task_name, letter.message["args"]) == ("t", ["x"])
    assert letter.enqueued_at <= letter.buried_at


@pytest.mark.parametrize("by", ["ids", "queue"])
def test_letters_are_replayed_in_their_old_order(
    harness: Harness, transport: Any, queue: str, subscribe: Subscribe, bury: Callable[..., list[str]], by: str
) -> None:
    """Sent again as new, the oldest first, at attempt 1; all of a great many, and each once."""
    ids = bury(queue, *range(700))
    replayed = transport.dead.replay(ids) if by == "ids" else transport.dead.replay(queue=queue)
    assert list(replayed) == ids
    again = harness.take(subscribe(queue), 700, limit=1000)
    assert [one.payload.args[0] for one in again if one.payload] == list(range(700))
    assert {one.attempt for one in again} == {1}
    assert left(transport, queue) == []
    assert list(transport.dead.replay(ids)) == []


def test_only_what_was_asked_for_is_touched(
    harness: Harness, transport: Any, queue: str, bury: Callable[..., list[str]]
) -> None:
    """A queue's letters are replayed and purged without another's, and by id without their neighbours."""
    other = harness.queue()
    _, second, third = bury(queue, 1, 2, 3)
    bury(other, 9)
    assert list(transport.dead.replay([second])) == [second]
    assert transport.dead.purge(ids=[third, "999999999"]) == 1
    assert left(transport, queue) == [1]
    assert transport.dead.purge(queue=queue, older_than=3600) == 0
    assert transport.dead.purge(queue=queue) == 1
    assert left(transport, other) == [9]
    assert len(transport.dead.replay(queue=other)) == 1
