"""Faults in fencing: a holder that lost or settled a message can still change it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from kit.faults_in_settling import InSteps
from kit.planting import fault

from transports.memory.store import Row, Store
from transports.memory.subscription import MemorySubscription
from unstract_core.codec import value_to_json
from unstract_core.transport import Delivery, Settlement


class Unfenced(MemorySubscription):
    """Settles as the current holder of the message."""

    def settle_unfenced(self, one: Settlement) -> bool:
        with self._store.using():
            row = self._store.rows.get(int(one.delivery.id))
            if row is not None:
                row.holders[row.attempt] = self
                one = attrs.evolve(one, delivery=attrs.evolve(one.delivery, attempt=row.attempt, fence=row.fence))
        (answer,) = MemorySubscription.settle(self, [one])
        return answer

    def is_late(self, one: Settlement) -> bool:
        with self._store.using():
            return self._store.claimed(one.delivery, self) is None


@fault("test_a_late_settlement_changes_nothing", "assert [True] == [False]")
class IgnoresTheFence(Unfenced):
    """Every earlier holder can settle a message."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [self.settle_unfenced(one) for one in settlements]


@fault("test_a_late_settlement_sends_no_follow_up", "assert kit.nothing(subscribe(elsewhere))")
class SendsALateFollowUp(InSteps):
    """A late settlement returns False, but its follow-up is sent."""

    def settle_one(self, one: Settlement) -> bool:
        if MemorySubscription.settle(self, [one]) == [True]:
            return True
        self.send_next(one)
        return False


@fault("test_a_late_settlement_writes_no_reply", "assert transport.reply(key) is None")
class WritesALateReply(MemorySubscription):
    """A late settlement returns False, but its reply is written."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = super().settle(settlements)
        with self._store.using():
            for one in settlements:
                if one.reply is not None:
                    self._store.write_reply(one.reply, value_to_json(one.reply.result))
        return answers


@fault("test_a_late_renewal_changes_nothing", "assert [True] == [False]")
class RenewsALostLease(MemorySubscription):
    """`renew` returns True for a lost lease."""

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        super().renew(deliveries)
        return [True] * len(deliveries)


@fault("test_a_late_renewal_extends_no_other_lease", "a late renewal has extended the new holder's lease")
class ExtendsTheLeaseOfTheNextHolder(MemorySubscription):
    """A late renewal returns False, but extends the new holder's lease."""

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        with self._store.using():
            for one in deliveries:
                if (row := self._store.rows.get(int(one.id))) is not None and row.state == "claimed":
                    row.due = self._store.clock() + self._lease
        return super().renew(deliveries)


@fault("test_an_earlier_holder_cannot_settle_after_its_successor", "assert [True] == [False]")
class SettlesARemovedMessage(InSteps):
    """A settlement of a removed message returns True."""

    def settle_one(self, one: Settlement) -> bool:
        if int(one.delivery.id) not in self._store.rows:
            return True
        return list(MemorySubscription.settle(self, [one])) == [True]


@fault("test_a_batch_settles_only_deliveries_still_held", "one.id not in taken for one in held")
class DropsABatchForOneLostDelivery(Unfenced):
    """If one delivery of a batch is lost, no settlement of the batch takes effect."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if any(map(self.is_late, settlements)):
            return [False] * len(settlements)
        return super().settle(settlements)


@fault("test_the_fence_separates_attempts_of_one_holder", "assert [True, True] == [False, True]")
class FencesByHolderAlone(Store):
    """The fence checks the holder, but not the attempt."""

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        row = self.rows.get(int(delivery.id))
        return row if row is not None and row.holders.get(row.attempt) is holder else None


@fault("test_a_delivery_of_another_subscription_cannot_be_settled", "assert [True] == [False]")
class FencesByAttemptAlone(Store):
    """The fence checks the attempt, but not the holder."""

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        row = self.rows.get(int(delivery.id))
        return row if row is not None and row.attempt == delivery.attempt and row.attempt in row.holders else None


@fault("test_an_old_fence_rejects_a_reused_id", "[False, True]")
class FencesByIdAndAttempt(Store):
    """The fence checks only the id and the attempt, which are both reused after a restore."""

    def claimed(self, delivery: Delivery, holder: object) -> Row | None:
        row = self.rows.get(int(delivery.id))
        if row is None or row.attempt != delivery.attempt:
            return None
        return row if row.holders.get(row.attempt) is holder else None


@fault("test_a_delivery_is_settled_once", "assert [True] == [False]")
class SettlesAgainAfterARetry(MemorySubscription):
    """A holder that has retried a message can settle it again."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = super().settle(settlements)
        with self._store.using():
            for one in settlements:
                if (row := self._store.rows.get(int(one.delivery.id))) is not None:
                    row.holders.setdefault(row.attempt, self)
        return answers


@fault("test_a_batch_settles_a_repeated_delivery_once", "assert [True, True] == [True, False]")
class ChecksTheFenceOncePerBatch(Unfenced):
    """The fence is checked for a whole batch before any settlement takes effect."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        late = [self.is_late(one) for one in settlements]
        super().settle(settlements)
        return [not one for one in late]


@fault("test_a_consumer_that_lost_its_lease_writes_nothing", "lost")
class ConfirmsALateSettlement(MemorySubscription):
    """A late settlement has no effect, but returns True."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [True for _ in super().settle(settlements)]
