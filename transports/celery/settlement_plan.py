"""Settlements with the messages to publish for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from transports.celery.broker_settings import BrokerSettings
from transports.celery.copies import retry_copy
from transports.celery.encode import Outgoing
from transports.celery.in_flight import InFlightDeliveries, InFlightDelivery
from transports.celery.settlement_messages import RELEASE, settlement_messages
from unstract_core.errors import TransportError
from unstract_core.transport import Settlement, Verdict, check_delay


@attrs.define(eq=False)
class SettlementPlan:
    """A settlement and its remaining steps."""

    settlement: Settlement
    #: The delivery; None if it is not in flight: it was settled before, or is another consumer's.
    entry: InFlightDelivery | None
    #: The messages that are not confirmed yet, by kind and id.
    messages: dict[str, Outgoing] = attrs.field(factory=dict)
    #: Whether the delivery is settled.
    settled: bool = False
    #: The error that kept the settlement from being carried out; None if there was none.
    error: TransportError | None = None


def is_release(settlement: Settlement) -> bool:
    """Whether a settlement returns its delivery unstarted."""
    return settlement.verdict is Verdict.RETRY and not settlement.counted


class SettlementPlanner:
    """Makes the plans of one subscription.

    Args:
        in_flight: The deliveries in flight.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.
    """

    def __init__(self, in_flight: InFlightDeliveries, settings: BrokerSettings, default_queue: str) -> None:
        self._in_flight = in_flight
        self._settings = settings
        self._default_queue = default_queue

    def plan(self, settlements: Sequence[Settlement], counts_returns: Callable[[str], bool]) -> list[SettlementPlan]:
        """Return a plan for each settlement; of two settlements for one delivery the first takes effect.

        Args:
            settlements: The settlements.
            counts_returns: Whether a queue counts requeued messages; it then gets a copy of a released message.

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
            elif not is_release(settlement) or (entry.incoming is not None and counts_returns(entry.incoming.queue)):
                messages = settlement_messages(entry.received, settlement, self._settings, self._default_queue)
                if is_release(settlement):
                    copy = retry_copy(entry.received, retries=entry.received.envelope.attempt - 1)
                    messages[f"{RELEASE} {copy.id}"] = copy
                plan.messages = {name: message for name, message in messages.items() if name not in entry.published}
            planned.add(key)
        return plans
