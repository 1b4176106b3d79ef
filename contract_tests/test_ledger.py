"""Delivery guarantees of every transport: at least once, and exactly once if no claim was lost.

Two workers receive, settle, crash and lose their claims, in any order. A message whose claim was lost may be delivered
again. At the end, every unsettled message is still there, and so is the follow-up of every effective settlement.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from contract_tests.checking import CheckedSubscription
from contract_tests.kit import Kit, retry_outages
from contract_tests.messages import first, make_settlement, message
from contract_tests.profiles import examples
from unstract_core import Delivery, TransportError, Verdict

T = TypeVar("T")

WORKERS = st.integers(0, 1)


@attrs.define
class LedgerEntry:
    """The expected and counted deliveries of a message."""

    deliveries: int = 0
    expected: int = 1
    ended: bool = False
    """Whether a settlement acknowledged or dead-lettered it."""
    doubtful: bool = False
    """Whether it may be delivered again although it has ended, because a claim was lost."""


class DeliveryMachine(RuleBasedStateMachine):
    """Two workers on one queue, and the deliveries that may and must follow."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.kit = kit
        self.stack = contextlib.ExitStack()
        self.transport = self.stack.enter_context(kit.open())
        self.queue = kit.queue()
        self.numbers = itertools.count()
        self.entries: dict[int, LedgerEntry] = {}
        self.held: list[tuple[int, Delivery]] = []
        self.workers: list[CheckedSubscription] = []
        self.cut: set[int] = set()

    @initialize(count=st.integers(0, 4), claimed=st.integers(1, 4))
    def open(self, count: int, claimed: int) -> None:
        """Start with two workers and some messages, of which the first worker claims a part."""
        self.workers = [self.transport.subscribe([self.queue], lease=600) for _ in range(2)]
        self.send(count)
        self.receive(0, claimed)

    def teardown(self) -> None:
        try:
            self.check_nothing_is_lost()
        finally:
            for worker in self.workers:
                worker.close()
            self.stack.close()

    def new(self) -> int:
        number = next(self.numbers)
        self.entries[number] = LedgerEntry()
        return number

    @rule(count=st.integers(1, 4))
    def send(self, count: int) -> None:
        self.transport.send([message("t", self.queue, self.new()) for _ in range(count)])

    @rule(worker=WORKERS, limit=st.integers(1, 4))
    def receive(self, worker: int, limit: int) -> None:
        for delivery in self.retried_after_cut(
            worker, lambda: self.workers[worker].receive(limit=limit, wait=self.kit.moment)
        ):
            self.record(delivery)
            self.held.append((worker, delivery))

    def record(self, delivery: Delivery) -> None:
        entry = self.entries[first(delivery)]
        entry.deliveries += 1
        if not entry.doubtful:
            assert not entry.ended, f"message {first(delivery)} was settled, and was delivered again"
            assert entry.deliveries <= entry.expected, f"message {first(delivery)} was delivered to two holders"

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        choices=st.lists(st.tuples(st.sampled_from(Verdict), st.booleans()), min_size=1, max_size=6),
    )
    def settle(self, data: st.DataObject, choices: list[tuple[Verdict, bool]]) -> None:
        """Settle some claimed messages, each with a verdict and with or without a follow-up."""
        for verdict, follows in choices[: len(self.held)]:
            self.settle_one(data, verdict, follows)

    def settle_one(self, data: st.DataObject, verdict: Verdict, follows: bool) -> None:
        place = data.draw(st.integers(0, len(self.held) - 1), label="index of the claimed message")
        worker, delivery = self.held.pop(place)
        entry = self.entries[first(delivery)]
        number = self.new() if follows else None
        follow_up = message("t", self.queue, number) if number is not None else None
        settlement = make_settlement(delivery, verdict, follow_up=follow_up, reason="r")
        (took_effect,) = self.retried_after_cut(worker, lambda: self.workers[worker].settle([settlement]))
        if not took_effect:
            assert entry.doubtful, f"message {first(delivery)} could not be settled by its holder"
            if number is not None:
                self.entries[number] = LedgerEntry(
                    expected=0, ended=True, doubtful=not self.kit.capabilities.atomic_settle
                )
        elif verdict is Verdict.RETRY:
            entry.expected += 1
        else:
            entry.ended = True

    @rule(worker=WORKERS)
    def crash(self, worker: int) -> None:
        """A worker closes its subscription without settling: its messages may be delivered again."""
        self.workers[worker].close()
        self.abandon(worker)
        self.cut.discard(worker)
        self.workers[worker] = self.transport.subscribe([self.queue], lease=600)

    @rule()
    def expire(self) -> None:
        """Every claim ends, by its lease or otherwise, without notice to the holders."""
        self.kit.expire(self.transport, self.queue)
        self.cut = set() if self.kit.capabilities.fencing else {0, 1}
        for _, delivery in self.held:
            self.entries[first(delivery)].doubtful = True

    def retried_after_cut(self, worker: int, call: Callable[[], Sequence[T]]) -> Sequence[T]:
        """Call; repeat the call if the worker's connection was cut and the first call raised the outage."""
        try:
            return call()
        except TransportError:
            assert worker in self.cut
            return retry_outages(call)
        finally:
            self.cut.discard(worker)

    def abandon(self, worker: int) -> None:
        for owner, delivery in self.held:
            if owner == worker:
                self.entries[first(delivery)].doubtful = True
        self.held = [one for one in self.held if one[0] != worker]

    def check_nothing_is_lost(self) -> None:
        """Check that every unsettled message is still there, and that no other message is."""
        for worker in self.workers:
            worker.close()
        self.abandon(0)
        self.abandon(1)
        missing = {number for number, entry in self.entries.items() if not entry.ended}
        for delivery in self.kit.remaining(self.transport, self.queue, count=len(missing)):
            self.record(delivery)
            missing.discard(first(delivery))
        assert not missing, f"lost: {sorted(missing)}"


def test_no_message_is_lost_or_repeated_without_cause(kit: Kit) -> None:
    """Messages arrive at least once, and exactly once if no claim was lost; effective follow-ups arrive."""
    count = 30 if kit.moment == 0 else 6
    run_state_machine_as_test(
        lambda: DeliveryMachine(kit),  # type: ignore[arg-type]  # a function that returns a machine is accepted
        settings=examples(count, stateful_step_count=15),
    )
