"""Messages that a settlement publishes: the continuation, the answer, the next try or the dead letter.

A continuation is fired as a Celery worker would fire it, from the message's own links, which may be several, immutable
and with arguments of their own: on success a lone one by itself and several as a group, on failure always as a group.
A continuation that comes from no link is a message like any other.
"""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import attrs
import kombu

from transports.celery.broker import BrokerSettings
from transports.celery.compression import HEADER as COMPRESSION_HEADER
from transports.celery.compression import bytes_of, is_compressed
from transports.celery.decode import Envelope, link_queue, name_of, read_message
from transports.celery.encode import DEAD_SUFFIX, TRACE_HEADERS, Lineage, Outgoing, eta_of, task_message, write_task
from transports.celery.results import write_answer
from unstract_core.continuation import CONTINUATION_IDS, with_error
from unstract_core.observability.log_events import emit
from unstract_core.transport import Message, Reply, Settlement, Verdict
from unstract_core.values import normalise, normalise_members

logger = logging.getLogger("unstract_wire.celery")

DEAD_HEADERS = ("x-dead-id", "x-dead-queue", "x-dead-reason", "x-dead-attempts", "x-dead-at")
DEAD_RESULT = "x-dead-result"
"""The member of the body's third part that holds the result of a task that ran."""

_LARGEST_HEADERS = 100_000
"""Bytes of the headers that are copied; RabbitMQ takes frames of 128 KiB."""
_KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "message_id")
_COUNTS = frozenset({"redelivered", "x-delivery-count", "x-death"})
"""The headers in which a broker counts what has become of a message; for a copy it begins anew."""
_UNTRIED = {"retries": 0, "eta": None, "expires": None}


@attrs.frozen
class Received:
    """A message as it came, and as it was read."""

    message: kombu.Message
    envelope: Envelope
    queue: str


def outgoing(
    received: Received, settlement: Settlement, settings: BrokerSettings, default_queue: str
) -> dict[str, Outgoing]:
    """Return what a settlement publishes, by what it is and its id: the same settlement always gives the same keys.

    Raises PayloadError for what the wire cannot carry.
    """
    settlement = _fit(settlement)
    found: list[tuple[str, Outgoing]] = []
    if settlement.follow_up is not None:
        follow_ups = list(_follow_ups(received.envelope, settlement, settlement.follow_up, settings, default_queue))
        found += [("follow-up", one) for one in follow_ups]
    if settlement.reply is not None:
        found += [("answer", one) for one in _answers(received, settlement.reply, settlement.error_type)]
    if settlement.verdict is Verdict.RETRY and settlement.counted:
        found.append(("retry", again(received, retries=received.envelope.attempt, delay=settlement.delay)))
    if settlement.verdict is Verdict.BURY:
        found.append(("dead letter", _dead_letter(received, settlement)))
    return {f"{kind} {one.id}": one for kind, one in found}


def _fit(settlement: Settlement) -> Settlement:
    """Return a settlement whose results are values of the wire; raises PayloadError for what is none."""
    reply = settlement.reply
    if reply is not None:
        reply = attrs.evolve(reply, result=normalise(reply.result, path="$.reply.result"))
    return attrs.evolve(settlement, reply=reply, result=normalise(settlement.result, path="$.result"))


def again(received: Received, *, retries: int, delay: float = 0.0) -> Outgoing:
    """Return the same message, to be delivered again after `delay` seconds, with this many tries behind it."""
    message, envelope = received.message, received.envelope
    keeps = not delay and (envelope.eta is not None or envelope.problem is not None)  # a malformed one stays malformed
    eta = message.headers.get("eta") if keeps else eta_of(delay)
    return _copy(message, received.queue, {**_with_room(_kept(message)), "retries": retries, "eta": eta})


def as_new(message: kombu.Message, queue: str) -> Outgoing:
    """Return a buried message as it was before it was first tried."""
    fresh = {name: value for name, value in _kept(message).items() if name not in DEAD_HEADERS}
    untried = {name: value for name, value in _UNTRIED.items() if name in fresh}
    copy = _copy(message, queue, {**fresh, **untried})
    body = read_message(message, queue, default_queue="").body
    if body is None or DEAD_RESULT not in body[2]:
        return copy
    args, kwargs, embed = body
    return _with_body(copy, (args, kwargs, {name: value for name, value in embed.items() if name != DEAD_RESULT}))


def as_it_is(message: kombu.Message, queue: str) -> Outgoing:
    """Return a message unchanged, for the queue that it was taken out of."""
    return attrs.evolve(_copy(message, queue, _kept(message, counts={"x-delivery-count"})), declared=False)


def _kept(message: kombu.Message, counts: Collection[str] = _COUNTS) -> dict[str, Any]:
    dropped = {*counts} if is_compressed(message) else {*counts, COMPRESSION_HEADER}
    return {name: value for name, value in message.headers.items() if name not in dropped}


def _copy(message: kombu.Message, queue: str, headers: dict[str, Any]) -> Outgoing:
    return Outgoing(
        queue=queue,
        headers=headers,
        properties={name: message.properties[name] for name in _KEPT_PROPERTIES if name in message.properties},
        body=bytes_of(message),
        content_type=message.content_type or "application/data",
        content_encoding=message.content_encoding,
    )


