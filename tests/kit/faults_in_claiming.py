"""Faults in claims, order across queues, leases and attempts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs
from kit.planting import Composed, ComposedHarness, fault

from transports.memory.store import Row, Store
from transports.memory.subscription import MemorySubscription
from transports.memory.transport import MemoryTransport
from unstract_core.errors import ConfigurationError
from unstract_core.transport import Delivery, Settlement, Verdict


@fault("test_a_claimed_message_is_not_delivered_again", "assert kit.nothing(other)")
class ClaimsTwice(Store):
    """A claimed message is still ready for other subscriptions."""

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        row = super().take(queues, holder, lease)
        if row is None or row.attempt > 1:
            return row
        self.postpone(row, 0)
        row.state = "ready"
        return row


@fault("test_concurrent_claimers_never_share_a_message", "assert claimed == Counter(sent)")
class ClaimsInTwoSteps(MemorySubscription):
    """`receive` reads ready messages first and claims them a moment later, so that two subscriptions get them."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        found = list(super().receive(limit=limit, wait=wait))
        with self._store.changed:
            for one in found:
                row = self._store.rows[int(one.id)]
                row.attempt -= 1
                self._store.postpone(row, 0)
        time.sleep(0.001)
        with self._store.changed:
            for one in found:
                row = self._store.rows[int(one.id)]
                row.state, row.attempt, row.due = "claimed", one.attempt, self._store.clock() + self._lease
        return found


@fault("test_a_subscription_claims_only_from_its_queues", "up to `limit` deliveries of its queues")
class ClaimsFromEveryQueue(MemorySubscription):
    """A subscription also receives messages of other queues."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        with self._store.using():
            self._queues = tuple({row.queue for row in self._store.rows.values()} | {*self._queues})
        return super().receive(limit=limit, wait=wait)


@fault("test_receive_returns_at_most_limit_messages", "up to `limit` deliveries of its queues")
class ReturnsMoreThanTheLimit(MemorySubscription):
    """`receive` returns one message more than `limit`."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return super().receive(limit=limit + 1, wait=wait)


@fault("test_receive_with_limit_zero_only_waits", "receive(limit=0")
class ClaimsAtLeastOne(MemorySubscription):
    """`receive(limit=0)` claims a message."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return super().receive(limit=max(limit, 1), wait=wait)


@fault("test_a_queue_named_twice_delivers_once", "more than one queue of a name")
class RefusesARepeatedQueueName(Composed):
    """`subscribe` raises an error if a queue is named twice."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        if len(set(queues)) < len(queues):
            raise ConfigurationError("more than one queue of a name")
        return super().subscribe(queues, lease=lease)


@fault("test_an_invalid_lease_is_refused", "DID NOT RAISE")
class AcceptsAnyLease(Composed):
    """A lease that is negative or not a number is replaced by a minute."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        return super().subscribe(queues, lease=lease if 0 < lease < 1e6 else 60.0)


@fault("test_subscribing_to_no_queue_is_refused", "DID NOT RAISE")
class AcceptsNoQueue(Composed):
    """A subscription without queues is accepted, and waits forever."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        return super().subscribe(queues or ["nothing"], lease=lease)


@fault("test_priority_counts_across_the_queues_of_a_subscription", "assert received == sorted")
class EmptiesOneQueueAfterTheOther(Store):
    """A subscription receives from its first queue until that is empty, ignoring priorities in the others."""

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        found = (super(EmptiesOneQueueAfterTheOther, self).take([queue], holder, lease) for queue in queues)
        return next((row for row in found if row is not None), None)


@fault("test_a_full_queue_does_not_starve_another", 'assert "lone" in map(first, received)')
class KnowsTheFirstQueueOnly(MemorySubscription):
    """Of several queues, only the first is read."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        self._queues = self._queues[:1]
        return super().receive(limit=limit, wait=wait)


@fault("test_an_acknowledged_message_is_gone", "assert kit.nothing(subscribe(queue))")
class ForgetsAnAcknowledgement(MemorySubscription):
    """ACK returns True, but the message is delivered again after its lease."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        acks = [one.verdict is Verdict.ACK for one in settlements]
        rest = [one for one, ack in zip(settlements, acks, strict=True) if not ack]
        answers = iter(super().settle(rest))
        return [True if ack else next(answers) for ack in acks]


@fault("test_closing_a_subscription_returns_its_messages_to_others", "an expected message was not received")
class LosesMessagesOfAClosedSubscription(MemorySubscription):
    """Closing a subscription removes the messages that it claimed."""

    def close(self) -> None:
        with self._store.changed:
            held = [row.id for row in self._store.rows.values() if row.holders.get(row.attempt) is self]
            for id in held:
                del self._store.rows[id]
        super().close()


@fault("test_a_lease_ends_by_itself", "is in receive(limit=1, wait=30)")
class NeverEndsALease(Composed):
    """A claimed message never becomes ready by itself."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        subscription = super().subscribe(queues, lease=lease)
        subscription._lease = 1e6
        return subscription


@fault("test_a_renewed_message_is_not_delivered_again", "assert not other.receive(limit=1, wait=0.4 * lease)")
class RenewsNothing(MemorySubscription):
    """`renew` returns True without extending the lease."""

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        with self._store.using():
            return [self._store.claimed(one, self) is not None for one in deliveries]


@fault("test_one_call_renews_many_leases", "assert not other.receive(limit=5, wait=0.4 * lease)")
class RenewsTheFirstOnly(MemorySubscription):
    """`renew` of several deliveries extends only the first lease."""

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return [*super().renew(deliveries[:1]), *(True for _ in deliveries[1:])]


@fault("test_an_expired_unclaimed_lease_can_still_settle", "assert [False] == [True]")
class RefusesALapsedHolder(Store):
    """A holder cannot settle after its lease has expired, although no other subscription claimed the message."""

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        row = super().claimed(delivery, holder)
        return row if row is not None and row.due > self.clock() else None


@fault("test_every_delivery_counts_as_an_attempt", "(delivery.id, delivery.attempt) == (id, attempt)")
class CountsNoCrash(Store):
    """A message that its holder never settled is delivered again as attempt 1."""

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        row = super().take(queues, holder, lease)
        if row is not None and len(row.holders) > 1:
            row.attempt, row.holders = 1, {1: holder}
        return row


@fault("test_a_retried_message_counts_its_attempts", "assert 1 == 2")
class CountsNoRetry(MemorySubscription):
    """RETRY does not count the attempt."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        again = [attrs.evolve(one, counted=one.verdict is not Verdict.RETRY) for one in settlements]
        return super().settle(again)


@fault("test_an_uncounted_retry_uses_no_attempt", "assert 2 == 1")
class CountsAnUncountedRetry(MemorySubscription):
    """RETRY with counted=False uses up an attempt."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return super().settle([attrs.evolve(one, counted=True) for one in settlements])


@fault("test_settling_and_renewing_nothing_is_no_error", "ZeroDivisionError")
class FailsOnAnEmptyRenewal(MemorySubscription):
    """An empty batch raises a Python error."""

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        _ = 1 / len(deliveries)
        return super().renew(deliveries)


@fault("test_expire_makes_claimed_messages_ready_again", "assert kit.nothing(subscribe(other))")
class ExpiresEveryQueue(ComposedHarness):
    """The harness ends the leases of all queues instead of one."""

    def expire(self, transport: MemoryTransport, queue: str) -> None:
        for name in {row.queue for row in transport._store.rows.values()}:
            super().expire(transport, name)
