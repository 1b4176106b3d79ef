"""Dead letters: they keep the message and its reason, and can be listed, replayed and purged."""

from __future__ import annotations

import datetime
import time

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit
from contract_tests.messages import first, make_settlement, message, newer, parsed
from contract_tests.requires import requires
from contract_tests.time_limits import together
from unstract_core import Verdict


@requires("dead_letters")
def test_a_dead_letter_records_message_reason_and_times(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """A dead letter has the stored message, its queue, reason, attempts, result, organisation and times."""
    transport.send([message("t", queue, "dead", org_id="o", task_id="id")])
    delivery = kit.bury(transport, queue, "ValueError: why", result={"paid": 1})
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.queue, letter.reason, letter.result, letter.attempts) == (queue, "ValueError: why", {"paid": 1}, 1)
    assert (letter.message, letter.task_name, letter.org_id) == (parsed(delivery.raw), "t", "o")
    assert letter.enqueued_at <= letter.buried_at
    assert abs(letter.buried_at - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=10)
    assert list(transport.dead.get([letter.id, "999999999", "nonsense"])) == [letter]


@requires("dead_letters")
def test_a_buried_message_is_never_delivered(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A dead-lettered message is not delivered again."""
    transport.send([message("t", queue)])
    kit.bury(transport, queue)
    kit.expire(transport, queue)
    assert kit.nothing(subscribe(queue))


@requires("dead_letters")
@pytest.mark.parametrize("text", ['"x"', "{}", '{"task_name": 1, "queue": "q"}'])
def test_an_unreadable_message_can_be_buried(kit: Kit, transport: CheckedTransport, queue: str, text: str) -> None:
    """An unreadable message becomes a dead letter like any other."""
    kit.inject(transport, queue, text)
    assert kit.bury(transport, queue, "MalformedPayload: x").payload is None
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.reason, letter.task_name) == ("MalformedPayload: x", None)


@requires("dead_letters")
def test_a_dead_letter_is_replayed_as_new(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Replay sends the stored message again as attempt 1, behind waiting messages, and removes the dead letter."""
    transport.send([message("t", queue, "dead", org_id="o", priority=3)])
    kit.bury(transport, queue)
    (letter,) = transport.dead.find(queue=queue)
    transport.send([message("t", queue, "waiting", priority=3)])
    assert list(transport.dead.replay([letter.id, "999999999", "nonsense"])) == [letter.id]
    assert not transport.dead.find(queue=queue)
    assert not transport.dead.get([letter.id])
    waiting, replayed = kit.take(subscribe(queue), 2, limit=5)
    assert (first(waiting), first(replayed)) == ("waiting", "dead")
    assert (replayed.attempt, replayed.org_id) == (1, "o")
    if kit.capabilities.priority:
        assert replayed.priority == 3


@requires("dead_letters")
def test_a_whole_queue_is_replayed_oldest_first(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Replaying a queue sends all of its dead letters in burial order, and none of another queue."""
    other, holder = kit.queue(), subscribe(queue)
    transport.send([*(message("t", queue, n) for n in range(4)), message("t", other)])
    for delivery in kit.take(holder, 4):
        assert list(holder.settle([make_settlement(delivery, Verdict.BURY, reason="r")])) == [True]
    kit.bury(transport, other)
    assert len(transport.dead.replay(queue=queue)) == 4
    assert list(map(first, kit.take(holder, 4, limit=10))) == [0, 1, 2, 3]
    assert len(transport.dead.find(queue=other)) == 1


@requires("dead_letters")
@pytest.mark.parametrize("by", ["ids", "queue"])
def test_replaying_many_keeps_the_burial_order(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, by: str
) -> None:
    """Seven hundred letters are replayed once each, oldest first, at attempt 1, by ids or by queue."""
    count = 700
    transport.send([message("t", queue, n) for n in range(count)])
    holder = subscribe(queue)
    batch = [make_settlement(one, Verdict.BURY, reason="r") for one in kit.take(holder, count)]
    assert list(holder.settle(batch)) == [True] * count
    ids = [letter.id for letter in reversed(transport.dead.find(queue=queue, limit=2 * count))]
    assert len(ids) == count
    replayed = transport.dead.replay(ids) if by == "ids" else transport.dead.replay(queue=queue)
    assert list(replayed) == ids
    again = kit.take(holder, count, limit=count + 10)
    assert [(first(one), one.attempt) for one in again] == [(n, 1) for n in range(count)]
    assert not transport.dead.find(queue=queue)
    assert list(transport.dead.replay(ids)) == []


@requires("dead_letters")
def test_replay_and_purge_by_id_spare_neighbours(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """An id selects one letter: other letters stay, and unknown ids are not counted."""
    transport.send([message("t", queue, n) for n in range(4)])
    holder = subscribe(queue)
    batch = [make_settlement(one, Verdict.BURY, reason="r") for one in kit.take(holder, 4)]
    assert list(holder.settle(batch)) == [True] * 4
    last, third, second, head = transport.dead.find(queue=queue)
    assert list(transport.dead.replay([second.id])) == [second.id]
    assert transport.dead.purge(ids=[third.id, second.id, "999999999", "nonsense"]) == 1
    assert list(transport.dead.find(queue=queue)) == [last, head]
    assert list(map(first, kit.take(holder, 1, limit=5))) == [1]


@requires("dead_letters")
def test_a_replayed_message_can_be_settled_again(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A replayed message can be acknowledged, or dead-lettered again."""
    transport.send([message("t", queue)])
    kit.bury(transport, queue, "first")
    (letter,) = transport.dead.find(queue=queue)
    transport.dead.replay([letter.id])
    kit.bury(transport, queue, "second")
    (letter,) = transport.dead.find(queue=queue)
    assert (letter.reason, letter.attempts) == ("second", 1)
    transport.dead.replay([letter.id])
    holder = subscribe(queue)
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.ACK)])) == [True]


