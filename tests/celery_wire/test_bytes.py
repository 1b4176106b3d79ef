"""Outgoing messages equal those of Celery's `app.send_task` for the same call, byte for byte."""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import amqp
import attrs
import pytest
import strategies as some
from celery import Celery, signature
from celery_wire.support import Pipe, celery_app
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queues import queue_name

from transports.celery import CeleryTransport
from unstract_core import ContinuationSpec, Message, TaskPayload
from unstract_core.codec import to_wire

DECLARATIONS = ("exchange_declare", "queue_declare", "queue_bind")
RANKED = {"x-max-priority": 10}
quickly = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@attrs.frozen
class Published:
    """The arguments of one `basic_publish`, with `origin` and `reply_to` masked."""

    exchange: str
    routing_key: str
    mandatory: bool
    immediate: bool
    header_order: tuple[str, ...]
    headers: dict[str, Any]
    properties: bytes
    body: bytes


@attrs.define
class Spied:
    """The calls on all channels, in order."""

    declared: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)
    published: list[Published] = attrs.field(factory=list)


@contextlib.contextmanager
def spying() -> Iterator[Spied]:
    """Record the calls on py-amqp's channels, and make them."""
    spied = Spied()

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def call(channel: Any, *args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(channel, *args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            if name == "basic_publish":
                spied.published.append(masked(arguments))
            else:
                plain = {key: value for key, value in arguments.items() if key not in ("self", "argsig")}
                spied.declared.append((name, plain))
            return original(channel, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*DECLARATIONS, "basic_publish"):
            patch.setattr(amqp.Channel, name, noting(name, getattr(amqp.Channel, name)))
        yield spied


def masked(call: dict[str, Any]) -> Published:
    original = call["msg"]
    headers = dict(original.properties["application_headers"])
    properties = {**original.properties, "application_headers": {**headers, "origin": "-"}, "reply_to": "-"}
    written = amqp.Message(original.body, **properties)
    body = original.body
    return Published(
        call["exchange"],
        call["routing_key"],
        bool(call["mandatory"]),
        bool(call["immediate"]),
        tuple(headers),
        headers | {"origin": "-"},
        written._serialize_properties(),
        body.encode() if isinstance(body, str) else bytes(body),
    )


def link(spec: ContinuationSpec | None) -> Any:
    return spec and signature(spec.task_name, kwargs=spec.kwargs, queue=spec.queue)


def send_with_celery(app: Celery, message: Message, *, task_id: str, eta: str | None, ranked: bool) -> None:
    """Make the call of Celery's that this message stands for."""
    payload = message.payload
    wire = to_wire(payload)
    headers: dict[str, Any] = {}
    if payload.fairness is not None:
        headers["x-fairness-key"] = wire["fairness"]
    if message.org_id and message.org_id != (wire["fairness"] or {}).get("org_id"):
        headers["x-org-id"] = message.org_id
    if payload.headers is not None:
        headers["x-wire-headers"] = payload.headers
        trace = ("traceparent", "tracestate", "baggage")
        headers |= {name: payload.headers[name] for name in trace if name in payload.headers}
    options: dict[str, Any] = {}
    if payload.reply_key is not None:
        options["correlation_id"] = payload.reply_key
    if ranked or message.priority != 5:
        options["priority"] = message.priority
    app.send_task(
        payload.task_name,
        args=payload.args,
        kwargs=payload.kwargs,
        queue=message.queue,
        task_id=task_id,
        link=link(payload.on_success),
        link_error=link(payload.on_error),
        headers=headers or None,
        eta=eta and datetime.datetime.fromisoformat(eta),
        mandatory=True,
        **options,
    )


def compare(app: Celery, transport: CeleryTransport, message: Message, *, ranked: bool = False) -> Spied:
    """Send a message with both; return what ours did, having compared it with Celery's."""
    with spying() as ours:
        started = datetime.datetime.now(datetime.UTC)
        (task_id,) = transport.send([message])
        ended = datetime.datetime.now(datetime.UTC)
    (sent,) = ours.published
    assert sent.headers["id"] == task_id
    if message.delay:
        delay = datetime.timedelta(seconds=message.delay)
        assert started + delay <= datetime.datetime.fromisoformat(sent.headers["eta"]) <= ended + delay
    with spying() as theirs:
        send_with_celery(app, message, task_id=task_id, eta=sent.headers["eta"], ranked=ranked)
    assert ours.published == theirs.published
    return ours


@pytest.fixture(scope="module")
def sender(rabbitmq_url: str) -> Iterator[Celery]:
    """A real Celery app without a result backend, which would declare its reply queue too."""
    with contextlib.closing(celery_app(rabbitmq_url, backend=None)) as app:
        yield app


@pytest.fixture(scope="module")
def publisher(rabbitmq_url: str) -> Iterator[CeleryTransport]:
    with contextlib.closing(CeleryTransport(rabbitmq_url)) as transport:
        yield transport


@pytest.fixture(scope="module")
def plain_queue(pipe: Pipe) -> str:
    return pipe.declare(queue_name())


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any message: with and without callbacks, ids, a reply key, fairness, an organisation, a delay, a priority."""
    payload: TaskPayload = draw(some.payloads())
    return Message(
        payload,
        payload.queue,
        org_id=draw(st.just("") | some.names),
        priority=draw(st.just(5) | st.integers(1, 10)),
        delay=draw(st.just(0.0) | st.floats(0.001, 1e6)),
    )


def to(queue: str, message: Message) -> Message:
    return attrs.evolve(message, queue=queue, payload=attrs.evolve(message.payload, queue=queue))


@quickly
@given(message=messages())
def test_a_message_equals_celerys_bytes(
    sender: Celery, publisher: CeleryTransport, plain_queue: str, message: Message
) -> None:
    """Exchange, routing key, flags, properties, header order and body equal those of `app.send_task`."""
    compare(sender, publisher, to(plain_queue, message))


@given(value=some.json_values, kwargs=some.json_objects)
def test_any_value_has_celerys_bytes(
    sender: Celery, publisher: CeleryTransport, plain_queue: str, value: Any, kwargs: dict[str, Any]
) -> None:
    """The bytes of the body, and the headers that print it, equal Celery's for every value of the wire."""
    payload = TaskPayload(task_name="t", args=[value], kwargs=kwargs, queue=plain_queue)
    compare(sender, publisher, Message(payload, plain_queue))


@settings(max_examples=25)
@given(batch=st.lists(messages(), min_size=1, max_size=5))
def test_a_batch_has_the_bytes_of_its_messages(
    publisher: CeleryTransport, plain_queue: str, batch: Sequence[Message]
) -> None:
    """A batch has the same frames as its messages sent one by one."""
    still = [attrs.evolve(to(plain_queue, one), delay=0.0) for one in batch]
    known = [
        attrs.evolve(one, payload=attrs.evolve(one.payload, task_id=f"t-{number}")) for number, one in enumerate(still)
    ]
    with spying() as together:
        publisher.send(known)
    with spying() as apart:
        for one in known:
            publisher.send([one])
    assert together.published == apart.published


DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classic": ({}, {}),
    "quorum": ({"x-queue-type": "quorum"}, {"task_create_missing_queue_type": "quorum"}),
    "ranked": (RANKED, {"task_queue_max_priority": 10}),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_the_first_message_declares_as_celery(
    rabbitmq_url: str, pipe: Pipe, make_celery: Callable[..., CeleryTransport], kind: str
) -> None:
    """The first message of a connection declares exchange, queue, arguments and binding in Celery's order."""
    arguments, conf = DECLARED[kind]
    queue = queue_name()
    with contextlib.closing(celery_app(rabbitmq_url, backend=None, **conf)) as app:
        with spying() as theirs:
            app.send_task("t", queue=queue, mandatory=True)
            app.send_task("t", queue=queue, mandatory=True)
        transport = make_celery(queue_arguments=arguments)
        message = Message(TaskPayload(task_name="t", queue=queue), queue)
        with spying() as ours:
            transport.send([message])
            transport.send([message])
    pipe.declare(queue, **arguments)  # as it is, so that it is deleted
    assert [name for name, _ in ours.declared] == list(DECLARATIONS)
    assert ours.declared == theirs.declared
    assert ours.declared[1][1]["arguments"] == arguments


@pytest.fixture(scope="module")
def ranked(rabbitmq_url: str, pipe: Pipe) -> Iterator[tuple[Celery, CeleryTransport, str]]:
    """A real app, a transport, and a queue that both know to keep ten priorities."""
    queue = pipe.declare(queue_name(), **RANKED)
    with (
        contextlib.closing(celery_app(rabbitmq_url, backend=None, task_queue_max_priority=10)) as app,
        contextlib.closing(CeleryTransport(rabbitmq_url, queue_arguments=RANKED)) as transport,
    ):
        yield app, transport, queue


@settings(max_examples=30)
@given(message=messages())
def test_a_priority_queue_gets_every_priority(ranked: tuple[Celery, CeleryTransport, str], message: Message) -> None:
    """With x-max-priority every priority is written, the default one too, as by `send_task(priority=5)`."""
    app, transport, queue = ranked
    compare(app, transport, to(queue, message), ranked=True)
