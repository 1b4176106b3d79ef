"""Faults in replies and in dead letters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import attrs
from kit.planting import Composed, fault

from transports.memory.store import Store
from transports.memory.subscription import MemorySubscription
from transports.memory.transport import MemoryDeadLetters
from unstract_core.transport import DeadLetter, Reply, Settlement, Verdict


class Rewrites(MemorySubscription):
    """Changes the reply of each settlement."""

    def rewrite(self, reply: Reply) -> Reply | None:
        raise NotImplementedError

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return super().settle([attrs.evolve(one, reply=one.reply and self.rewrite(one.reply)) for one in settlements])


@fault("test_a_result_arrives_as_it_was_written", '("completed", normalise(result), "")')
class TurnsEmptyResultsIntoNull(Rewrites):
    """An empty result arrives as null."""

    def rewrite(self, reply: Reply) -> Reply:
        return attrs.evolve(reply, result=reply.result or None)


@fault("test_an_error_text_arrives_as_it_was_written", '("failed", None, error)')
class TruncatesAnError(Rewrites):
    """Only the first 255 characters of an error text are kept."""

    def rewrite(self, reply: Reply) -> Reply:
        return attrs.evolve(reply, error=reply.error[:255])


@fault("test_a_reply_expires_after_its_ttl", "the end of a reply's time to live")
class KeepsAReplyForever(Rewrites):
    """A reply never expires."""

    def rewrite(self, reply: Reply) -> Reply:
        return attrs.evolve(reply, ttl=1e9)


@fault("test_a_burial_may_write_a_reply", "an expected reply was not found")
class DropsTheReplyOfABurial(MemorySubscription):
    """The reply of a BURY settlement is not written."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        buried = [one.verdict is Verdict.BURY for one in settlements]
        return super().settle(
            [attrs.evolve(one, reply=None) if bury else one for one, bury in zip(settlements, buried, strict=True)]
        )


@fault("test_the_first_reply_wins", "('failed', 'first', None)")
class LetsTheLastReplyWin(Store):
    """A later reply replaces an earlier one."""

    def write_reply(self, reply: Reply, result: str) -> None:
        self._replies.pop(reply.key, None)
        super().write_reply(reply, result)


@fault("test_consuming_a_reply_keeps_only_its_status", 'Reply(key, "completed", result=None)')
class ConsumesNothing(Composed):
    """`consume` leaves the result readable."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        return super().reply(key, timeout=timeout)


@fault("test_only_one_of_many_readers_consumes_a_reply", '["None"] * 5 + ["secret"]')
class ConsumesInTwoSteps(Composed):
    """`consume` reads a reply first and clears it a moment later: concurrent readers both get it."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        found = super().reply(key, timeout=timeout)
        if consume and found is not None:
            time.sleep(0.1)
            super().reply(key, consume=True)
        return found


@fault("test_a_missing_reply_returns_none_at_once", "is in reply(timeout=0")
class AlwaysWaitsForAReply(Composed):
    """`reply` without a timeout waits for half a minute."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        return super().reply(key, timeout=timeout or 30, consume=consume)


@fault("test_an_unknown_key_returns_none_at_once", "raised KeyError")
class RaisesForAnUnknownKey(Composed):
    """`reply` for an unknown key raises a Python error."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        if not timeout:
            with self._store.using():
                _ = self._store._replies[key]
        return super().reply(key, timeout=timeout, consume=consume)


@fault("test_a_timeout_ends_the_wait", "assert 0.25 < ")
class ReturnsBeforeItsTimeout(Composed):
    """`reply` does not wait at all."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        return super().reply(key, consume=consume)


@fault("test_a_written_reply_wakes_its_waiting_caller", "is in reply(timeout=40")
class NoticesAReplyLate(Composed):
    """A waiting caller gets a reply only after its full timeout."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        found = super().reply(key, consume=consume)
        if found is None and timeout:
            time.sleep(timeout)
            found = super().reply(key, consume=consume)
        return found


