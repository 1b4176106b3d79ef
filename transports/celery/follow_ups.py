"""The messages of a settlement's follow-up, as a Celery worker would send them.

The message's own links decide: there may be several, immutable ones and ones with arguments of their own. On success
one link is sent by itself and several as a group, on failure always as a group. A follow-up without a link is sent like
any other message.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from transports.celery.broker_settings import BrokerSettings
from transports.celery.decode import Envelope
from transports.celery.encode import Lineage, Outgoing, TaskMessage, eta_of, task_of, write_task
from transports.celery.links import link_queue
from unstract_core.continuation import CONTINUATION_IDS, with_error
from unstract_core.observability.log_events import emit
from unstract_core.transport import Message, Settlement
from unstract_core.values import normalise_members

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
        _linked(link, number, task, follow_up.priority, error, settings, default_queue)
        for number, link in enumerate(links)
    ]
    return [write_task(one) for one in tasks or [task]]


def _linked(
    link: Mapping[str, Any],
    number: int,
    task: TaskMessage,
    priority: int,
    error: str | None,
    settings: BrokerSettings,
    default_queue: str,
) -> TaskMessage:
    """Return the task that one link asks for.

    Args:
        link: The link.
        number: Its place among the links of the message.
        task: The task of the follow-up without the link's own options.
        priority: The priority of the follow-up.
        error: The error text of a failure; None for a success.
        settings: The settings of the broker.
        default_queue: The queue of links that name none.
    """
    options = link.get("options") or {}
    stored = normalise_members(link.get("args") or [], lenient=True)
    kwargs = normalise_members(link.get("kwargs") or {}, lenient=True)
    immutable = bool(link.get("immutable"))
    if error is not None and not immutable:
        kwargs = with_error(kwargs, error)
    queue = link_queue(link, default_queue)
    args = stored if immutable else [*task.args, *stored]
    lineage = attrs.evolve(task.lineage, group_index=number) if task.lineage.group else task.lineage
    return TaskMessage(
        name=link["task"],
        args=args if immutable and lineage.group is None else tuple(args),  # argsrepr is then the same as Celery's
        kwargs=kwargs,
        queue=queue,
        task_id=options.get("task_id")
        or (task.task_id if number == 0 else str(uuid.uuid5(CONTINUATION_IDS, f"{task.task_id}/{number}"))),
        callbacks=_listed(options.get("link")),
        errbacks=_listed(options.get("link_error")),
        priority=priority if settings.keeps_priorities(queue) else task.priority,
        eta=eta_of(options.get("countdown") or 0),
        lineage=lineage,
        headers=task.headers,
    )


def _listed(links: Any) -> list[Any] | None:
    return links if isinstance(links, list) and links else [links] if links else None