def _with_body(copy: Outgoing, body: tuple[Any, Any, Any]) -> Outgoing:
    """Return a copy of a message with another body, compressed as the message was."""
    headers = {name: value for name, value in copy.headers.items() if name != COMPRESSION_HEADER}
    return attrs.evolve(
        copy,
        body=body,
        headers=headers,
        content_type=None,
        content_encoding=None,
        compression=copy.headers.get(COMPRESSION_HEADER) or None,
    )


def _with_room(headers: dict[str, Any]) -> dict[str, Any]:
    """Leave out the largest headers of a message that has no room for more: they must fit in one frame of AMQP."""
    while len(ascii(headers)) > _LARGEST_HEADERS:
        largest = max(headers, key=lambda name: len(ascii(headers[name])))
        headers = {name: value for name, value in headers.items() if name != largest}
    return headers


def _answers(received: Received, reply: Reply, error_type: str) -> Iterator[Outgoing]:
    """Write the answer to the sender; of a failed chain, to those too who wait for its later tasks, as Celery does."""
    envelope = received.envelope
    if to := _answer_address(received):
        task_id = envelope.id or reply.key
        correlation_id = envelope.correlation_id or task_id
        yield write_answer(reply, task_id=task_id, correlation_id=correlation_id, reply_to=to, error_type=error_type)
    chain = envelope.body[2].get("chain") if envelope.body is not None and reply.status == "failed" else None
    for link in chain if isinstance(chain, list) else ():
        options = link.get("options") if isinstance(link, dict) else None
        if isinstance(options, dict):
            later, address = name_of(options.get("task_id")), name_of(options.get("reply_to"))
            if later is not None and address is not None:
                yield write_answer(reply, task_id=later, correlation_id=later, reply_to=address, error_type=error_type)


def _answer_address(received: Received) -> str:
    ignored = received.message.headers.get("ignore_result") is True
    return "" if ignored else received.envelope.reply_to


def _follow_ups(
    envelope: Envelope, settlement: Settlement, follow_up: Message, settings: BrokerSettings, default_queue: str
) -> Iterable[Outgoing]:
    failed = settlement.outcome == "failure"
    links = envelope.errbacks if failed else envelope.callbacks
    lineage = Lineage(root_id=envelope.root_id or envelope.id, parent_id=envelope.id)
    plain = task_message(follow_up, ranked=settings.keeps_priorities(follow_up.queue), lineage=lineage)
    if not links:
        return [plain]
    if failed and envelope.dropped:
        emit(
            logger,
            logging.WARNING,
            "errback_options_dropped",
            task_id=envelope.id,
            count=len(links),
            dropped=", ".join(envelope.dropped),
        )
    if failed or len(links) > 1:
        lineage = attrs.evolve(lineage, group=str(uuid.uuid5(CONTINUATION_IDS, f"{plain.id}/group")))
    error = settlement.reason if failed else None
    return [
        _fired(link, number, plain, follow_up, error, lineage, settings, default_queue)
        for number, link in enumerate(links)
    ]


def _fired(
    link: Mapping[str, Any],
    number: int,
    plain: Outgoing,
    follow_up: Message,
    error: str | None,
    lineage: Lineage,
    settings: BrokerSettings,
    default_queue: str,
) -> Outgoing:
    """Return the message that one link asks for. `plain` is what the first would be, had it no more to say."""
    options = link.get("options") or {}
    stored = normalise_members(link.get("args") or [], lenient=True)
    kwargs = normalise_members(link.get("kwargs") or {}, lenient=True)
    immutable = bool(link.get("immutable"))
    if error is not None and not immutable:
        kwargs = with_error(kwargs, error)
    queue = link_queue(link, default_queue)
    ranked = settings.keeps_priorities(queue)
    task_id = options.get("task_id") or (
        plain.id if number == 0 else str(uuid.uuid5(CONTINUATION_IDS, f"{plain.id}/{number}"))
    )
    args = stored if immutable else [*plain.body[0], *stored]
    return write_task(
        link["task"],
        args if immutable and lineage.group is None else tuple(args),  # so that argsrepr is as Celery's
        kwargs,
        queue=queue,
        task_id=task_id,
        callbacks=_listed(options.get("link")),
        errbacks=_listed(options.get("link_error")),
        priority=follow_up.priority if ranked else plain.properties.get("priority"),
        eta=eta_of(options.get("countdown") or 0),
        lineage=attrs.evolve(lineage, group_index=number) if lineage.group else lineage,
        headers={
            name: value for name, value in plain.headers.items() if name.startswith("x-") or name in TRACE_HEADERS
        },
    )


def _listed(links: Any) -> list[Any] | None:
    return links if isinstance(links, list) and links else [links] if links else None


def _dead_letter(received: Received, settlement: Settlement) -> Outgoing:
    message, envelope = received.message, received.envelope
    why = {
        "x-dead-id": str(uuid.uuid4()),
        "x-dead-queue": received.queue,
        "x-dead-reason": settlement.reason,
        "x-dead-attempts": settlement.delivery.attempt,
        "x-dead-at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    letter = _copy(message, received.queue + DEAD_SUFFIX, {**_with_room(_kept(message)), **why})
    if settlement.result is None or envelope.body is None:
        return letter
    args, kwargs, embed = envelope.body
    return _with_body(letter, (args, kwargs, {**embed, DEAD_RESULT: settlement.result}))