@fault("test_every_waiting_caller_is_answered", "is in reply(timeout=30")
class AnswersOneOfSeveralCallers(Composed):
    """Of several threads that wait for one key, only one gets the reply."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        waiting: list[str] = vars(self).setdefault("waiting", [])
        waiting.append(key)
        if timeout and waiting.count(key) > 1:
            time.sleep(timeout)
        return super().reply(key, timeout=timeout, consume=consume)


@fault("test_many_threads_await_replies_at_once", "assert [")
class MixesUpItsCallers(Composed):
    """Of several waiting threads, each gets the first reply that arrives."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        found = super().reply(key, timeout=timeout, consume=consume)
        newest = next(iter(self._store._replies.values()), None)
        return found and newest and attrs.evolve(found, result=newest[0].result)


class Buries(Store):
    """Changes each dead letter."""

    def change(self, letter: DeadLetter) -> DeadLetter:
        raise NotImplementedError

    def bury(self, row: Any, settlement: Settlement, result: str) -> None:
        super().bury(row, settlement, result)
        self.dead[str(row.id)] = self.change(self.dead[str(row.id)])


@fault("test_a_dead_letter_records_message_reason_and_times", "'ValueError: why'")
class BuriesWithoutAReason(Buries):
    """A dead letter has no reason."""

    def change(self, letter: DeadLetter) -> DeadLetter:
        return attrs.evolve(letter, reason="")


@fault("test_everything_in_a_mixed_batch_takes_effect", "(1, [n], parsed(delivery.raw))")
class BuriesWithoutTheResult(Buries):
    """A dead letter loses the result of its task."""

    def change(self, letter: DeadLetter) -> DeadLetter:
        return attrs.evolve(letter, result=None)


@fault("test_a_buried_message_is_never_delivered", "assert kit.nothing(subscribe(queue))")
class BuriesACopy(Store):
    """A dead-lettered message also stays in its queue."""

    def bury(self, row: Any, settlement: Settlement, result: str) -> None:
        super().bury(row, settlement, result)
        self.rows[row.id] = row


@fault("test_an_unreadable_message_can_be_buried", "subscription.settle([buried])) == [True]")
class BuriesOnlyReadableMessages(MemorySubscription):
    """An unreadable message cannot be dead-lettered, and is delivered again forever."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        rest = iter(super().settle([one for one in settlements if one.delivery.payload is not None]))
        return [one.delivery.payload is not None and next(rest) for one in settlements]


@fault("test_a_dead_letter_is_replayed_as_new", "assert (2, 'o') == (1, 'o')")
class ReplaysAnOldAttempt(Store):
    """A replayed message keeps its old attempt number."""

    def replay(self, letter: DeadLetter) -> None:
        super().replay(letter)
        self.rows[max(self.rows)].attempt = letter.attempts


@fault("test_a_whole_queue_is_replayed_oldest_first", "== [0, 1, 2, 3]")
class ReplaysTheNewestFirst(MemoryDeadLetters):
    """The letters of a queue are replayed from the newest to the oldest."""

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        with self._store.using():
            chosen = [letter.id for letter in self._chosen(ids, queue)][::-1]
        return [id for one in chosen for id in super(ReplaysTheNewestFirst, self).replay([one])]


@fault("test_a_replayed_message_can_be_settled_again", "assert ('first', 1) == ('second', 1)")
class KeepsTheFirstReason(Store):
    """A message that is dead-lettered again keeps its first reason."""

    def bury(self, row: Any, settlement: Settlement, result: str) -> None:
        reasons: dict[str, str] = vars(self).setdefault("reasons", {})
        reason = reasons.setdefault(row.text, settlement.reason)
        super().bury(row, attrs.evolve(settlement, reason=reason), result)


@fault("test_the_newest_dead_letters_are_found_first", "At index 0 diff: 'reason 0' != 'reason 3'")
class FindsTheOldestFirst(MemoryDeadLetters):
    """`find` returns the oldest dead letters first."""

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        return list(super().find(queue=queue, limit=1_000_000))[::-1][:limit]


@fault("test_purge_removes_only_the_selected_letters", "older_than=3600")
class PurgesTooMuch(MemoryDeadLetters):
    """`purge` ignores `older_than`."""

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        return super().purge(ids=ids, queue=queue)
