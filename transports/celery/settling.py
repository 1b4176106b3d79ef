"""Carries out settlements: publishes the messages of all plans together, then acknowledges the deliveries."""

from __future__ import annotations

from collections.abc import Sequence

from transports.celery.broker import Broker
from transports.celery.errors import InDoubt, Unroutable, mapped
from transports.celery.full_queues import FullQueues
from transports.celery.in_flight import InFlightDelivery
from transports.celery.settlement_messages import FOLLOW_UP
from transports.celery.settlement_plan import SettlementPlan, is_release
from unstract_core.errors import TransportError, TransportNotReady, TransportRefused


def carry_out(plans: Sequence[SettlementPlan], broker: Broker, full_queues: FullQueues, declares: bool) -> None:
    """Publish and acknowledge, and record in each plan the error of its first failure.

    Args:
        plans: The plans.
        broker: The connection to publish on.
        full_queues: Records the answers of the queues.
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
    outcomes = broker.publish("settle", [message for *_, message in unsent]) if unsent else []
    for (plan, entry, name, _), error in zip(unsent, outcomes, strict=True):
        if error is None:
            entry.published.add(name)
        if isinstance(error, InDoubt):
            entry.unconfirmed[name] = error.tag
        if isinstance(error, TransportNotReady) and name.startswith(FOLLOW_UP):
            error = _refused(error, declares)
        plan.error = plan.error or error
    full_queues.note(
        (entry, message.queue, error) for (_, entry, _, message), error in zip(unsent, outcomes, strict=True)
    )
    for plan in broker.in_requeue_order(plans):
        if plan.entry is None or plan.entry.incoming is None or plan.error is not None:
            continue
        with mapped("settle: acknowledge", fate_unknown=True):
            if is_release(plan.settlement) and not plan.messages:
                plan.entry.incoming.requeue()
            else:
                plan.entry.incoming.ack()


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


def _refused(error: TransportNotReady, declares: bool) -> TransportError:
    """Refuse a follow-up for a queue that is not ready, because endless retries would delay other settlements."""
    if isinstance(error, Unroutable) and declares:
        return error
    refused = TransportRefused(error.problem, effect=error.effect, remedy=error.remedy)
    refused.__cause__ = error
    return refused
