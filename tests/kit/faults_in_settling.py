"""Faults in `settle`: follow-ups, verdicts and atomicity."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs
from kit.planting import Composed, fault

from transports.memory.subscription import MemorySubscription
from unstract_core.codec import value_to_json
from unstract_core.errors import PayloadError
from unstract_core.transport import Settlement, Verdict, check_subscription, write_message


@fault("test_a_follow_up_is_never_lost", "['next']")
class LosesTheFollowUp(MemorySubscription):
    """A settlement takes effect, but its follow-up is not sent."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return super().settle([attrs.evolve(one, follow_up=None) for one in settlements])


@fault("test_everything_in_a_mixed_batch_takes_effect", "list(map(first, follow_ups)) == followed")
class LosesTheFollowUpOfALaterBurial(MemorySubscription):
    """In a batch, the follow-up of a BURY settlement is sent only if it is the first one."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        rest = [attrs.evolve(one, follow_up=None) if one.verdict is Verdict.BURY else one for one in settlements[1:]]
        return super().settle([*settlements[:1], *rest])


class InSteps(MemorySubscription):
    """Settles in two transactions, a moment apart."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [self.settle_one(one) for one in settlements]

    def settle_one(self, one: Settlement) -> bool:
        raise NotImplementedError

    def send_next(self, one: Settlement) -> None:
        if one.follow_up is not None:
            text = value_to_json(write_message(one.follow_up))
            with self._store.using():
                self._store.add(one.follow_up, text)
                self._store.changed.notify_all()
        time.sleep(0.02)


@fault("test_a_refused_follow_up_leaves_its_message_claimed", "assert [False] == [True]")
class AcknowledgesFirst(InSteps):
    """A message is acknowledged before its follow-up is sent: a refusal loses both."""

    def settle_one(self, one: Settlement) -> bool:
        (answer,) = MemorySubscription.settle(self, [attrs.evolve(one, follow_up=None)])
        self.send_next(one)
        return answer


@fault("test_visible_reply_implies_follow_up_and_acknowledgement", "follower.receive(limit=5, wait=0)")
class RepliesBeforeItSends(InSteps):
    """The reply is written first, and the rest of the settlement takes effect a moment later."""

    def settle_one(self, one: Settlement) -> bool:
        if one.reply is not None:
            with self._store.using():
                self._store.write_reply(one.reply, value_to_json(one.reply.result))
                self._store.changed.notify_all()
            time.sleep(0.02)
        (answer,) = MemorySubscription.settle(self, [one])
        return answer


@fault("test_visible_follow_up_implies_reply", "assert None is not None")
class SendsBeforeItAcknowledges(InSteps):
    """Atomicity is claimed, but the follow-up is sent before the message is acknowledged and the reply is written."""

    def settle_one(self, one: Settlement) -> bool:
        self.send_next(one)
        (answer,) = MemorySubscription.settle(self, [attrs.evolve(one, follow_up=None)])
        return answer


@fault("test_an_invalid_follow_up_has_no_effect", "assert kit.nothing(subscribe(elsewhere))")
class SettlesHalfOfABatch(MemorySubscription):
    """The settlements of a batch before an invalid one take effect."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [answer for one in settlements for answer in super(SettlesHalfOfABatch, self).settle([one])]


@fault("test_large_batches_are_settled_whole", "Right contains 200 more items")
class SettlesAHundredAtMost(MemorySubscription):
    """Only the first hundred settlements of a batch take effect, but all return True."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [*super().settle(settlements[:100]), *(True for _ in settlements[100:])]


@fault("test_a_retry_with_delay_waits", "assert 0.35 < elapsed()")
class DropsTheDelayOfARetry(MemorySubscription):
    """RETRY ignores its delay."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return super().settle([attrs.evolve(one, delay=0.0) for one in settlements])


@fault("test_an_invalid_retry_delay_is_refused", "DID NOT RAISE")
class AcceptsAnyDelay(MemorySubscription):
    """An invalid delay of RETRY is replaced by none."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        try:
            return super().settle(settlements)
        except PayloadError:
            return super().settle([attrs.evolve(one, delay=0.0) for one in settlements])


@fault("test_a_callback_inherits_organisation_fairness_and_priority", "delivery.priority == 8")
class LosesThePriorityOfAFollowUp(MemorySubscription):
    """A follow-up is sent with the default priority."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return super().settle(
            [
                attrs.evolve(one, follow_up=one.follow_up and attrs.evolve(one.follow_up, priority=5))
                for one in settlements
            ]
        )


@fault("test_settle_does_not_change_its_arguments", 'assert argument == {"list": [1]}')
class ChangesTheFollowUp(MemorySubscription):
    """`settle` adds a key to the follow-up's objects."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = super().settle(settlements)
        for one in settlements:
            for argument in one.follow_up.payload.args if one.follow_up else ():
                if isinstance(argument, dict):
                    argument["sent"] = True
        return answers


@fault("test_no_message_is_lost_or_repeated_without_cause", "lost: [")
class LosesARetryWithAFollowUp(MemorySubscription):
    """RETRY with a follow-up sends the follow-up, but removes the message."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        lost = [one.verdict is Verdict.RETRY and one.follow_up is not None for one in settlements]
        verdicts = [Verdict.ACK if gone else one.verdict for one, gone in zip(settlements, lost, strict=True)]
        return super().settle([attrs.evolve(one, verdict=to) for one, to in zip(settlements, verdicts, strict=True)])


@fault("test_two_workers_never_lose_or_double_a_message", "one.state in ")
class DropsTheDelayOfARetryInABatch(MemorySubscription):
    """In a batch of several settlements, RETRY ignores its delay."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        several = len(settlements) > 1
        return super().settle([attrs.evolve(one, delay=0.0 if several else one.delay) for one in settlements])


@fault("test_subscriptions_settle_in_parallel_threads", "assert all(settled)")
class SettlesForOneThreadOnly(Composed):
    """While one subscription settles, the settlements of others return False."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        busy: list[object] = vars(self).setdefault("busy", [])

        class Alone(MemorySubscription):
            def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
                busy.append(self)
                try:
                    alone = busy[0] is self
                    time.sleep(0.002)
                    return super().settle(settlements) if alone else [False] * len(settlements)
                finally:
                    busy.remove(self)

        return Alone(self._store, check_subscription(queues, lease), lease)


@fault("test_many_workers_run_each_message_once", "is in receive(limit=3")
class DropsEveryHundredthSettlement(MemorySubscription):
    """Every hundredth settlement of a subscription returns True without effect."""

    settled = 0

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers: list[bool] = []
        for one in settlements:
            self.settled += 1
            answers += [True] if self.settled % 100 == 0 else super().settle([one])
        return answers
