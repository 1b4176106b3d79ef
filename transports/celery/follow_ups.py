"""The messages of a settlement's follow-up, as a Celery worker would send them.

The links of the message decide: there may be several, some of them immutable or with arguments of their own. After a
success, one link is sent alone and several links as a group. After a failure, links are always sent as a group. A
follow-up without a link is sent like any other message.
"""

from __future__ import annotations

import logging
import uuid

import attrs

from transports.celery.broker_settings import BrokerSettings
from transports.celery.decode import Envelope
from transports.celery.encode import Lineage, Outgoing, task_of, write_task
from transports.celery.links import linked_task
from unstract_core.continuation import CONTINUATION_IDS
from unstract_core.observability.log_events import emit
from unstract_core.transport import Message, Settlement

logger = logging.getLogger("unstract_wire.celery")


def follow_ups(
    envelope: Envelope, settlement: Settlement, follow_up: Message, settings: BrokerSettings, default_queue: str
) -> list[Outgoing]:
    """Return the messages of a settlement's follow-up.

    Args:
        envelope: The settled message as it was read.
        settlement: The settlement; its outcome chooses between the callbacks and the errbacks of the message.
        follow_up: The follow-up of the settlement.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.
    """
    failed = settlement.outcome == "failure"
    links = envelope.errbacks if failed else envelope.callbacks
    lineage = Lineage(root_id=envelope.root_id or envelope.id, parent_id=envelope.id)
    task = task_of(follow_up, with_priority=settings.keeps_priorities(follow_up.queue), lineage=lineage)
    if failed and links and envelope.dropped:
        emit(
            logger,
            logging.WARNING,
            "errback_options_dropped",
            task_id=envelope.id,
            count=len(links),
            dropped=", ".join(envelope.dropped),
        )
    if links and (failed or len(links) > 1):
        group = str(uuid.uuid5(CONTINUATION_IDS, f"{task.task_id}/group"))
        task = attrs.evolve(task, lineage=attrs.evolve(lineage, group=group))
    error = settlement.reason if failed else None
    tasks = [
        linked_task(link, number, task, follow_up.priority, error, settings, default_queue)
        for number, link in enumerate(links)
    ]
    return [write_task(message) for message in tasks or [task]]
