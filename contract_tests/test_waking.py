"""Waiting: a new message, `wake` or the end of the time ends a waiting `receive`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import LONG, SOON, Kit, timed
from contract_tests.messages import make_settlement, message
from contract_tests.requires import requires
from contract_tests.time_limits import start
from unstract_core import Verdict


def after_delay(call: Callable[[], object]) -> Callable[[float], object]:
    """Call a function after 0.2 s, on its own thread."""

    def later() -> object:
        time.sleep(0.2)
        return call()

    return start(later)


def test_a_sent_message_wakes_a_waiting_receive(transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """`receive` waits up to `wait` seconds, and returns as soon as a message is sent."""
    subscription = subscribe(queue)
    sent = after_delay(lambda: transport.send([message("t", queue)]))
    with timed() as elapsed:
        assert len(subscription.receive(limit=1, wait=LONG)) == 1
        assert elapsed() < SOON
    sent(SOON)


def test_a_retried_message_wakes_a_waiting_receive(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A message that another holder retries ends the wait."""
    transport.send([message("t", queue)])
    holder, other = subscribe(queue), subscribe(queue)
    delivery = kit.take_one(holder)
    assert not other.receive(
        limit=1, wait=0
    )  # a broker may redeliver to the last receiver: that must not be the holder
    waiting = start(lambda: other.receive(limit=1, wait=LONG))
    time.sleep(0.2)
    with timed() as elapsed:
        assert list(holder.settle([make_settlement(delivery, Verdict.RETRY)])) == [True]
        assert len(waiting(LONG)) == 1
        assert elapsed() < SOON


@requires("delay")
def test_a_due_message_wakes_a_waiting_receive(transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A delayed message ends the wait when it becomes due, without any other activity."""
    transport.send([message("t", queue, delay=0.5)])
    with timed() as elapsed:
        assert len(subscribe(queue).receive(limit=1, wait=LONG)) == 1
        assert elapsed() < SOON


def test_an_empty_receive_returns_after_its_wait(queue: str, subscribe: Subscribe) -> None:
    """Without messages, `receive` returns an empty sequence after `wait` seconds, and not before."""
    subscription = subscribe(queue)
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=0.3)
        assert 0.25 < elapsed() < SOON


def test_a_receive_without_a_wait_returns_at_once(queue: str, subscribe: Subscribe) -> None:
    """`receive(wait=0)` does not wait."""
    subscription = subscribe(queue)
    with timed() as elapsed:
        for _ in range(5):
            assert not subscription.receive(limit=1, wait=0)
        assert elapsed() < SOON


@pytest.mark.parametrize("limit", [0, 1])
def test_wake_ends_a_wait(queue: str, subscribe: Subscribe, limit: int) -> None:
    """`wake` from another thread makes a waiting `receive` return at once."""
    subscription = subscribe(queue)
    woken = after_delay(subscription.wake)
    with timed() as elapsed:
        assert not subscription.receive(limit=limit, wait=LONG)
        assert elapsed() < SOON
    woken(SOON)


def test_a_wake_before_the_wait_is_not_lost(queue: str, subscribe: Subscribe) -> None:
    """`wake` ends the next wait if no thread waits at the moment."""
    subscription = subscribe(queue)
    subscription.wake()
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=LONG)
        assert elapsed() < SOON


def test_receive_without_wait_keeps_the_wake(queue: str, subscribe: Subscribe) -> None:
    """`wake` ends the next `receive` that waits; a `receive(wait=0)` in between does not use it up."""
    subscription = subscribe(queue)
    subscription.wake()
    assert not subscription.receive(limit=1, wait=0)
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=LONG)
        assert elapsed() < SOON


def test_many_wakes_end_one_wait(queue: str, subscribe: Subscribe) -> None:
    """Several calls of `wake` end only one wait."""
    subscription = subscribe(queue)
    for _ in range(5):
        subscription.wake()
    subscription.receive(limit=1, wait=LONG)
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=0.3)
        assert elapsed() > 0.25


def test_wake_affects_only_its_own_subscription(queue: str, subscribe: Subscribe) -> None:
    """Other subscriptions continue to wait."""
    subscription, other = subscribe(queue), subscribe(queue)
    other.wake()
    with timed() as elapsed:
        assert not subscription.receive(limit=1, wait=0.3)
        assert elapsed() > 0.25


def test_a_signal_handler_may_wake(queue: str, subscribe: Subscribe) -> None:
    """`wake` may be called in a signal handler that interrupts the same subscription's `receive`."""
    subscription = subscribe(queue)
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: subscription.wake())
    main = threading.main_thread().ident
    assert main is not None
    try:
        interrupted = after_delay(lambda: signal.pthread_kill(main, signal.SIGUSR1))
        with timed() as elapsed:
            assert not subscription.receive(limit=1, wait=LONG)
            assert elapsed() < SOON
        interrupted(SOON)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_follow_up_wakes_a_waiting_receive(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A settlement that sends a follow-up wakes a worker that waits for it."""
    transport.send([message("t", queue)])
    holder, elsewhere = subscribe(queue), kit.queue()
    settlement = make_settlement(kit.take_one(holder), Verdict.ACK, follow_up=message("f", elsewhere))
    follower = subscribe(elsewhere)
    waiting = start(lambda: follower.receive(limit=1, wait=LONG))
    time.sleep(0.2)
    with timed() as elapsed:
        assert list(holder.settle([settlement])) == [True]
        assert len(waiting(LONG)) == 1
        assert elapsed() < SOON


@requires("dead_letters")
def test_a_replay_wakes_a_waiting_receive(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A replayed dead letter wakes a worker that waits."""
    transport.send([message("t", queue)])
    kit.bury(transport, queue)
    subscription = subscribe(queue)
    waiting = start(lambda: subscription.receive(limit=1, wait=LONG))
    time.sleep(0.2)
    with timed() as elapsed:
        assert len(transport.dead.replay(queue=queue)) == 1
        assert len(waiting(LONG)) == 1
        assert elapsed() < SOON


@requires("fencing")
def test_an_expired_lease_wakes_a_waiting_receive(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """The end of another subscription's lease ends the wait."""
    transport.send([message("t", queue)])
    kit.take_one(subscribe(queue, lease=0.5))
    with timed() as elapsed:
        assert len(subscribe(queue).receive(limit=1, wait=LONG)) == 1
        assert elapsed() < SOON


@requires("delay")
def test_a_delayed_retry_wakes_a_waiting_receive(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A delayed retry ends the wait when it becomes due."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.RETRY, delay=0.5)])) == [True]
    with timed() as elapsed:
        assert len(holder.receive(limit=1, wait=LONG)) == 1
        assert elapsed() < SOON


def test_every_waiting_receive_is_woken_for_its_message(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Three subscriptions that wait get one of three messages each, before their wait is over."""
    waiting = [start(partial(subscribe(queue).receive, limit=1, wait=LONG)) for _ in range(3)]
    time.sleep(0.3)
    with timed() as elapsed:
        for n in range(3):
            transport.send([message("t", queue, n)])
        received = [one(LONG) for one in waiting]
        assert elapsed() < 2 * SOON
    assert [len(batch) for batch in received] == [1, 1, 1]