@requires("dead_letters")
def test_the_newest_dead_letters_are_found_first(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """`find` returns the newest dead letters first, and at most `limit` of them."""
    transport.send([message("t", queue, n) for n in range(4)])
    for n in range(4):
        kit.bury(transport, queue, f"reason {n}")
    assert [one.reason for one in transport.dead.find(queue=queue)] == ["reason 3", "reason 2", "reason 1", "reason 0"]
    assert [one.reason for one in transport.dead.find(queue=queue, limit=2)] == ["reason 3", "reason 2"]


@requires("dead_letters")
def test_purge_removes_only_the_selected_letters(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """Dead letters are purged by id, by queue and by age."""
    other = kit.queue()
    transport.send([message("t", queue), message("t", queue), message("t", other)])
    for name in (queue, queue, other):
        kit.bury(transport, name)
    _, oldest = transport.dead.find(queue=queue)
    assert transport.dead.purge(queue=queue, older_than=3600) == 0
    assert transport.dead.purge(ids=[oldest.id]) == 1
    assert transport.dead.purge(queue=queue) == 1
    assert len(transport.dead.find(queue=other)) == 1


@requires("dead_letters")
def test_a_dead_letter_counts_its_attempts(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`attempts` is the attempt number at which the message was dead-lettered."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    for _ in range(2):
        assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.RETRY)])) == [True]
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.BURY, reason="r")])) == [True]
    (letter,) = transport.dead.find(queue=queue)
    assert letter.attempts == 3


@requires("dead_letters")
def test_an_unreadable_message_is_replayed_unchanged(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """An unreadable message is replayed byte for byte: a newer worker may be able to read it."""
    kit.inject(transport, queue, '{"task_name": 1, "queue": "q"}')
    buried = kit.bury(transport, queue)
    assert len(transport.dead.replay(queue=queue)) == 1
    again = kit.take_one(subscribe(queue))
    assert (again.payload, bool(again.problem)) == (None, True)
    assert parsed(again.raw) == parsed(buried.raw)


@requires("dead_letters")
def test_a_replayed_message_keeps_every_field(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Replay keeps the task id, the continuations and keys that this version does not know."""
    callback = {"task_name": "f", "kwargs": {"x": 1}, "queue": kit.queue()}
    kit.inject(transport, queue, newer(queue, 1, on_success=callback, task_id=queue, new=[1]))
    buried = kit.bury(transport, queue)
    assert len(transport.dead.replay(queue=queue)) == 1
    again = kit.take_one(subscribe(queue))
    assert again.payload == buried.payload
    assert parsed(again.raw) == parsed(buried.raw)


@requires("dead_letters")
def test_concurrent_replays_send_each_letter_once(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """Concurrent replays of the same letters send each letter once, and only one call returns its id."""
    transport.send([message("t", queue, n) for n in range(6)])
    for _ in range(6):
        kit.bury(transport, queue)
    ids = [letter.id for letter in transport.dead.find(queue=queue)]
    replayed = [id for one in together(*[lambda: transport.dead.replay(ids)] * 3) for id in one]
    assert sorted(replayed) == sorted(ids)
    assert sorted(map(first, kit.remaining(transport, queue, count=6))) == list(range(6))


@requires("dead_letters")
def test_purge_counts_age_from_the_burial(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """`older_than` counts seconds since the burial, also together with ids."""
    transport.send([message("t", queue)])
    time.sleep(1.2)
    kit.bury(transport, queue)
    (letter,) = transport.dead.find(queue=queue)
    assert transport.dead.purge(queue=queue, older_than=30.0) == 0
    assert transport.dead.purge(ids=[letter.id], older_than=30.0) == 0
    time.sleep(1.2)
    assert transport.dead.purge(ids=[letter.id], older_than=1.0) == 1
