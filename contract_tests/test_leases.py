"""Leases: a claimed message is redelivered when its lease ends, not while it is renewed; each delivery counts."""

from __future__ import annotations

import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import LONG, SOON, Kit, timed
from contract_tests.messages import make_settlement, message
from contract_tests.requires import requires
from unstract_core import Verdict


def lease_of(kit: Kit) -> float:
    """Return a lease in seconds that a busy machine can renew in time; shorter for a transport without leases."""
    return 5.0 if kit.capabilities.fencing else 1.0


@requires("fencing")
def test_a_lease_ends_by_itself(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """A message whose holder stays silent is delivered again after its lease, and not before."""
    transport.send([message("t", queue)])
    holder, successor = subscribe(queue, lease=0.4), subscribe(queue)
    with timed() as elapsed:
        kit.take_one(holder)
        (delivery,) = successor.receive(limit=1, wait=LONG)
        assert 0.35 < elapsed() < 5
    assert delivery.attempt == 2


@requires("fencing")
def test_a_renewed_lease_ends_by_itself_too(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A lease that was renewed many times ends its full length after the last renewal: renewals do not add up."""
    transport.send([message("t", queue)])
    holder = subscribe(queue, lease=0.5)
    delivery = kit.take_one(holder)
    for _ in range(40):
        assert list(holder.renew([delivery])) == [True]
    with timed() as elapsed:
        assert len(subscribe(queue).receive(limit=1, wait=LONG)) == 1
        assert elapsed() < SOON


@requires("counts_crashes")
def test_every_delivery_counts_as_an_attempt(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A message that its holders never settle comes as attempt 1, 2, 3 and 4, under one id."""
    (id,) = transport.send([message("t", queue)])
    for attempt in range(1, 5):
        holder = subscribe(queue)
        delivery = kit.take_one(holder)
        assert (delivery.id, delivery.attempt) == (id, attempt)
        holder.close()
        kit.expire(transport, queue)


def test_a_retried_message_counts_its_attempts(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Each RETRY is followed by the next attempt: 1, 2, 3, 4."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    for attempt in range(1, 5):
        delivery = kit.take_one(holder)
        assert delivery.attempt == attempt
        assert list(holder.settle([make_settlement(delivery, Verdict.RETRY)])) == [True]


def test_an_uncounted_retry_uses_no_attempt(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """RETRY with counted=False takes its attempt back, so that restarts of workers use up no attempts."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    for attempt in (1, 1, 1):
        delivery = kit.take_one(holder)
        assert delivery.attempt == attempt
        assert list(holder.settle([make_settlement(delivery, Verdict.RETRY, counted=False)])) == [True]
    for attempt in (1, 2, 3):
        delivery = kit.take_one(holder)
        assert delivery.attempt == attempt
        assert list(holder.settle([make_settlement(delivery, Verdict.RETRY)])) == [True]
    assert list(holder.settle([make_settlement(kit.take_one(holder), Verdict.RETRY, counted=False)])) == [True]
    assert kit.take_one(holder).attempt == 4


def test_a_renewed_message_is_not_delivered_again(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """A renewal extends the lease by its full length from now."""
    transport.send([message("t", queue)])
    lease = lease_of(kit)
    holder, other = subscribe(queue, lease=lease), subscribe(queue)
    delivery = kit.take_one(holder)
    for _ in range(3):
        assert not other.receive(limit=1, wait=0.4 * lease)
        assert list(holder.renew([delivery])) == [True]
    assert list(holder.settle([make_settlement(delivery, Verdict.ACK)])) == [True]
    assert kit.nothing(other)


def test_one_call_renews_many_leases(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """`renew` of many deliveries extends each lease; other subscriptions receive none of them."""
    transport.send([message("t", queue, n) for n in range(150)])
    lease = lease_of(kit)
    holder, other = subscribe(queue, lease=lease), subscribe(queue)
    held = kit.take(holder, 150)
    for _ in range(3):
        assert not other.receive(limit=5, wait=0.4 * lease)
        assert list(holder.renew(held)) == [True] * 150


@requires("fencing")
def test_an_expired_unclaimed_lease_can_still_settle(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """Until another subscription claims the message, its last holder may renew and settle it after the lease."""
    transport.send([message("t", queue)])
    holder = subscribe(queue)
    delivery = kit.take_one(holder)
    kit.expire(transport, queue)
    assert list(holder.renew([delivery])) == [True]
    assert kit.nothing(subscribe(queue))
    kit.expire(transport, queue)
    assert list(holder.settle([make_settlement(delivery, Verdict.ACK)])) == [True]
    assert kit.nothing(subscribe(queue))


@pytest.mark.parametrize("call", ["settle", "renew"])
def test_settling_and_renewing_nothing_is_no_error(queue: str, subscribe: Subscribe, call: str) -> None:
    """Empty batches are allowed."""
    assert list(getattr(subscribe(queue), call)([])) == []
