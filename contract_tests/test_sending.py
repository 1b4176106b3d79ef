"""`send`: one id per message, in order, all or nothing; invalid messages are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import LONG, SOON, Kit, timed
from contract_tests.messages import first, message
from contract_tests.profiles import examples
from contract_tests.requires import requires
from contract_tests.time_limits import start
from unstract_core import Message, PayloadError


def test_send_returns_one_id_per_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """`send` returns one distinct id per message, in order, and each message arrives under its id."""
    ids = transport.send([message("t", queue, number) for number in range(50)])
    received = kit.take(subscribe(queue), 50, limit=100)
    assert {one.id: first(one) for one in received} == dict(zip(ids, range(50), strict=True))
    assert len(received) == 50


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_one_invalid_message_stops_the_whole_batch(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe, broken: int
) -> None:
    """A message that the wire refuses raises PayloadError with its path, and no message of the batch is sent."""
    batch = [message("t", queue, object() if n == broken else n) for n in range(3)]
    with pytest.raises(PayloadError, match=r"\$\.args\[0\]"):
        transport.send(batch)
    assert kit.nothing(subscribe(queue))


@requires("atomic_send")
def test_a_visible_last_message_implies_its_batch(kit: Kit, transport: CheckedTransport, subscribe: Subscribe) -> None:
    """When the last message of a batch can be received from another queue, all the others can be, too."""
    for _ in range(10):
        early, late = kit.queue(), kit.queue()
        batch = [*(message("t", early, n) for n in range(60)), message("t", late)]
        sending = start(partial(transport.send, batch))
        assert len(subscribe(late).receive(limit=10, wait=20)) == 1
        assert len(kit.take(subscribe(early), 60, limit=100)) == 60
        sending(20)


@requires("atomic_send")
def test_a_visible_first_message_implies_its_batch(kit: Kit, transport: CheckedTransport, subscribe: Subscribe) -> None:
    """When the first message of a batch can be received from another queue, all the others can be, too."""
    for _ in range(10):
        early, late = kit.queue(), kit.queue()
        batch = [message("t", early), *(message("t", late, n) for n in range(60))]
        sending = start(partial(transport.send, batch))
        assert len(subscribe(early).receive(limit=10, wait=20)) == 1
        assert len(kit.take(subscribe(late), 60, limit=100)) == 60
        sending(20)


def test_an_empty_batch_sends_nothing(transport: CheckedTransport) -> None:
    """Sending no messages is allowed."""
    assert list(transport.send([])) == []


@pytest.mark.parametrize(
    "options",
    [{"priority": 0}, {"priority": 11}, {"priority": True}, {"delay": -1}, {"delay": float("nan")}, {"delay": 1e300}],
    ids=str,
)
def test_an_invalid_priority_or_delay_is_refused(transport: CheckedTransport, queue: str, options: Any) -> None:
    """A priority outside 1..10, or a delay that is negative or not finite, raises PayloadError."""
    with pytest.raises(PayloadError):
        transport.send([message("t", queue, **options)])


@requires("delay")
def test_a_delayed_message_arrives_after_its_delay(
    transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A delayed message is delivered soon after its delay, not before, and as attempt 1."""
    with timed() as elapsed:
        transport.send([message("t", queue, delay=1.6)])
        (delivery,) = subscribe(queue).receive(limit=1, wait=LONG)
        assert 1.5 < elapsed() < 1.6 + SOON
    assert delivery.attempt == 1


@requires("delay")
def test_a_delay_blocks_no_other_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A delayed message does not block the messages behind it."""
    transport.send([message("t", queue, "late", delay=60), message("t", queue, "now")])
    assert first(kit.take_one(subscribe(queue))) == "now"


PLAIN = {"plain", "celery_executor_legacy", "ide-callback", "a.b-c_d.9", "x" * 200}


@examples(20)
@given(names=st.lists(st.sampled_from(sorted(PLAIN)) | st.text(min_size=1, max_size=60), min_size=1, max_size=3))
def test_any_valid_name_can_be_a_queue(kit: Kit, names: list[str]) -> None:
    """A queue name may be any text; a transport may refuse some names when sending.

    Letters, digits, and `.`, `-`, `_` between them are never refused, up to 200 characters.
    """
    with kit.open() as transport:
        accepted = []
        for name in dict.fromkeys(names):
            queue = kit.queue(name)
            if _sent(transport, queue):
                accepted.append(queue)
            else:
                assert name not in PLAIN
        if accepted:
            subscription = transport.subscribe(accepted, lease=60)
            received = kit.take(subscription, len(accepted), limit=10)
            subscription.close()
            assert sorted((one.queue, first(one)) for one in received) == sorted((one, one) for one in accepted)


def _sent(transport: CheckedTransport, queue: str) -> bool:
    """Send to a queue with this name; return False if the name is refused."""
    try:
        transport.send([message("t", queue, queue)])
    except PayloadError:
        return False
    return True


def test_equal_messages_are_not_deduplicated(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Equal messages are all delivered, whether sent in one batch or separately."""
    same = message("t", queue, 1)
    ids = [*transport.send([same, same]), *transport.send([same])]
    assert len(ids) == 3
    assert list(map(first, kit.take(subscribe(queue), 3, limit=10))) == [1, 1, 1]


def test_message_queue_overrides_the_payload_queue(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A message is sent to `Message.queue`, also if its payload names another queue."""
    other = kit.queue()
    transport.send([Message(message("t", other, 1).payload, queue)])
    assert first(kit.take_one(subscribe(queue))) == 1
    assert kit.nothing(subscribe(other))


def test_similar_names_are_separate_queues(kit: Kit, transport: CheckedTransport, subscribe: Subscribe) -> None:
    """Queue names that differ only in case, length or their last character are separate queues."""
    name = kit.queue("-" + "x" * 100)
    names = [name, name.upper(), name + "y", name + ".", name[:70]]
    transport.send([message("t", one, one) for one in names])
    for one in names:
        assert list(map(first, kit.take(subscribe(one), 1, limit=5))) == [one]
    kit.use(*names)
