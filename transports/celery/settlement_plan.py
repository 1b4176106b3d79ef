"""Settlements with the messages to publish for each, and their publication."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from transports.celery.broker import Broker
from transports.celery.broker_settings import BrokerSettings
from transports.celery.copies import retry_copy
from transports.celery.encode import Outgoing
from transports.celery.errors import InDoubt, Unroutable
from transports.celery.full_queues import FullQueues
from transports.celery.in_flight import DeliveryState, InFlight, InFlightDelivery
from transports.celery.settlement_messages import FOLLOW_UP, RELEASE, settlement_messages
from unstract_core.errors import TransportError, TransportNotReady, TransportRefused
from unstract_core.transport import Settlement, Verdict, check_delay


@attrs.define(eq=False)
class SettlementPlan:
    """A settlement, and what is left to do for it."""

    settlement: Settlement
    #: The delivery; None if it is not in flight: it was settled before, or is another consumer's.
    entry: InFlightDelivery | None
    #: The messages that are not confirmed yet, by kind and id.
    messages: dict[str, Outgoing] = attrs.field(factory=dict)
    #: Whether the delivery is settled.
    settled: bool = False
    #: The error that kept the settlement from being carried out; None if there was none.
    error: TransportError | None = None

    @property
    def is_release(self) -> bool:
        """Whether the delivery returns unstarted."""
        return self.settlement.verdict is Verdict.RETRY and not self.settlement.counted

    @property
    def awaits_redelivery(self) -> bool:
        return self.entry is not None and self.entry.state is DeliveryState.AWAITING_REDELIVERY


class SettlementPlanner:
    """Makes the plans of one subscription.

    Args:
        in_flight: The deliveries in flight.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.
    """

    def __init__(self, in_flight: InFlight, settings: BrokerSettings, default_queue: str) -> None:
        self._in_flight = in_flight
        self._settings = settings
        self._default_queue = default_queue

    def plan(self, settlements: Sequence[Settlement], counts_returns: Callable[[str], bool]) -> list[SettlementPlan]:
        """Return a plan for each settlement; of two settlements for one delivery the first counts.

        Args:
            settlements: The settlements.
            counts_returns: Whether a queue counts requeued messages: it gets a copy of a released one instead.

        Raises:
            PayloadError: The wire cannot carry a part of a settlement.
        """
        plans: list[SettlementPlan] = []
        planned: set[tuple[str, int]] = set()
        for settlement in settlements:
            check_delay(settlement.delay)
            delivery = settlement.delivery
            key = (delivery.id, delivery.attempt)
            entry = None if key in planned else self._in_flight.use(delivery)
            plan = SettlementPlan(settlement, entry)
            plans.append(plan)
            if entry is None:
                plan.settled = key not in planned and self._in_flight.settled_answer(delivery)
            elif not plan.is_release or (entry.incoming is not None and counts_returns(entry.incoming.queue)):
                messages = settlement_messages(entry.received, settlement, self._settings, self._default_queue)
                if plan.is_release:
                    copy = retry_copy(entry.received, retries=entry.received.envelope.attempt - 1)
                    messages[f"{RELEASE} {copy.id}"] = copy
                plan.messages = {name: one for name, one in messages.items() if name not in entry.published}
            planned.add(key)
        return plans


def publish_plans(plans: Sequence[SettlementPlan], broker: Broker, full_queues: FullQueues, declares: bool) -> None:
    """Publish the messages of all plans together, and note in each plan the error of its first failure.

    Args:
        plans: The plans.
        broker: The connection to publish on.
        full_queues: Notes how the queues answered.
        declares: Whether this transport declares queues.
    """
    for plan in plans:
        if plan.entry is not None and plan.entry.unconfirmed:
            plan.error = _read_late_confirms(plan, plan.entry, broker)
    unsent = [
        (plan, plan.entry, name, message)
        for plan in plans
        if plan.entry is not None and plan.error is None
        for name, message in plan.messages.items()
    ]
    if not unsent:
        return
    outcomes = broker.publish("settle", [message for *_, message in unsent])
    for (plan, entry, name, message), error in zip(unsent, outcomes, strict=True):
        if error is None:
            entry.published.add(name)
        else:
            plan.error = plan.error or (_final(error, declares) if name.startswith(FOLLOW_UP) else error)
        if isinstance(error, InDoubt):
            entry.unconfirmed[name] = error.tag
        full_queues.note(entry, message.queue, error)
    full_queues.note_room([message.queue for (*_, message), error in zip(unsent, outcomes, strict=True) if not error])


def _read_late_confirms(plan: SettlementPlan, entry: InFlightDelivery, broker: Broker) -> TransportError | None:
    """Read the broker's late answers to a settlement; return an error while one is missing."""
    for name, tag in list(entry.unconfirmed.items()):
        confirmed = broker.confirmation_of(tag)
        if confirmed is None:
            return InDoubt("settle: the broker takes no messages for now, and has not confirmed one yet", tag)
        del entry.unconfirmed[name]
        if confirmed:
            entry.published.add(name)
            plan.messages.pop(name, None)
    return None


def _final(error: TransportError, declares: bool) -> TransportError:
    """Refuse a follow-up for a queue that is not ready: to try it for ever would hold up other settlements."""
    if not isinstance(error, TransportNotReady) or (isinstance(error, Unroutable) and declares):
        return error
    refused = TransportRefused(str(error))
    refused.__cause__ = error
    return refused
