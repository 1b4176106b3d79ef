"""Faults in capabilities, return types, errors, transactions, and in reading messages of other programs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import attrs
from kit.planting import Composed, ComposedHarness, fault, without

from contract_tests.messages import parsed
from transports.memory.subscription import MemorySubscription
from transports.memory.transport import MemoryTransport
from unstract_core.errors import MalformedPayload, NotSupported
from unstract_core.transport import Delivery, Message, QueueState, Reply, Settlement, Verdict

CLAIMS = MemoryTransport.capabilities


@fault("test_transport_and_harness_claim_the_same_capabilities", "attrs.asdict(kit.capabilities)")
class ClaimsMoreThanItsHarness(ComposedHarness):
    """The harness claims less than its transport, so that tests are skipped."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.capabilities = without("fencing")


@fault(
    "test_every_flag_is_true_or_false",
    "type(claimed) is bool",
    claims=attrs.evolve(CLAIMS, delay=cast(bool, "if asked nicely")),
)
class ClaimsWithAText(Composed):
    """A capability is a text instead of a bool, and so is always true."""


@fault("test_claims_do_not_contradict_each_other", "claims.replies or not claims.status", claims=without("replies"))
class ClaimsAStatusWithoutReplies(Composed):
    """`status` is claimed without `replies`."""


@fault("test_unclaimed_retry_delay_is_refused", "DID NOT RAISE", claims=without("delay"))
class AcceptsAnUnclaimedRetryDelay(Composed):
    """`delay` is not claimed, but RETRY with a delay is accepted."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        if any(one.delay for one in messages):
            raise NotSupported("no delays")
        return super().send(messages, within=within)


@fault("test_unclaimed_status_read_is_refused", "DID NOT RAISE", claims=without("status"))
class ReturnsAnUnclaimedStatus(Composed):
    """`status` is not claimed, but `reply` returns None ("not yet") instead of raising an error."""


@fault("test_unclaimed_status_does_not_stop_a_settlement", "no status", claims=without("status"))
class RefusesToSettleWithAStatus(MemorySubscription):
    """`status` is not claimed, and a settlement with a reply is refused."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if any(one.reply is not None for one in settlements):
            raise NotSupported("no status is kept")
        return super().settle(settlements)


@fault(
    "test_burying_without_dead_letters_removes_the_message",
    "no dead letters",
    claims=without("dead_letters"),
)
class RefusesToBury(MemorySubscription):
    """`dead_letters` is not claimed, and BURY is refused."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if any(one.verdict is Verdict.BURY for one in settlements):
            raise NotSupported("no dead letters are kept")
        return super().settle(settlements)


@fault("test_unclaimed_inspection_is_refused", "DID NOT RAISE", claims=without("inspection"))
class ReportsUninspectedQueuesAsEmpty(Composed):
    """`inspection` is not claimed, but `queues` reports every queue as empty."""

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        return [QueueState(name, 0, 0, 0, None, 0) for name in names or ()]


class Tells(Composed):
    """Reports a wrong state of its queues."""

    def tell(self, state: QueueState) -> QueueState:
        raise NotImplementedError

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        return [self.tell(state) for state in super().queues(names)]


@fault("test_queues_reports_counts_and_oldest_age", "(state.ready, state.in_flight, state.delayed)")
class CountsClaimedAsReady(Tells):
    """`queues` counts claimed messages as ready."""

    def tell(self, state: QueueState) -> QueueState:
        return attrs.evolve(state, ready=state.ready + state.in_flight)


@fault("test_queues_counts_dead_letters", "assert (0, 0, 0) == (0, 0, 2)")
class CountsNoDeadLetters(Tells):
    """`queues` does not count dead letters."""

    def tell(self, state: QueueState) -> QueueState:
        return attrs.evolve(state, dead=0)


@fault("test_waiting_tasks_counts_ready_tasks_by_name", "'held': 1")
class CountsTasksThatAreNotReady(Composed):
    """`waiting_tasks` also counts claimed and delayed messages."""

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        with self._store.using():
            texts = [row.text for row in self._store.rows.values() if row.queue == queue]
        messages = [parsed(text) for text in texts]
        return Counter(one["task_name"] for one in messages if isinstance(one, dict) and one["task_name"] != 7)


class Within(ComposedHarness):
    """Claims to send within a transaction of SQLite."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.capabilities = attrs.evolve(CLAIMS, transactional_send=True)

    def transport(self) -> contextlib.closing[Any]:
        transport: Any = Composed()
        transport.capabilities = self.capabilities
        transport.send = lambda messages, *, within=None: self.send(transport, messages, within)
        return contextlib.closing(transport)

    @contextlib.contextmanager
    def caller(self, transport: Any) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            yield connection

    def send(self, transport: Any, messages: Sequence[Message], within: object) -> Sequence[str]:
        if within is not None and not isinstance(within, sqlite3.Cursor):
            raise NotSupported("within= is a cursor")
        return MemoryTransport.send(transport, messages)


@fault("test_a_commit_sends_the_messages", "assert kit.nothing(subscription)")
class SendsBeforeTheCommit(Within):
    """A message sent within the caller's transaction is visible before the commit."""


