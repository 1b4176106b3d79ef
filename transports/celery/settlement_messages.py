"""The messages that a settlement publishes: its follow-up, its answer, the next attempt or the dead letter."""

from __future__ import annotations

import attrs

from transports.celery.broker_settings import BrokerSettings
from transports.celery.copies import dead_letter_copy, retry_copy
from transports.celery.decode import Received
from transports.celery.encode import Outgoing
from transports.celery.follow_ups import follow_ups
from transports.celery.results import answers
from unstract_core.transport import Settlement, Verdict
from unstract_core.values import normalise

FOLLOW_UP = "follow-up"
RELEASE = "release"


def settlement_messages(
    received: Received, settlement: Settlement, settings: BrokerSettings, default_queue: str
) -> dict[str, Outgoing]:
    """Return the messages by their kind and id; the same settlement always has the same keys.

    Args:
        received: The settled message.
        settlement: The settlement.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.

    Raises:
        PayloadError: The wire cannot carry a part of the settlement.
    """
    reply, result = settlement.reply, normalise(settlement.result, path="$.result")
    messages: list[tuple[str, Outgoing]] = []
    if settlement.follow_up is not None:
        sent = follow_ups(received.envelope, settlement, settlement.follow_up, settings, default_queue)
        messages += [(FOLLOW_UP, message) for message in sent]
    if reply is not None:
        reply = attrs.evolve(reply, result=normalise(reply.result, path="$.reply.result"))
        failure = {"error_type": settlement.error_type, "error_message": settlement.error_message}
        messages += [("answer", message) for message in answers(received, reply, **failure)]
    if settlement.verdict is Verdict.RETRY and settlement.counted:
        copy = retry_copy(received, retries=received.envelope.attempt, delay=settlement.delay)
        messages.append(("retry", copy))
    if settlement.verdict is Verdict.BURY:
        messages.append(("dead letter", dead_letter_copy(received, attrs.evolve(settlement, result=result))))
    return {f"{kind} {message.id}": message for kind, message in messages}
