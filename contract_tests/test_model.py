"""A model for transports with fencing: two workers, all settlements, renewals, crashes and expiring leases.

The model predicts each delivery exactly, because leases, attempts and counts are observable. test_ledger.py checks the
weaker guarantees of other transports.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Literal, cast

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from contract_tests.kit import Kit
from contract_tests.messages import first, make_settlement, message
from contract_tests.profiles import examples
from contract_tests.requires import requires
from unstract_core import Delivery, Reply, Settlement, Verdict

FOUND_WITHIN = 5.0
"""Seconds within which a waiting worker receives a message whose lease has ended."""
WORKERS = st.integers(0, 1)
VERDICTS = st.sampled_from(Verdict)


@attrs.define
class ModelMessage:
    """The state of a message in the model. `number` is its argument and identifies it."""

    number: int
    priority: int
    state: Literal["ready", "held", "delayed", "due", "gone"] = "ready"
    attempt: int = 0
    holders: dict[int, int] = attrs.field(factory=dict)
    place: int = 0
    latest: Delivery | None = None
    """The delivery of the latest claim."""

    def is_held_by(self, worker: int, delivery: Delivery) -> bool:
        """Return whether this attempt is the latest one and belongs to the worker, even if its lease has expired."""
        latest = self.attempt == delivery.attempt and self.holders.get(delivery.attempt) == worker
        return latest and self.state != "gone"

    def is_undefined(self, worker: int, delivery: Delivery) -> bool:
        """Return whether the delivery has the current attempt number only because a later claim was released uncounted.

        The protocol does not say whether such a delivery can still be settled.
        """
        return self.is_held_by(worker, delivery) and delivery is not self.latest

    @property
    def rank(self) -> tuple[int, int]:
        return -self.priority, self.place


class QueueMachine(RuleBasedStateMachine):
    """Drives one queue of a transport beside a model of its messages."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.kit = kit
        self.stack = contextlib.ExitStack()
        self.transport: Any = self.stack.enter_context(kit.open())
        self.queue = kit.queue()
        self.numbers = itertools.count()
        self.known: dict[int, ModelMessage] = {}
        self.deliveries: list[tuple[int, Delivery, ModelMessage]] = []
        self.replies: dict[str, Reply] = {}
        self.buried: dict[int, int] = {}

    @initialize(priorities=st.lists(st.integers(1, 10), max_size=6), held=st.integers(0, 6))
    def open(self, priorities: list[int], held: int) -> None:
        """Start with two workers and some messages, of which the first worker claims a part."""
        self.workers = [self.transport.subscribe([self.queue], lease=600) for _ in range(2)]
        self.send(priorities, delayed=False)
        self.receive(0, held)

    def teardown(self) -> None:
        for worker in getattr(self, "workers", ()):
            worker.close()
        self.stack.close()

    def new(self, priority: int, state: Any = "ready") -> ModelMessage:
        number = next(self.numbers)
        self.known[number] = ModelMessage(number, priority, state, place=number)
        return self.known[number]

    @rule(
        priorities=st.lists(st.integers(1, 10), min_size=1, max_size=5), delayed=st.sampled_from([False, False, True])
    )
    def send(self, priorities: list[int], delayed: bool) -> None:
        sent = [self.new(priority, "delayed" if delayed else "ready") for priority in priorities]
        delay = 600.0 if delayed else 0.0
        self.transport.send([message("t", self.queue, one.number, priority=one.priority, delay=delay) for one in sent])

    @rule(worker=WORKERS, limit=st.integers(1, 6))
    def receive(self, worker: int, limit: int) -> None:
        batch = self.workers[worker].receive(limit=limit, wait=0)
        if not batch and any(one.state == "due" for one in self.known.values()):
            batch = self.workers[worker].receive(limit=limit, wait=FOUND_WITHIN)
        received = [self.known[first(delivery)] for delivery in batch]
        assert len(received) <= limit
        assert all(one.state in ("ready", "due") for one in received)
        assert [one.rank for one in received] == sorted(one.rank for one in received)
        left = [one for one in self.known.values() if one.state == "ready" and one not in received]
        if len(received) < limit:
            assert not left
        if left and received:
            assert min(one.rank for one in left) > max(one.rank for one in received)
        if not received:
            assert not any(one.state == "due" for one in self.known.values())
        for delivery, one in zip(batch, received, strict=True):
            one.state, one.attempt = "held", one.attempt + 1
            one.holders[one.attempt], one.latest = worker, delivery
            assert delivery.attempt == one.attempt
            self.deliveries.append((worker, delivery, one))

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data(), other=st.booleans())
    def settle(self, data: st.DataObject, other: bool) -> None:
        """Settle a batch of a worker's deliveries, lost ones included: of the last receiver, or of the other."""
        latest = self.deliveries[-1][0]
        worker = 1 - latest if other and self.deliveries_of(1 - latest) else latest
        mine = self.deliveries_of(worker)[-8:]
        if not mine:
            return
        picked = data.draw(st.lists(st.sampled_from(range(len(mine))), min_size=1, max_size=4, unique=True))
        batch, expected = [], []
        for delivery, one in (mine[index] for index in picked):
            if one.is_undefined(worker, delivery):
                continue
            verdict = data.draw(VERDICTS, label="verdict")
            delay = data.draw(st.sampled_from([0.0, 600.0]), label="delay")
            key = f"{self.queue}/{one.number % 3}" if data.draw(st.booleans(), label="replies") else None
            follow = data.draw(st.booleans(), label="follows")
            valid = one.is_held_by(worker, delivery)
            expected.append(valid)
            following = None
            if follow:
                following = message("t", self.queue, next(self.numbers), priority=one.priority)
            answer = Reply(key, "completed", result=one.number) if key else None
            again = verdict is Verdict.RETRY
            counted = data.draw(st.booleans(), label="counted") if again else True
            batch.append(
                make_settlement(delivery, verdict, following, answer, delay if again else 0.0, "why", counted=counted)
            )
            if valid:
                self.settled(one, batch[-1])
        assert list(self.workers[worker].settle(batch)) == expected

    def deliveries_of(self, worker: int) -> list[tuple[Delivery, ModelMessage]]:
        """Return the worker's deliveries whose settlement has a defined result."""
        mine = [(delivery, one) for owner, delivery, one in self.deliveries if owner == worker]
        return [(delivery, one) for delivery, one in mine if not one.is_undefined(worker, delivery)]

    def settled(self, one: ModelMessage, settlement: Settlement) -> None:
        del one.holders[one.attempt]
        match settlement.verdict:
            case Verdict.RETRY:
                one.state = "delayed" if settlement.delay else "ready"
                one.attempt -= not settlement.counted
            case Verdict.ACK:
                one.state = "gone"
            case Verdict.BURY:
                one.state = "gone"
                self.buried[one.number] = one.attempt
        if settlement.follow_up is not None:
            number = cast(int, settlement.follow_up.payload.args[0])
            self.known[number] = ModelMessage(number, one.priority, place=number)
        if settlement.reply is not None:
            self.replies.setdefault(settlement.reply.key, settlement.reply)

    @precondition(lambda self: self.deliveries)
    @rule(worker=WORKERS)
    def renew(self, worker: int) -> None:
        mine = self.deliveries_of(worker)[-6:]
        expected = [one.is_held_by(worker, delivery) for delivery, one in mine]
        assert list(self.workers[worker].renew([delivery for delivery, _ in mine])) == expected
        for kept, (_, one) in zip(expected, mine, strict=True):
            if kept:
                one.state = "held"

    @rule()
    def expire(self) -> None:
        self.kit.expire(self.transport, self.queue)
        for one in self.known.values():
            if one.state in ("held", "delayed"):
                one.state = "due"

    @rule(worker=WORKERS)
    def crash(self, worker: int) -> None:
        self.workers[worker].close()
        self.workers[worker] = self.transport.subscribe([self.queue], lease=600)
        self.deliveries = [entry for entry in self.deliveries if entry[0] != worker]
        for one in self.known.values():
            one.holders = {attempt: holder for attempt, holder in one.holders.items() if holder != worker}

    @precondition(lambda self: self.replies)
    @rule(data=st.data(), consume=st.booleans())
    def read(self, data: st.DataObject, consume: bool) -> None:
        expected = self.replies[data.draw(st.sampled_from(sorted(self.replies)))]
        found = self.transport.reply(expected.key, consume=consume)
        assert (found.status, found.result) == (expected.status, expected.result)
        if consume:
            self.replies[expected.key] = attrs.evolve(expected, result=None)

    @precondition(lambda self: self.buried)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.buried)))
        letters = {letter.message["args"][0]: letter for letter in self.transport.dead.find(queue=self.queue)}
        assert {known: letter.attempts for known, letter in letters.items()} == self.buried
        assert list(self.transport.dead.replay([letters[number].id])) == [letters[number].id]
        del self.buried[number]
        again = self.known[number]
        again.state, again.attempt, again.place = "ready", 0, next(self.numbers)
        again.holders = {}
        self.deliveries = [entry for entry in self.deliveries if entry[2] is not again]

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        (state,) = self.transport.queues([self.queue])
        alive = sum(one.state != "gone" for one in self.known.values())
        assert state.ready + state.in_flight + state.delayed == alive
        assert state.dead == len(self.buried)


@requires("fencing", "counts_crashes", "inspection", "status", "delay", "priority", "dead_letters")
def test_two_workers_never_lose_or_double_a_message(kit: Kit) -> None:
    """After any sequence of sends, settlements, crashes and expiries, messages are as the model predicts."""
    run_state_machine_as_test(
        lambda: QueueMachine(kit),  # type: ignore[arg-type]  # a function that returns a machine is accepted
        settings=examples(50, stateful_step_count=25),
    )