@fault("test_a_rollback_sends_nothing", "== ['committed']")
class SendsDespiteARollback(Within):
    """A message sent within the caller's transaction stays after a rollback."""


@fault("test_within_refuses_anything_but_a_cursor", "DID NOT RAISE")
class AcceptsAnythingAsACursor(Within):
    """`within` accepts any object."""

    def send(self, transport: Any, messages: Sequence[Message], within: object) -> Sequence[str]:
        return MemoryTransport.send(transport, messages)


class Changes(MemorySubscription):
    """Changes each delivery."""

    def change(self, delivery: Delivery) -> Any:
        raise NotImplementedError

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return [self.change(one) for one in super().receive(limit=limit, wait=wait)]


@fault("test_a_redelivery_repeats_the_message_unchanged", "assert parsed(again.raw) == parsed(before.raw)")
class DropsUnknownKeysOnRedelivery(Changes):
    """A redelivery lacks the keys that this version does not know."""

    def change(self, delivery: Delivery) -> Delivery:
        wire = parsed(delivery.raw)
        if delivery.attempt > 1 and isinstance(wire, dict):
            wire.pop("new", None)
        return attrs.evolve(delivery, raw=json.dumps(wire))


@fault("test_rows_with_null_or_missing_members_are_read", "is not None")
class RequiresAQueueName(Changes):
    """A message without `queue` is reported as unreadable."""

    def change(self, delivery: Delivery) -> Delivery:
        wire = parsed(delivery.raw)
        if isinstance(wire, dict) and not wire.get("queue"):
            return attrs.evolve(delivery, payload=None, problem="no queue")
        return delivery


@fault("test_unknown_keys_are_ignored", "is None")
class RefusesUnknownKeys(Changes):
    """A message with an unknown key is reported as unreadable."""

    def change(self, delivery: Delivery) -> Delivery:
        wire = parsed(delivery.raw)
        return attrs.evolve(delivery, payload=None, problem="unknown") if "new" in wire else delivery


@fault("test_every_golden_message_is_delivered_as_it_reads", "no such key: fairness")
class RequiresTheFairness(Changes):
    """A message without the key `fairness`, as early versions wrote it, is reported as unreadable."""

    def change(self, delivery: Delivery) -> Delivery:
        wire = parsed(delivery.raw)
        if isinstance(wire, dict) and "fairness" not in wire:
            return attrs.evolve(delivery, payload=None, problem="no such key: fairness")
        return delivery


@fault("test_an_unreadable_message_is_delivered_with_its_problem", "MalformedPayload")
class RaisesForAnUnreadableMessage(Changes):
    """`receive` raises an error for an unreadable message."""

    def change(self, delivery: Delivery) -> Delivery:
        if delivery.problem is not None:
            raise MalformedPayload(delivery.problem)
        return delivery


@fault("test_a_malformed_message_notifies_sender_and_is_buried", "assert [('ok'")
class DropsAnUnreadableMessage(MemorySubscription):
    """An unreadable message is removed, and its sender gets no error."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        found = super().receive(limit=limit, wait=wait)
        self.settle([Settlement(one, Verdict.ACK) for one in found if one.problem is not None])
        return [one for one in found if one.problem is None]


@fault("test_messages_are_stored_as_wire_json", "parsed(raw) for raw in kit.stored")
class WrapsStoredMessages(ComposedHarness):
    """Stored messages are wrapped in a format of the transport's own."""

    def stored(self, transport: MemoryTransport, queue: str) -> Sequence[str]:
        return [json.dumps({"payload": text}) for text in super().stored(transport, queue)]


@fault("test_inject_stores_a_readable_message", "{'k': None}")
class InjectsWithoutKwargs(ComposedHarness):
    """The harness injects messages without their kwargs."""

    def inject(self, transport: MemoryTransport, queue: str, text: str) -> None:
        wire = json.loads(text)
        if isinstance(wire, dict):
            wire["kwargs"] = {}
        super().inject(transport, queue, json.dumps(wire))


@fault("test_an_unawaited_result_is_acknowledged", "raised OperationalError: database is locked")
class RaisesAForeignError(MemorySubscription):
    """`receive` raises the driver's error."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        raise sqlite3.OperationalError("database is locked")


@fault("test_on_success_receives_the_result", "each with a payload or a problem")
class ReturnsDicts(Changes):
    """`receive` returns dicts instead of deliveries."""

    def change(self, delivery: Delivery) -> Any:
        return attrs.asdict(delivery)


@fault("test_a_result_answers_the_awaited_reply", "the Reply under that key, or None")
class ReturnsABareResult(Composed):
    """`reply` returns only the result."""

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        found = super().reply(key, timeout=timeout, consume=consume)
        return cast(Reply, found.result) if found else None


@fault("test_an_unawaited_failure_is_retried_then_buried", "one bool for each of them")
class ReturnsOneBoolForABatch(MemorySubscription):
    """`settle` returns one bool for a whole batch."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return cast(Sequence[bool], all(super().settle(settlements)))
