"""Faults in `send`: batches, values, the caller's objects, order and delays."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
from kit.planting import Composed, fault, without

from transports.memory.store import Row, Store
from transports.memory.subscription import MemorySubscription
from unstract_core.codec import to_wire
from unstract_core.errors import PayloadError
from unstract_core.payload import TaskPayload
from unstract_core.transport import Delivery, Message


@fault("test_one_invalid_message_stops_the_whole_batch", "DID NOT RAISE")
class SwallowsASendError(Composed):
    """`send` returns ids for messages that the wire refuses."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        try:
            return super().send(messages, within=within)
        except PayloadError:
            return [f"lost-{n}" for n in range(len(messages))]


@fault("test_one_invalid_message_stops_the_whole_batch", "assert kit.nothing(subscribe(queue))")
class SendsHalfOfABatch(Composed):
    """`send` refuses a batch, but sends the messages before the invalid one."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return [id for one in messages for id in super(SendsHalfOfABatch, self).send([one], within=within)]


@fault("test_a_visible_first_message_implies_its_batch", "limit=100)) == 60")
class SendsABatchInParts(Composed):
    """A batch is sent message by message, so that parts of it are visible."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        ids: list[str] = []
        for one in messages:
            ids += super().send([one], within=within)
            time.sleep(0.002)
        return ids


@fault("test_a_visible_last_message_implies_its_batch", "limit=100")
class SendsTheLastOfABatchFirst(Composed):
    """The last message of a batch is visible before the others."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        if len(messages) < 2:
            return super().send(messages, within=within)
        last = super().send(messages[-1:], within=within)
        time.sleep(0.02)
        return [*super().send(messages[:-1], within=within), *last]


@fault("test_send_returns_one_id_per_message", "one.id: first(one)")
class ReturnsIdsInTheWrongOrder(Composed):
    """The ids of a batch are in another order than its messages."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return list(super().send(messages, within=within))[::-1]


@fault("test_an_empty_batch_sends_nothing", "IndexError")
class FailsOnAnEmptyBatch(Composed):
    """`send` of an empty batch raises a Python error."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        _ = messages[0]
        return super().send(messages, within=within)


@fault("test_equal_priorities_come_first_in_first_out", "received == list(range(sent))")
class ReversesABatch(Composed):
    """The messages of a batch are stored in reverse order, each under its own id."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return list(super().send(messages[::-1], within=within))[::-1]


@fault("test_higher_priority_first_then_first_in_first_out", "assert received == sorted")
class IgnoresPriority(Store):
    """Messages are delivered in send order, ignoring their priority."""

    def postpone(self, row: Row, delay: float) -> None:
        priority, row.priority = row.priority, 5
        super().postpone(row, delay)
        row.priority = priority


@fault("test_an_invalid_priority_or_delay_is_refused", "DID NOT RAISE")
class ClampsAPriority(Composed):
    """A priority outside the range is replaced by the nearest valid one."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return super().send([attrs.evolve(one, priority=min(10, max(1, one.priority))) for one in messages])


@fault("test_a_delayed_message_arrives_after_its_delay", "assert 1.5 < elapsed()")
class DeliversADelayedMessageAtOnce(Composed):
    """`delay` is claimed, but messages are delivered at once."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return super().send([attrs.evolve(one, delay=0.0) for one in messages], within=within)


@fault("test_a_delay_blocks_no_other_message", "an expected message was not received")
class WaitsBehindADelay(Store):
    """A delayed message blocks every later message."""

    def take(self, queues: Sequence[str], holder: object, lease: float) -> Row | None:
        if any(row.state == "delayed" and row.queue in queues for row in self.rows.values()):
            return None
        return super().take(queues, holder, lease)


@fault("test_any_valid_name_can_be_a_queue", "assert name not in PLAIN")
class RefusesADotInAName(Composed):
    """Queue names with a dot are refused."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        if any("." in one.queue for one in messages):
            raise PayloadError("no dots", path="$.queue")
        return super().send(messages, within=within)


@fault("test_a_payload_arrives_as_it_was_sent", "assert exact(to_wire(delivery.payload)) == exact(wire)")
class ForgetsTheFairness(Composed):
    """The fairness key of a payload is not sent."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        bare = [attrs.evolve(one, payload=attrs.evolve(one.payload, fairness=None)) for one in messages]
        return super().send(bare, within=within)


def with_numbers(value: Any, change: Any) -> Any:
    """Return a value with every number changed."""
    if isinstance(value, dict):
        return {key: with_numbers(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [with_numbers(one, change) for one in value]
    return change(value) if type(value) in (int, float) else value


class Renumbers(Store):
    """Changes each number of a message."""

    def change(self, number: Any) -> Any:
        raise NotImplementedError

    def add(self, message: Message, text: str) -> str:
        wire = json.loads(text)
        if "args" in wire:
            wire["args"] = with_numbers(wire["args"], self.change)
        return super().add(message, json.dumps(wire))


@fault("test_every_json_value_arrives_with_its_type", "assert exact(payload.args) == exact([value])")
class TurnsWholeFloatsIntoInts(Renumbers):
    """3.0 arrives as 3."""

    def change(self, number: Any) -> Any:
        return int(number) if isinstance(number, float) and number.is_integer() else number


@fault("test_every_json_value_arrives_with_its_type", "assert exact(payload.args) == exact([value])")
class TurnsLargeIntsIntoFloats(Renumbers):
    """Integers beyond 2^53 arrive as the nearest float."""

    def change(self, number: Any) -> Any:
        return float(number) if isinstance(number, int) and abs(number) > 2**53 else number


@fault("test_send_does_not_change_its_arguments", "for payload in sent] == before")
class ChangesTheCallersObjects(Composed):
    """`send` adds a key to the caller's kwargs."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        ids = super().send(messages, within=within)
        for one in messages:
            one.payload.kwargs["sent"] = True
        return ids


class Keeping(MemorySubscription):
    """Delivers the sent objects themselves."""

    kept: ClassVar[dict[tuple[str, str], TaskPayload]] = {}

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        found = super().receive(limit=limit, wait=wait)
        return [attrs.evolve(one, payload=self.kept.get((one.queue, one.id), one.payload)) for one in found]


@fault("test_later_changes_do_not_reach_the_message", "{'list': [1, 2]}")
class KeepsTheCallersObjects(Composed):
    """A delivery has the caller's objects, including later changes."""

    subscription_type = Keeping

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        ids = super().send(messages, within=within)
        Keeping.kept.update({(one.queue, id): one.payload for one, id in zip(messages, ids, strict=True)})
        return ids


@fault("test_org_and_priority_travel_with_the_message", "('org-1', 9)")
class LosesTheOrganisation(Composed):
    """A delivery has no organisation."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return super().send([attrs.evolve(one, org_id="") for one in messages], within=within)


@fault("test_a_large_message_arrives_whole", "too large for a row")
class RefusesAMegabyte(Composed):
    """A message above 64 KiB is refused."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        if any(len(json.dumps(to_wire(one.payload))) > 65536 for one in messages):
            raise PayloadError("too large for a row", path="$")
        return super().send(messages, within=within)


@fault("test_many_threads_send_at_once", "assert sorted(delivery.id for delivery in received) == sorted(sent)")
class LosesAConcurrentSend(Composed):
    """If two threads send at the same time, one of their messages is lost."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        ids = super().send(messages, within=within)
        newest = max(self._store.rows, default=0)
        time.sleep(0.001)
        if ids and self._store.rows and max(self._store.rows) != newest:
            with self._store.using():
                self._store.rows.pop(int(ids[-1]), None)
        return ids


@fault("test_unclaimed_within_is_refused", "DID NOT RAISE")
class IgnoresWithin(Composed):
    """`within` is ignored: the message is sent even if the caller rolls back."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return super().send(messages)


@fault("test_unclaimed_delay_is_refused", "DID NOT RAISE", claims=without("delay"))
class IgnoresAnUnclaimedDelay(Composed):
    """`delay` is not claimed, but a delayed message is accepted and delivered at once."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        return super().send([attrs.evolve(one, delay=0.0) for one in messages], within=within)


@fault("test_unclaimed_reply_request_is_refused", "DID NOT RAISE", claims=without("replies", "status"))
class AcceptsAnUnclaimedReplyRequest(Composed):
    """`replies` is not claimed, but a message with a reply key is sent."""
